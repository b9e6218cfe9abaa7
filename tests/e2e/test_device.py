"""Authorization on another device (RFC 8628): the page with the code, polling, restart, and the terminal."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakes.extension_server import DEVICE_CODE, ExtensionServer
from fakes.fixtures import Servers
from fakes.headless import Browser, Page
from fakes.http_exchange import ABSENT, FakeResponse
from fakes.proxy import Sections, link_in, proxy_process, running_proxy, start_command, until, write_config
from fakes.proxy_setup import Clock

NOW: Sections = {"authorization": {"wait": "0s"}}


@pytest.fixture
async def issuer() -> AsyncIterator[ExtensionServer]:
    async with ExtensionServer.running() as server:
        yield server


def at(url: str, **oauth: Any) -> dict[str, dict[str, Any]]:
    return {"notes": {"url": url, "oauth": {"grant": "device_code", **oauth}}}


def user_code(issuer: ExtensionServer) -> str:
    """The code of the newest device authorization."""
    return list(issuer.devices.values())[-1].user_code


async def connected(url: str) -> str:
    """Open the page until it says that all is done."""
    async with Browser() as browser:
        for _ in range(200):
            page = await browser.open(url)
            if "is connected" in page.text:
                return page.text
            await asyncio.sleep(0.05)
    raise AssertionError("the page did not change")


async def test_the_page_shows_the_code_and_the_held_request_continues(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer, scopes=("read",))
    async with running_proxy(tmp_path, at(upstream.url), authorization={"wait": "20s"}) as proxy:
        clients = [proxy.client("notes") for _ in range(3)]
        calls = [asyncio.create_task(client.call("echo", text="x")) for client in clients for _ in range(3)]
        link = await proxy.next_link()
        async with Browser() as browser:
            page = await browser.open(link)
            assert page.status_code == 200
            assert user_code(issuer) in page.text
            for told in (upstream.url.removesuffix("/mcp"), issuer.issuer, "read"):  # T78
                assert f"<code>{told}</code>" in page.text
            assert "<script" not in page.text
            assert "frame-ancestors 'none'" in page.headers["content-security-policy"]  # T17
            there, _ = Page(page.text).links
            form = await browser.open(there)
            assert (await browser.submit(there, Page(form.text).forms[0], ("decision", "allow"))).status_code == 200
        assert [(await call).text for call in calls] == ["x"] * 9
        assert "close this tab" in await connected(link)
        for client in clients:
            await client.http.aclose()
    assert (issuer.device_requests, issuer.authorizations, len(proxy.links)) == (1, 0, 1)
    asked = issuer.seen("device_authorization")[0].form
    assert (asked["resource"], asked["scope"]) == (upstream.url, "read")
    assert all(request.form["resource"] == upstream.url for request in issuer.seen("token"))


async def test_the_proxy_registers_itself_for_device_codes(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
        await client.call("echo", text="x")
    asked = issuer.seen("register")[0].message
    assert asked["grant_types"] == [DEVICE_CODE, "refresh_token"]
    assert (asked["redirect_uris"], asked["response_types"]) == ([], [])


async def test_a_device_code_is_never_sent_again_after_its_tokens(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
        link = link_in((await client.call("echo", text="x")).message)
        issuer.decide_device(user_code(issuer))
        await connected(link)
        polls = issuer.polls
        for n in range(3):
            issuer.end_access_tokens()
            assert (await client.call("echo", text=str(n))).text == str(n)
        await connected(link)
    assert (issuer.polls, issuer.refreshes, issuer.device_requests) == (polls, 3, 1)
    assert not issuer.ledger.grants[-1].ended


async def test_a_flow_survives_a_restart_and_continues_without_a_request(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
        link = link_in((await client.call("echo", text="x")).message)
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
    code = user_code(issuer)
    issuer.decide_device(code)
    device_code = next(iter(issuer.devices))
    assert not [secret for secret in (code, device_code) if secret.encode() in stored]  # T45
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy:
        await connected(link.replace(link.partition("/connect")[0], proxy.origin))
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="in")).text == "in"
    assert (issuer.device_requests, proxy.links) == (1, [])


async def test_after_a_restart_the_link_is_the_same(servers: Servers, issuer: ExtensionServer, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(issuer)
    flows = []
    for _ in range(2):
        async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
            flows.append(link_in((await client.call("echo", text="x")).message).partition("/connect")[2])
    assert flows[0] == flows[1]
    assert issuer.device_requests == 1


async def test_near_its_end_a_code_is_replaced_and_either_lets_all_requests_continue(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    issuer.device_changes = {"expires_in": 30}
    upstream, clock = await servers.mcp_server(issuer), Clock()
    async with (
        running_proxy(tmp_path, at(upstream.url), clock=clock, authorization={"wait": "20s"}) as proxy,
        proxy.client("notes") as client,
    ):
        calls = [asyncio.create_task(client.call("echo", text="x")) for _ in range(3)]
        await proxy.next_link()
        calls.append(asyncio.create_task(client.call("echo", text="x")))
        clock.ahead += 28
        calls.append(asyncio.create_task(client.call("echo", text="x")))
        await proxy.next_link(2)
        issuer.decide_device(next(iter(issuer.devices.values())).user_code)
        assert [(await call).text for call in calls] == ["x"] * 5
    assert (issuer.device_requests, len(proxy.links)) == (2, 2)


async def test_a_slow_down_adds_five_seconds_between_polls(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    issuer.slow_downs = 1
    loop = asyncio.get_running_loop()
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
        await client.call("echo", text="x")
        await until(lambda: issuer.polls == 1, "the first poll")
        begun = loop.time()
        await until(lambda: issuer.polls == 2, "the second poll")
    assert loop.time() - begun > 5.5


async def test_a_refusal_is_reported_and_a_new_request_gets_a_new_code(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, at(upstream.url)) as proxy, proxy.client("notes") as client:
        call = asyncio.create_task(client.call("echo", text="x"))
        link = await proxy.next_link()
        issuer.decide_device(first := user_code(issuer), allowed=False)
        answer = await call
        assert "declined" in answer.error["message"]
        assert "/connect/" not in answer.error["message"]
        async with Browser() as browser:
            assert (await browser.open(link)).status_code == 410
        call = asyncio.create_task(client.call("echo", text="y"))
        await proxy.next_link(2)
        assert user_code(issuer) != first
        issuer.decide_device(user_code(issuer))
        assert (await call).text == "y"


async def test_polling_continues_after_an_outage(servers: Servers, issuer: ExtensionServer, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(issuer)
    wait = {"wait": "20s"}
    async with (
        running_proxy(tmp_path, at(upstream.url), authorization=wait) as proxy,
        proxy.client("notes") as client,
    ):
        call = asyncio.create_task(client.call("echo", text="x"))
        await proxy.next_link()
        issuer.answers["token"] = FakeResponse.html("down", 503, retry_after="1")
        issuer.decide_device(user_code(issuer))
        await until(lambda: issuer.polls > 0, "a poll")
        del issuer.answers["token"]
        assert (await call).text == "x"


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"verification_uri": "javascript:alert(1)"}, "verification_uri can't be used"),  # T5
        ({"verification_uri_complete": "file:///etc/passwd"}, "verification_uri_complete can't be used"),
        ({"verification_uri": ABSENT}, "it has no verification_uri"),
        ({"device_code": ""}, "it has no device_code"),
        ({"user_code": "x" * 100}, "too long"),
    ],
)
async def test_a_hostile_answer_is_refused_by_its_rule(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path, changes: dict[str, object], rule: str
) -> None:
    issuer.device_changes = changes
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
        answer = await client.call("echo", text="x")
    assert rule in answer.error["message"]
    assert "RFC 8628 §3.2" in answer.error["message"]
    assert (issuer.polls, proxy.links) == (0, [])


async def test_the_error_for_a_server_without_device_codes_names_the_key(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    issuer.metadata_changes = {"device_authorization_endpoint": ABSENT}
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, at(upstream.url), **NOW) as proxy, proxy.client("notes") as client:
        answer = await client.call("echo", text="x")
    assert "servers.notes.oauth.grant" in answer.error["message"]


async def log_in(config: Path, issuer: ExtensionServer) -> tuple[int, str]:
    """Run ``login``, use the code as soon as it is printed; return exit code and stdout."""
    process = await start_command("login", "notes", "--config", str(config))
    assert process.stdout is not None
    out = ""
    try:
        async with asyncio.timeout(30):
            while not (issuer.devices and user_code(issuer) in out):
                out += (await process.stdout.readline()).decode()
                assert process.returncode is None or out, "login ended without a word"
            issuer.decide_device(user_code(issuer))
            rest, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out + rest.decode()


async def test_login_prints_the_code_for_any_device(servers: Servers, issuer: ExtensionServer, tmp_path: Path) -> None:
    upstream = await servers.real_mcp_server(issuer)
    code, out = await log_in(write_config(tmp_path, at(upstream.url)), issuer)
    assert code == 0
    assert f"To authorize notes at {upstream.local.origin}" in out  # T78
    assert f"{issuer.issuer}/device\n" in out
    assert f"{issuer.issuer}/device?user_code={user_code(issuer)}" in out
    assert "/connect/" not in out
    assert "notes is connected." in out


async def test_login_shares_the_code_of_a_running_proxy_and_only_one_polls(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.real_mcp_server(issuer)
    config = write_config(tmp_path, at(upstream.url))
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        config.write_text(re.sub(r"127.0.0.1:0", proxy.origin.removeprefix("http://"), config.read_text()))
        held = asyncio.create_task(client.post("tools/list"))
        await proxy.next_link()
        assert (await log_in(config, issuer))[0] == 0
        assert (await held).status != 401
        issuer.end_access_tokens()
        assert (await client.post("tools/list")).status != 401
        assert user_code(issuer) in proxy.log
    assert issuer.device_requests == 1
    assert not issuer.ledger.grants[-1].ended
