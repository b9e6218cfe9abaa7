"""``login``, ``logout`` and ``status`` from a terminal, with and without a running proxy."""

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from fakes.authorization_server import FakeAuthorizationServer
from fakes.extension_server import ExtensionServer
from fakes.fixtures import RealMcpServer, Servers
from fakes.headless import Browser, consent, decline
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import PlainClient
from fakes.proxy import (
    Environment,
    link_in,
    proxy_process,
    run_command,
    running_proxy,
    serving,
    start_command,
    unnamed,
    until,
    write_config,
)
from fakes.proxy_setup import proxy_setup

TOOLS = ["add", "count", "echo", "large", "whoami", "write_note"]


class Login:
    """``login`` while it waits for its user."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = ""

    async def link(self) -> str:
        """The link, as soon as it is printed."""
        assert self.process.stdout is not None
        async with asyncio.timeout(15):
            async for raw in self.process.stdout:
                self.out += raw.decode()
                if found := re.search(r"http://\S+/connect/\S+", self.out):
                    return found[0]
        raise AssertionError(f"no link in {self.out!r}")

    async def end(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; bounded."""
        out, err = await asyncio.wait_for(self.process.communicate(), 15)
        return self.process.returncode or 0, self.out + out.decode(), unnamed(err.decode())


@asynccontextmanager
async def login(server: str, config: Path, **env: str) -> AsyncIterator[Login]:
    process = await start_command("login", server, "--config", str(config), env=env)
    try:
        yield Login(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@pytest.fixture
def config(tmp_path: Path, real_mcp_server: RealMcpServer) -> Path:
    """A port that stays the same: the redirect URI names it."""
    return write_config(tmp_path, {"notes": real_mcp_server.url}, listen=f"127.0.0.1:{free_port()}")


def listen_of(config: Path) -> str:
    found = re.search(r"listen: (\S+)", config.read_text())
    assert found
    return found[1]


async def log_in(config: Path) -> None:
    async with login("notes", config) as setup:
        await consent(await setup.link())
        assert (await setup.end())[0] == 0


async def states(config: Path) -> dict[str, str]:
    code, out, err = await run_command("status", "--config", str(config), "--json")
    assert (code, err) == (0, "")
    return {row["server"]: row["state"] for row in json.loads(out)}


# login


async def test_login_without_a_running_proxy_ends_by_listing_the_tools(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    async with login("notes", config) as setup:
        page = await consent(await setup.link())
        assert page.status_code == 200
        code, out, err = await setup.end()
    assert code == 0, err
    assert "notes is connected." in out
    assert out.splitlines()[-1] == f"It offers 6 tools: {', '.join(TOOLS)}"
    assert "Traceback" not in err
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        assert "result" in (await client.initialize()).message
        assert await proxy.stop() == 0
    assert proxy.links == []
    assert authorization_server.authorizations == 1


async def test_login_with_a_running_proxy_leaves_the_callback_to_it(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        async with login("notes", config) as setup:
            link = await setup.link()
            assert link.startswith(f"{proxy.origin}/connect/notes?flow=")
            await consent(link)
            code, out, err = await setup.end()
        assert code == 0, err
        assert "It offers 6 tools" in out
        assert "result" in (await client.initialize()).message
        assert await proxy.stop() == 0
    assert proxy.links == []
    assert (authorization_server.authorizations, authorization_server.registrations) == (1, 1)


async def test_login_to_a_url_finds_its_proxy_at_another_address(servers: Servers, tmp_path: Path) -> None:
    url = (await servers.mcp_server(await servers.authorization_server())).url
    env: Environment = {"HOME": str(tmp_path), "XDG_DATA_HOME": None, "XDG_CONFIG_HOME": None}
    async with serving(url, "--listen", "127.0.0.1:0", env=env, cwd=tmp_path) as proxy:
        code, out, err = await run_command("login", url, "--no-wait", env=env, cwd=tmp_path)
        assert (code, out.startswith(f"{proxy.origin}/connect/")) == (0, True), err
        assert "No proxy is running" not in err


async def test_login_shows_the_link_that_a_waiting_request_has_already(config: Path) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.initialize())
        waiting = await proxy.next_link()
        async with login("notes", config) as setup:
            assert await setup.link() == waiting
            await consent(waiting)
            assert (await setup.end())[0] == 0
        assert "result" in (await call).message


async def test_login_again_says_that_it_is_done_already(config: Path) -> None:
    await log_in(config)
    code, out, err = await run_command("login", "notes", "--config", str(config))
    assert (code, err) == (0, "")
    assert "/connect/" not in out
    assert "stored already" in out
    assert "It offers 6 tools" in out


async def test_login_to_an_open_server_says_so(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"open": upstream.url})
    code, out, _ = await run_command("login", "open", "--config", str(config))
    assert code == 0
    assert out.splitlines() == ["open asks for no authorization.", "It offers 3 tools: count, echo, whoami"]


async def test_login_with_client_credentials_needs_no_link(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, tmp_path: Path
) -> None:
    authorization_server.add_client(client_id="agent", secret="s3cret")
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "env:AGENT_SECRET"}
    config = write_config(tmp_path, {"notes": {"url": real_mcp_server.url, "oauth": oauth}})
    env = {"AGENT_SECRET": "s3cret"}
    code, out, err = await run_command("login", "notes", "--config", str(config), env=env)
    assert (code, out.splitlines()[0]) == (0, "notes is connected."), err
    assert "/connect/" not in out
    env = {"AGENT_SECRET": "wrong"}
    code, out, err = await run_command("logout", "notes", "--config", str(config), env=env)
    assert (code, out) == (1, "")
    assert "forgotten here, but not revoked" in err
    code, out, err = await run_command("login", "notes", "--config", str(config), env=env)
    assert (code, out) == (1, "")
    assert "invalid_client" in err.splitlines()[-1]
    assert "Check servers.notes.oauth.client_id and what it proves itself with (client_secret" in err.splitlines()[-1]
    assert "Traceback" not in err


async def test_login_on_a_wildcard_address_lists_the_tools_too(real_mcp_server: RealMcpServer, tmp_path: Path) -> None:
    inbound = {"allow_anonymous": True}
    config = write_config(tmp_path, {"notes": real_mcp_server.url}, listen=f"0.0.0.0:{free_port()}", inbound=inbound)
    async with login("notes", config) as setup:
        await consent(await setup.link())
        code, out, err = await setup.end()
    assert (code, out.splitlines()[-1][:17]) == (0, "It offers 6 tools"), err


async def test_login_listens_beyond_loopback_only_if_that_is_meant(
    real_mcp_server: RealMcpServer, tmp_path: Path
) -> None:
    address = f"0.0.0.0:{free_port()}"
    config = write_config(tmp_path, {"notes": real_mcp_server.url}, listen=address)
    code, out, err = await run_command("login", "notes", "--config", str(config))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"inbound.allow_anonymous: must be true to listen on {address} (or start the proxy first)" in err
    assert [file.name for file in tmp_path.iterdir()] == [config.name]
    async with proxy_process(config, "--allow-anonymous", listen=address), login("notes", config) as setup:
        await consent(await setup.link())
        code, _, err = await setup.end()
    assert code == 0, err


async def test_a_declined_login_is_one_line_and_exit_1(config: Path) -> None:
    async with login("notes", config, MCP_AUTH_PROXY_LOG_LEVEL="warning") as setup:
        await decline(await setup.link())
        code, out, err = await setup.end()
    assert code == 1
    assert "connected" not in out
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "access_denied" in line
    assert [file.name for file in config.parent.iterdir()] == [config.name]


async def test_login_can_be_interrupted_without_a_traceback(config: Path) -> None:
    async with login("notes", config) as setup:
        await setup.link()
        assert config.with_name("proxy.db").exists()
        setup.process.send_signal(signal.SIGINT)
        code, _, err = await setup.end()
    assert code == 130
    assert "Traceback" not in err
    assert [file.name for file in config.parent.iterdir()] == [config.name]


async def test_a_failed_login_leaves_a_store_that_was_there_alone(config: Path) -> None:
    await run_command("logout", "notes", "--config", str(config))  # makes the store
    key = config.with_name("proxy.key").read_bytes()
    async with login("notes", config) as setup:
        await decline(await setup.link())
        assert (await setup.end())[0] == 1
    assert config.with_name("proxy.db").exists()
    assert config.with_name("proxy.key").read_bytes() == key


async def test_a_grant_outlives_a_login_that_fails_afterwards(
    servers: Servers, authorization_server: FakeAuthorizationServer, tmp_path: Path
) -> None:
    page = FakeResponse.html("a web page", 404)
    upstream = await servers.mcp_server(authorization_server)
    for method in ("initialize", "server/discover", "tools/list"):
        upstream.answers[method] = page
    config = write_config(tmp_path, {"notes": upstream.url})
    async with login("notes", config) as setup:
        await consent(await setup.link())
        code, _, err = await setup.end()
    assert (code, "could not be listed" in err) == (1, True), err
    assert await states(config) == {"notes": "connected"}


async def test_a_failed_login_is_one_line_and_exit_1(servers: Servers, tmp_path: Path) -> None:
    web = await servers.mcp_server(protected=False, intercept=lambda _: FakeResponse.html("a web page", 404))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        closed = sock.getsockname()[1]
    config = write_config(tmp_path, {"page": web.url, "dead": f"http://127.0.0.1:{closed}/mcp"})
    await run_command("logout", "dead", "--config", str(config))  # the key is created and announced
    for name, words in {"page": f"Is {web.url} its MCP endpoint?", "dead": "connection refused"}.items():
        code, _, err = await run_command("login", name, "--config", str(config))
        assert (code, len(err.splitlines())) == (1, 1), err
        assert words in err
    code, _, err = await run_command("login", "nope", "--config", str(config))
    assert (code, err) == (2, "error: There is no server 'nope'. Configured: dead, page.\n")


async def test_login_refuses_if_another_program_has_its_port(servers: Servers, config: Path) -> None:
    host, _, port = listen_of(config).partition(":")
    with socket.create_server((host, int(port))):
        code, out, err = await run_command("login", "notes", "--config", str(config))
    assert (code, out) == (1, "")
    assert f"{host}:{port} is taken by another program" in err
    assert [file.name for file in config.parent.iterdir()] == [config.name]


# secrets that are known to the service alone


async def test_a_secret_of_another_server_need_not_be_known_to_the_terminal(config: Path) -> None:
    document = yaml.safe_load(config.read_text())
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "env:NOT_SET_HERE"}
    document["servers"]["warehouse"] = {"url": "https://warehouse.example/mcp", "oauth": oauth}
    config.write_text(yaml.safe_dump(document))
    async with login("notes", config) as setup:
        link = await setup.link()
        async with PlainClient(f"http://{listen_of(config)}/warehouse/mcp") as client:
            assert (await client.initialize()).status == 404, "without its secret it is not to be used"
        await consent(link)
        assert (await setup.end())[0] == 0
    assert await states(config) == {"notes": "connected", "warehouse": "not connected"}
    code, out, err = await run_command("doctor", "notes", "--config", str(config))
    assert (code, err) == (0, ""), out
    assert (await run_command("logout", "notes", "--config", str(config)))[0] == 0
    assert await states(config) == {"notes": "not connected", "warehouse": "not connected"}
    for command in (["login", "warehouse"], ["logout", "warehouse"], ["doctor", "warehouse"], ["serve"], ["check"]):
        code, out, err = await run_command(*command, "--config", str(config))
        assert (code, out) == (2, ""), command
        assert "servers.warehouse.oauth.client_secret" in err
        assert "'NOT_SET_HERE' is not set" in err


# status


async def test_status_of_one_server_shows_only_that_one(tmp_path: Path) -> None:
    servers = {"alpha": "https://a.example/mcp", "beta": "https://b.example/mcp"}
    config = str(write_config(tmp_path, servers))
    code, out, err = await run_command("status", "beta", "--config", config)
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert out.startswith("beta  needs consent  no grant")
    code, out, _ = await run_command("status", "beta", "--config", config, "--json")
    assert (code, [row["server"] for row in json.loads(out)]) == (0, ["beta"])
    code, out, err = await run_command("status", "gamma", "--config", config)
    assert (code, out) == (2, "")
    assert err == "error: There is no server 'gamma'. Configured: alpha, beta.\n"
    code, _, err = await run_command("status", "https://a.example/mcp", "--config", config)
    assert code == 2
    assert "not both" in err


# logout


async def test_logout_revokes_the_refresh_token_and_a_running_proxy_notices(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    # Revoked tokens still work here: only the proxy itself can make the request below ask for a login.
    authorization_server.answers["revoke"] = FakeResponse()
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.initialize())
        await consent(await proxy.next_link(1))
        assert "result" in (await call).message
        code, out, err = await run_command("logout", "notes", "--config", str(config))
        assert (code, err) == (0, "")
        assert out == f"notes: forgotten here and revoked at {authorization_server.issuer}\n"
        asking = asyncio.create_task(ask_until(client, lambda: len(proxy.links) == 2))
        await until(lambda: len(proxy.links) == 2, "a new link", timeout=5)
        await consent(proxy.links[1])
        await asking
    (request,) = authorization_server.seen("revoke")
    assert request.form["token_type_hint"] == "refresh_token"
    assert request.form["token"] in authorization_server.ledger.refresh_tokens


async def ask_until(client: PlainClient, condition: Callable[[], bool]) -> None:
    while not condition():
        assert "result" in (await client.initialize()).message


async def test_logout_with_the_authorization_server_down_forgets_and_says_what_is_left(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    await log_in(config)
    authorization_server.outage = FakeResponse.html("down", 503)
    code, out, err = await run_command("logout", "notes", "--config", str(config))
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert err.startswith("error: notes: forgotten here")
    assert f"not revoked at {authorization_server.issuer}" in err
    assert "503" in err
    assert "withdraw the access at the provider" in err
    assert await states(config) == {"notes": "not connected"}


async def test_logout_without_a_grant_is_not_a_failure(config: Path) -> None:
    code, out, _ = await run_command("logout", "notes", "--config", str(config))
    assert (code, out) == (0, "notes: nothing was connected.\n")


async def test_logout_can_forget_the_registration_even_without_a_grant(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    await log_in(config)
    assert (await run_command("logout", "notes", "--config", str(config)))[0] == 0
    await log_in(config)
    assert authorization_server.registrations == 1
    for _ in range(2):
        assert (await run_command("logout", "notes", "--forget-client", "--config", str(config)))[0] == 0
    await log_in(config)
    assert authorization_server.registrations == 2


async def test_logout_ends_a_flow_that_waits(config: Path) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.post("tools/list"))
        link = await proxy.next_link()
        assert (await run_command("logout", "notes", "--config", str(config)))[0] == 0
        answer = await asyncio.wait_for(call, 3)
        assert "error" in answer.message
        assert (await client.http.get(link)).status_code == 410


async def test_a_logout_is_not_undone_by_a_code_that_is_just_being_redeemed(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with (
        proxy_setup(servers, tmp_path, wait="20s", issuer={"gates": {"token": gate}}) as setup,
        Browser() as browser,
    ):
        call = asyncio.create_task(setup.ask())
        finishing = asyncio.create_task(browser.follow(await setup.proxy.next_link()))
        await until(lambda: setup.issuer.token_requests() == 1)
        assert (await run_command("logout", "notes", "--config", str(tmp_path / "mcp-auth-proxy.yaml")))[0] == 0
        assert "cancelled" in (await asyncio.wait_for(call, 5)).error["message"]
        gate.set()
        page = await finishing
        assert page.status_code == 400
        assert "cancelled" in page.text
        (revoked,) = setup.issuer.seen("revoke")
        assert revoked.form["token"] in setup.issuer.ledger.refresh_tokens
        assert await states(tmp_path / "mcp-auth-proxy.yaml") == {"notes": "not connected"}
        again = asyncio.create_task(setup.ask("again"))
        await consent(await setup.proxy.next_link(2))
        assert (await again).text == "again"


async def test_a_logout_is_not_undone_by_a_poll_in_progress(servers: Servers, tmp_path: Path) -> None:
    async with ExtensionServer.running() as issuer:
        gate = issuer.gates["token"] = asyncio.Event()
        upstream = await servers.mcp_server(issuer)
        config = {"notes": {"url": upstream.url, "oauth": {"grant": "device_code"}}}
        async with (
            running_proxy(tmp_path, config, authorization={"wait": "0s"}) as proxy,
            proxy.client("notes") as client,
        ):
            await client.call("echo")
            issuer.decide_device(next(iter(issuer.devices.values())).user_code)
            await until(lambda: issuer.polls == 1)
            assert (await run_command("logout", "notes", "--config", str(tmp_path / "mcp-auth-proxy.yaml")))[0] == 0
            gate.set()
            await until(lambda: issuer.revocations == 1, "what the poll brought is given back")
            assert await states(tmp_path / "mcp-auth-proxy.yaml") == {"notes": "not connected"}
            assert "/connect/" in str((await client.call("echo")).message)


# status


NO_GRANT = "notes  needs consent  no grant: not connected yet, or a server that asks for no authorization\n"


async def test_status_does_not_call_a_server_unconnected_that_asks_for_no_authorization(
    servers: Servers, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"notes": upstream.url})
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        assert (await client.call("echo", text="open")).text == "open"
        assert await run_command("status", "--config", str(config)) == (0, NO_GRANT, "")
        assert await states(config) == {"notes": "not connected"}


async def test_status_shows_what_is_connected_since_when_and_until_when(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        assert await run_command("status", "--config", str(config)) == (0, NO_GRANT, "")
        call = asyncio.create_task(client.initialize())
        await consent(await proxy.next_link())
        await call
        code, text, err = await run_command("status", "--config", str(config))
        assert (code, err) == (0, "")
        _, document, _ = await run_command("status", "--config", str(config), "--json")
        await until(lambda: proxy.err)
    (row,) = json.loads(document)
    assert (row["server"], row["state"], row["issuer"]) == ("notes", "connected", authorization_server.issuer)
    assert row["since"] < row["token_until"]
    assert row["renews_itself"] is True
    for part in ("notes  connected  since", row["since"], row["token_until"], authorization_server.issuer):
        assert part in text
    assert not [secret for secret in authorization_server.secrets() if secret in text + document]


async def test_status_says_why_a_login_is_needed_again(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    async with proxy_process(config, listen=listen_of(config)) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.initialize())
        await consent(await proxy.next_link())
        await call
        authorization_server.end_grants()
        call = asyncio.create_task(client.initialize())
        await proxy.next_link(2)
        _, text, _ = await run_command("status", "--config", str(config))
        assert text.startswith("notes  authorizing  ended: ")
        assert "invalid_grant" in text
        assert link_in((await call).message)


async def test_status_without_a_store_shows_nothing_and_creates_none(config: Path) -> None:
    before = sorted(config.parent.iterdir())
    assert await states(config) == {"notes": "not connected"}
    assert sorted(config.parent.iterdir()) == before
