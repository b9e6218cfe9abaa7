"""What ``login`` and ``status`` make of a store: a grant that the server refuses, a link that waits, ``serve URL``."""

import asyncio
import json
import re
from pathlib import Path

import pytest

from e2e.test_login import free_port, log_in, login
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import RealMcpServer, Servers
from fakes.headless import consent, decline
from fakes.mcp_client import PlainClient
from fakes.proxy import link_in, proxy_process, run_command, serving, write_config
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.broker.flows import FLOW_LIFETIME

WAIT = {"wait": "0s", "open_browser": "never"}


@pytest.fixture
def config(tmp_path: Path, real_mcp_server: RealMcpServer) -> Path:
    return write_config(tmp_path, {"notes": real_mcp_server.url}, listen=f"127.0.0.1:{free_port()}", authorization=WAIT)


async def test_login_gives_a_link_if_the_server_refuses_the_stored_grant(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    await log_in(config)
    authorization_server.end_grants()
    async with login("notes", config) as setup:
        page = await consent(await setup.link())
        assert page.status_code == 200
        code, out, err = await setup.end()
    assert code == 0, err
    assert "notes no longer accepts the login that is stored." in out
    assert "notes is connected." in out
    assert "stored already" not in out
    assert "It offers 6 tools" in out
    assert authorization_server.authorizations == 2


async def test_login_renews_a_stored_grant_whose_access_token_is_refused(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    await log_in(config)
    assert authorization_server.end_access_tokens() == 1
    code, out, err = await run_command("login", "notes", "--config", str(config))
    assert code == 0, err
    assert "stored already" in out
    assert "/connect/" not in out
    assert "It offers 6 tools" in out
    assert (authorization_server.refreshes, authorization_server.authorizations) == (1, 1)


async def test_status_shows_the_link_of_the_last_call_and_asks_nobody(
    config: Path, authorization_server: FakeAuthorizationServer
) -> None:
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        link = link_in((await client.initialize()).message)
        before = len(authorization_server.requests)
        assert await run_command("status", "--config", str(config)) == (
            0,
            f"notes  authorizing  needs authorization: {link}\n",
            "",
        )
        _, document, _ = await run_command("status", "--json", "--config", str(config))
        (row,) = json.loads(document)
        assert (row["state"], row["authorization_url"]) == ("not connected", link)
        assert len(authorization_server.requests) == before
        await consent(link)
        assert "result" in (await client.initialize()).message
        _, text, _ = await run_command("status", "--config", str(config))
        assert text.startswith("notes  connected  since")
        assert "/connect/" not in text
        authorization_server.end_grants()
        link = link_in((await client.initialize()).message)
        _, text, _ = await run_command("status", "--config", str(config))
        assert text.startswith("notes  authorizing  ")
        assert text.endswith(f"; needs authorization: {link}\n")
        assert await proxy.stop() == 0


async def test_status_goes_on_to_say_that_authorization_is_needed_when_the_link_has_expired(
    servers: Servers, tmp_path: Path
) -> None:
    config = tmp_path / "mcp-auth-proxy.yaml"
    async with proxy_setup(servers, tmp_path) as setup:
        setup.clock.ahead = -FLOW_LIFETIME
        await setup.link()
        needed = "notes  needs consent  needs authorization: run `mcp-auth-proxy login notes`\n"
        assert await run_command("status", "--config", str(config)) == (0, needed, "")
        _, document, _ = await run_command("status", "--json", "--config", str(config))
        (row,) = json.loads(document)
        assert (row["state"], row["needs_authorization"]) == ("not connected", True)
        assert "authorization_url" not in row
        await setup.connect()
        _, text, _ = await run_command("status", "--config", str(config))
        # By the clock of this process, the token has expired.
        assert text.startswith("notes  expired  since")
        assert "needs" not in text


async def test_status_says_why_the_last_authorization_failed(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"auto_consent": False}) as setup:
        await decline(await setup.link())
        _, text, _ = await run_command("status", "--config", str(tmp_path / "mcp-auth-proxy.yaml"))
        assert text.startswith(
            "notes  needs consent  needs authorization: run `mcp-auth-proxy login notes`; the last one failed: "
        )
        assert "access_denied" in text


async def test_a_bare_status_finds_the_store_of_serve_with_a_url(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(await servers.authorization_server(auto_consent=True))
    env = {
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "HOME": str(tmp_path),
        "MCP_AUTH_PROXY_CONFIG": None,
        "CI": "1",
    }
    code, _, err = await run_command("status", env=env, cwd=tmp_path)
    assert (code, "No configuration was found" in err) == (2, True)
    async with serving(upstream.url, "--listen", "127.0.0.1:0", env=env, cwd=tmp_path) as proxy:
        (name,) = re.findall(rf"{proxy.origin}/([^/]+)/mcp +->", proxy.out)
        code, out, err = await run_command("status", env=env, cwd=tmp_path)
        assert (code, out) == (0, "nothing is connected, and no authorization waits for you\n")
        assert f"a proxy serves it at {proxy.origin}" in err
        async with PlainClient(f"{proxy.origin}/mcp") as client:
            answer = asyncio.create_task(client.call("echo", text="x"))
            link = await proxy.next_link()
            code, out, _ = await run_command("status", env=env, cwd=tmp_path)
            assert (code, out) == (0, f"{name}  authorizing  needs authorization: {link}\n")
            await consent(link)
            await answer
        assert await proxy.stop() == 0
    code, out, _ = await run_command("status", name, "--json", env=env, cwd=tmp_path)
    assert (code, [(row["server"], row["url"], row["state"]) for row in json.loads(out)]) == (
        0,
        [(name, upstream.url, "connected")],
    )
    code, out, err = await run_command("status", "other", env=env, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "There is no server 'other': no configuration was found" in err
    assert err.rstrip().endswith(f"known from `mcp-auth-proxy serve URL`: {name}")
