"""``login``, ``logout``, ``status`` and ``grants assign`` where callers are identified, here and through the API."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from e2e.test_login import Login, free_port, listen_of
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import proxy_process, run_command, start_command, until, write_config
from fakes.team import add_member, post
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.models import Role
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.events import Events

LABEL = "me@work.example, workspace Acme"
KEYS: dict[str, Any] = {"inbound": {"mode": "api_key"}}


@pytest.fixture
def labeled(authorization_server: FakeAuthorizationServer) -> FakeAuthorizationServer:
    authorization_server.token_changes = {"user": {"email": "me@work.example"}, "workspace_name": "Acme"}
    return authorization_server


def written(folder: Path, upstream: FakeMcpServer, *, server: dict[str, Any] | None = None, **sections: Any) -> Path:
    entry = {"url": upstream.url, **(server or {})}
    return write_config(folder, {"notes": entry}, listen=f"127.0.0.1:{free_port()}", **sections)


@asynccontextmanager
async def begun(*arguments: str, **env: str) -> AsyncIterator[Login]:
    process = await start_command("login", *arguments, env=env)
    try:
        yield Login(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def command(config: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    return await run_command(*arguments, "--config", str(config), env=env)


async def consent_as(browser: Browser, origin: str, key: str, link: str) -> httpx2.Response:
    """Sign in with a key, and consent; return the last page."""
    assert (await post(browser, f"{origin}/sign-in", key=key, next="/")).status_code == 303
    return await browser.follow(link)


async def rows(config: Path, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = await command(config, "status", "--json", *arguments)
    assert (code, err) == (0, "")
    found: list[dict[str, Any]] = json.loads(out)
    return found


async def connect(config: Path, origin: str, key: str, *arguments: str) -> str:
    """Log in from a terminal, and consent in a browser; return what the command printed."""
    async with begun(*arguments, "--config", str(config)) as setup, Browser() as browser:
        page = await consent_as(browser, origin, key, await setup.link())
        assert page.status_code == 200, page.text
        code, out, err = await setup.end()
    assert code == 0, err
    return out


async def test_login_for_somebody_gives_a_link_that_only_they_can_open(
    labeled: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    anna, bob = await add_member(tmp_path, "anna"), await add_member(tmp_path, "bob")
    config = written(tmp_path, mcp_server, **KEYS)
    async with (
        proxy_process(config, listen=listen_of(config)) as proxy,
        begun("notes@work", "--as", "anna", "--config", str(config)) as setup,
        Browser() as hers,
        Browser() as his,
        Browser() as nobodys,
    ):
        link = await setup.link()
        assert (
            "Open this link to authorize notes@work: Its page asks for a sign-in: only anna can open it." in setup.out
        )
        first = await nobodys.open(link)
        assert (first.status_code, first.headers["location"].startswith("/sign-in?next=")) == (303, True)
        assert (await consent_as(his, proxy.origin, bob, link)).status_code == 403
        page = await consent_as(hers, proxy.origin, anna, link)
        assert f"connected as {LABEL}" in page.text
        assert f"connected as {LABEL}" in (await hers.follow(link)).text
        code, out, err = await setup.end()
        assert code == 0, err
        assert f"notes@work is connected as {LABEL}." in out
        assert "It offers 3 tools: " in out
        async with proxy.client("notes@work", headers={"authorization": f"Bearer {anna}"}) as client:
            assert (await client.call("echo", text="hers")).text == "hers"
        assert await proxy.stop() == 0
    (row,) = await rows(config)
    assert (row["server"], row["account"], row["principal"], row["label"]) == ("notes", "work", "anna", LABEL)
    assert (row["state"], row["needs_authorization"]) == ("connected", False)
    (row,) = await rows(config, "--as", "bob")
    assert (row["account"], row["principal"], row["state"], row["label"]) == ("default", "bob", "not connected", "")
    _, text, _ = await command(config, "status")
    assert text.startswith("notes@work  anna  connected  since")
    assert f" as {LABEL} by {labeled.issuer}" in text
    assert not [key for key in (anna, bob, *labeled.secrets()) if key in out + err + text + proxy.log]
    code, out, err = await command(config, "logout", "notes@work", "--as", "anna")
    assert (code, out, err) == (0, f"notes@work: forgotten here and revoked at {labeled.issuer}\n", "")
    code, out, err = await command(config, "logout", "notes@work", "--as", "anna")
    assert (code, out) == (0, "notes@work: nothing was connected.\n")


async def test_login_without_a_running_proxy_asks_for_the_sign_in_itself(
    authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    anna = await add_member(tmp_path, "anna")
    config = written(tmp_path, mcp_server, **KEYS)
    out = await connect(config, f"http://{listen_of(config)}", anna, "notes", "--as", "anna")
    assert "notes is connected." in out
    assert "It offers 3 tools: " in out
    code, out, _ = await command(config, "login", "notes", "--as", "anna")
    assert code == 0
    assert "A login for notes is stored already; `mcp-auth-proxy logout notes --as anna` forgets it." in out
    authorization_server.end_grants()
    (row,) = await rows(config)
    assert (row["principal"], row["state"]) == ("anna", "connected")


async def test_the_secrets_of_the_sign_in_are_not_done_without(mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    header = {"name": "X-User", "from": ["127.0.0.1/32"], "secret": "env:NOT_SET", "secret_header": "X-Secret"}
    await add_member(tmp_path, "anna")
    config = written(tmp_path, mcp_server, inbound={"mode": "trusted_header", "trusted_header": header})
    code, out, err = await command(config, "login", "notes", "--as", "anna")
    assert (code, out) == (1, "")
    assert err.rstrip().endswith("Start the proxy first.")


async def test_whose_account_it_is_has_to_be_said_if_it_is_somebodys(mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    await add_member(tmp_path, "anna")
    await add_member(tmp_path, "bob")
    config = written(tmp_path, mcp_server, server={"allow": ["b*"]}, **KEYS)
    for name in ("login", "logout"):
        code, out, err = await command(config, name, "notes")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "--as NAME" in err
        code, out, err = await command(config, name, "notes", "--as", "carl")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "There is no principal 'carl'" in err
        assert "`mcp-auth-proxy api-keys create carl`" in err
        code, out, err = await command(config, name, "notes@Work", "--as", "bob")
        assert (code, "is not SERVER@ACCOUNT" in err) == (2, True)
    code, _, err = await command(config, "login", "notes", "--as", "anna")
    assert (code, "servers.notes.allow" in err) == (1, True), err
    assert (await run_command("principals", "disable", "bob", "--config", str(config)))[0] == 0
    code, _, err = await command(config, "login", "notes", "--as", "bob")
    assert (code, "principals enable bob" in err) == (1, True), err
    _, out, _ = await command(config, "status", "--as", "anna")
    assert out == "there is nothing to show: no server is for this principal\n"


async def test_callers_that_are_not_identified_have_no_names(mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    config = written(tmp_path, mcp_server)
    for name in ("login", "logout", "status"):
        code, out, err = await command(config, name, "notes", "--as", "anna")
        assert (code, out, "leave --as out" in err) == (2, "", True)


async def test_a_second_account_is_logged_in_without_callers(
    labeled: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    config = written(tmp_path, mcp_server, server={"accounts": {"home": {}}})
    async with begun("notes@work", "--config", str(config)) as setup, Browser() as browser:
        assert (await browser.follow(await setup.link())).status_code == 200
        code, out, err = await setup.end()
    assert code == 0, err
    assert f"notes@work is connected as {LABEL}." in out
    found = await rows(config)
    assert [(row["account"], row["principal"], row["state"]) for row in found] == [
        ("home", "local", "not connected"),
        ("work", "local", "connected"),
    ]
    _, text, _ = await command(config, "status", "notes@work")
    assert text.startswith("notes@work  connected  since")
    assert len(text.splitlines()) == 1
    assert (await command(config, "logout", "notes@work"))[0] == 0


async def test_a_shared_grant_is_for_an_admin_to_give(
    authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    root, anna = await add_member(tmp_path, "root", role=Role.ADMIN), await add_member(tmp_path, "anna")
    config = written(tmp_path, mcp_server, server={"grant_owner": "shared"}, **KEYS)
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        out = await connect(config, proxy.origin, root, "notes")
        assert "only an admin can open it" in out
        async with proxy.client("notes", headers={"authorization": f"Bearer {anna}"}) as client:
            assert (await client.call("echo", text="shared")).text == "shared"
        env = {"PROXY_KEY": anna}
        far = ("--url", proxy.origin, "--api-key", "env:PROXY_KEY")
        code, _, err = await run_command("logout", "notes", *far, env=env)
        assert (code, "answers 403" in err) == (1, True)
        _, out, _ = await run_command("status", "--json", *far, env=env)
        assert [row["principal"] for row in json.loads(out)] == ["project:default"]
    assert [(row["principal"], row["state"]) for row in await rows(config)] == [("project:default", "connected")]
    _, text, _ = await command(config, "status")
    assert text.startswith("notes  shared  connected  since")
    assert (await command(config, "logout", "notes"))[0] == 0


# Through the API


async def test_the_commands_work_on_a_proxy_that_runs_elsewhere(
    labeled: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    served, here = tmp_path / "served", tmp_path / "here"
    served.mkdir()
    here.mkdir()
    anna = await add_member(served, "anna")
    config = written(served, mcp_server, **KEYS)
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        far = ("--url", f"{proxy.origin}/", "--api-key", "env:PROXY_KEY")
        env = {"PROXY_KEY": anna}
        code, out, err = await run_command("status", *far, env=env, cwd=here)
        assert (code, out, err) == (
            0,
            "notes  anna  needs consent  no grant: not connected yet, or a server that asks for no authorization\n",
            "",
        )
        async with begun("notes@work", *far, **env) as setup, Browser() as browser:
            link = await setup.link()
            assert "only anna can open it" in setup.out
            assert (await consent_as(browser, proxy.origin, anna, link)).status_code == 200
            code, said, err = await setup.end()
        assert code == 0, err
        assert f"notes@work is connected as {LABEL}." in said
        assert "It offers 3 tools: " in said
        code, again, _ = await run_command("login", "notes@work", *far, env=env)
        assert (code, "A login for notes@work is stored already" in again, "/connect/" in again) == (0, True, False)
        (file := here / "key").write_text(f"{anna}\n")
        code, out, err = await run_command(
            "status", "notes@work", "--json", "--url", proxy.origin, "--api-key", f"file:{file}"
        )
        assert (code, err) == (0, "")
        (row,) = json.loads(out)
        (local,) = [each for each in await rows(config) if each["account"] == "work"]
        assert row == local
        assert row["label"] == LABEL
        code, text, _ = await run_command("status", *far, env=env)
        (line,) = [each for each in text.splitlines() if each.startswith("notes@work  anna  connected ")]
        assert f" since {row['since']} as {LABEL} by" in line
        code, out, err = await run_command("logout", "notes@work", *far, env=env)
        assert (code, out, err) == (0, f"notes@work: forgotten there and revoked at {labeled.issuer}\n", "")
        code, out, _ = await run_command("logout", "notes@work", *far, env=env)
        assert (code, out) == (0, "notes@work: nothing was connected.\n")
        assert anna not in said + again + text + err + proxy.log
        assert list(here.iterdir()) == [file]


async def test_an_admin_sees_and_ends_the_grants_of_others_through_the_api(
    authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    root, anna = await add_member(tmp_path, "root", role=Role.ADMIN), await add_member(tmp_path, "anna")
    config = written(tmp_path, mcp_server, **KEYS)
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        await connect(config, proxy.origin, anna, "notes", "--as", "anna")
        far = ("--as", "anna", "--url", proxy.origin, "--api-key", "env:PROXY_KEY")
        _, text, _ = await run_command("status", *far, env={"PROXY_KEY": root})
        assert text.startswith("notes  anna  connected  since")
        code, _, err = await run_command("login", "notes", *far, env={"PROXY_KEY": root})
        assert (code, "leave --as out, and use the key of anna" in err) == (2, True)
        code, out, _ = await run_command("logout", "notes", *far, env={"PROXY_KEY": root})
        assert (code, out) == (0, f"notes: forgotten there and revoked at {authorization_server.issuer}\n")
    (row,) = await rows(config, "--as", "anna")
    assert row["state"] == "not connected"


async def test_the_key_of_this_user_works_if_callers_are_not_identified(
    mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    config = written(tmp_path, mcp_server)
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        far = ("--url", proxy.origin, "--api-key", f"file:{tmp_path / 'api-token'}")
        async with begun("notes", *far) as setup, Browser() as browser:
            assert (await browser.follow(await setup.link())).status_code == 200
            code, out, err = await setup.end()
        assert code == 0, err
        assert "sign-in" not in out
        _, text, _ = await run_command("status", *far)
        assert text.startswith("notes  connected  since")


async def test_what_goes_wrong_elsewhere_is_one_line_without_the_key(
    servers: Servers, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    anna = await add_member(tmp_path, "anna")
    config = written(tmp_path, mcp_server, **KEYS)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        closed = f"http://127.0.0.1:{sock.getsockname()[1]}"
    env = {"PROXY_KEY": anna, "WRONG_KEY": f"{anna[:-4]}aaaa", "EMPTY": " "}
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        here, website = proxy.origin, mcp_server.url.removesuffix("/mcp")
        cases = [
            (("status", "--url", here, "--api-key", "env:WRONG_KEY"), 1, "answers 401: "),
            (("status", "--url", closed, "--api-key", "env:PROXY_KEY"), 1, f"{closed} can't be reached: "),
            (("status", "--url", website, "--api-key", "env:PROXY_KEY"), 1, "admin.enabled"),
            (("login", "nope", "--url", here, "--api-key", "env:PROXY_KEY"), 2, "There are: notes."),
            (("status", "nope", "--url", here, "--api-key", "env:PROXY_KEY"), 2, "There are: notes."),
            (("status", "--url", here, "--api-key", anna), 2, "--api-key: must be env:NAME or file:PATH."),
            (("status", "--url", here, "--api-key", "env:NOT_SET"), 2, "'NOT_SET' is not set"),
            (("status", "--url", here, "--api-key", "env:EMPTY"), 2, "env:EMPTY has no key in it"),
            (("status", "--url", here, "--api-key", "file:/nowhere"), 2, "/nowhere can't be read"),
            (("status", "--url", "http://proxy.example", "--api-key", "env:PROXY_KEY"), 2, "must begin with https://"),
            (("status", "--url", "proxy.example", "--api-key", "env:PROXY_KEY"), 2, "must be an http:// or https://"),
        ]
        for arguments, expected, words in cases:
            code, out, err = await run_command(*arguments, env=env)
            assert (code, out, len(err.splitlines())) == (expected, "", 1), err
            assert words in err
            assert anna not in err
    for wrong in (
        ("status", "--url", here),
        ("status", "--api-key", "env:PROXY_KEY"),
        ("status", "--config", str(config), "--url", here, "--api-key", "env:PROXY_KEY"),
        ("logout", "notes", "--forget-client", "--url", here, "--api-key", "env:PROXY_KEY"),
        ("login", mcp_server.url, "--url", here, "--api-key", "env:PROXY_KEY"),
    ):
        code, _, err = await run_command(*wrong, env=env)
        assert (code, err.startswith("Usage: ")) == (2, True), err


async def test_a_login_elsewhere_ends_when_its_flow_is_cancelled(mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    anna = await add_member(tmp_path, "anna")
    config = written(tmp_path, mcp_server, **KEYS)
    async with proxy_process(config, listen=listen_of(config)) as proxy:
        env, far = {"PROXY_KEY": anna}, ("--url", proxy.origin, "--api-key", "env:PROXY_KEY")
        async with begun("notes", *far, **env) as setup:
            await setup.link()
            assert (await command(config, "logout", "notes", "--as", "anna"))[0] == 0
            code, _, err = await setup.end()
    assert (code, len(err.splitlines())) == (1, 1), err
    assert "cancelled" in err


# grants assign


async def test_grants_from_before_callers_were_identified_are_given_to_somebody(
    authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    port = free_port()
    servers: dict[str, Any] = {name: {"url": mcp_server.url} for name in ("notes", "other")}
    servers["team"] = {"url": mcp_server.url, "grant_owner": "shared"}
    config = write_config(tmp_path, servers, listen=f"127.0.0.1:{port}")
    for name in ("notes", "notes@work", "other", "team"):
        async with begun(name, "--config", str(config)) as setup, Browser() as browser:
            await browser.follow(await setup.link())
            assert (await setup.end())[0] == 0
    anna = await add_member(tmp_path, "anna")
    await add_member(tmp_path, "bob")
    config = write_config(tmp_path, servers, listen=f"127.0.0.1:{port}", **KEYS)
    assign = ("grants", "assign", "--from", "local", "--to")
    async with proxy_process(config, listen=f"127.0.0.1:{port}") as proxy:
        await until(lambda: "4 grants of 'local' are left" in proxy.log)
        assert "`mcp-auth-proxy grants assign --from local --to NAME|shared`" in proxy.log
        code, out, err = await command(config, *assign, "carl")
        assert (code, out, "api-keys create carl" in err) == (1, "", True)
        code, out, err = await command(config, *assign, "anna", "nope")
        assert (code, out, "There is no server 'nope'. There are: notes, other, team." in err) == (2, "", True)
        code, out, err = await command(config, *assign, "anna", "other")
        assert (code, out, err) == (0, "other: now of anna\n", "")
        code, out, err = await command(config, *assign, "shared")
        assert (code, out) == (1, "team: now shared\n")
        assert "notes: stays with local: its callers have grants of their own (servers.notes.grant_owner)" in err
        assert err.endswith("error: 2 of 3 grants could not be given to shared: see above.\n")
        await connect(config, proxy.origin, anna, "notes@work", "--as", "anna")
        code, out, err = await command(config, *assign, "anna")
        assert (code, out) == (1, "notes: now of anna\n")
        assert "notes@work: stays with local: anna has one already" in err
        before = authorization_server.authorizations
        for name in ("notes", "other", "team"):
            async with proxy.client(name, headers={"authorization": f"Bearer {anna}"}) as client:
                assert (await client.call("echo", text=name)).text == name
        assert authorization_server.authorizations == before
        assert await proxy.stop() == 0
    found = [(row["server"], row["account"], row["principal"]) for row in await rows(config)]
    assert found == [
        ("notes", "work", "local"),
        ("notes", "default", "anna"),
        ("notes", "work", "anna"),
        ("other", "default", "anna"),
        ("team", "default", "project:default"),
    ]
    code, out, _ = await command(config, *assign, "bob")
    assert (code, out) == (0, "notes@work: now of bob\n")
    database = await open_store(load(config).store)
    try:
        events, _ = await Events(database).page("default", before=None, count=50)
    finally:
        await database.close()
    given = [(event.server_name, event.target) for event in events if event.action == "grants.assign"]
    assert [server for server, _ in given] == ["notes", "notes", "team", "other"]
    assert given[0][1].endswith("/work")
    assert given[2][1] == "project:default/default"
    code, out, _ = await command(config, *assign, "bob")
    assert (code, out) == (0, "local has no grants\n")
    code, _, err = await command(config, "grants", "assign", "--from", "anna", "--to", "local")
    assert (code, "--to: must be a principal or 'shared'" in err) == (2, True)
    async with proxy_process(config, listen=f"127.0.0.1:{port}") as proxy:
        assert "grants of 'local'" not in proxy.log
