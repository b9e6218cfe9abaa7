"""What the proxy remembers of servers: asked for after each consent and at the first use of a grant, unnoticed."""

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.proxy import link_in, running_proxy, until, wait_until_stable, write_config
from fakes.proxy_setup import ProxySetup, proxy_setup
from fakes.unattended import connected
from mcp_auth_proxy.cli.account import logout
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.models import LOCAL, Account, Catalog
from mcp_auth_proxy.proxy import catalogs

NOTES = Account(LOCAL, "notes")
COLD = {"wait": "0s", "cold_start": True}
CATALOG_LOGGER = "mcp_auth_proxy.proxy.catalogs"


def setup_with(servers: Servers, folder: Path, **options: Any) -> AbstractAsyncContextManager[ProxySetup]:
    return proxy_setup(servers, folder, authorization=COLD, **options)


async def remembered(setup: ProxySetup, account: Account = NOTES) -> Catalog | None:
    application = setup.proxy.application
    return await application.catalogs.get(application.servers["notes"], account)


async def until_remembered(setup: ProxySetup, account: Account = NOTES, *, since: float = 0.0) -> Catalog:
    """Wait, bounded, until something newer is remembered."""
    for _ in range(500):
        found = await remembered(setup, account)
        if found is not None and found.fetched_at > since:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("nothing is remembered")


def lists(setup: ProxySetup) -> int:
    return len(setup.upstream.calls("tools/list"))


async def test_a_server_is_asked_after_a_consent_with_the_new_token(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path, upstream={"sessions_on": True}) as setup:
        assert (await consent(await setup.link())).status_code == 200
        found = await until_remembered(setup)
        assert set(found.initialize) == {"2025-11-25", "2025-06-18", "2025-03-26"}
        assert found.discover is not None
        assert [tool["name"] for tool in found.lists["tools"]] == ["echo", "count", "whoami"]
        application = setup.proxy.application
        assert await application.catalogs.tools_count(application.servers["notes"], NOTES) == 3
        (listed,) = setup.upstream.calls("tools/list")
        assert setup.upstream.find_token(listed.bearer) is not None
        # Its own sessions are gone again.
        await until(lambda: not setup.upstream.sessions)


async def test_another_consent_asks_again(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path) as setup:
        await setup.connect()
        first = await until_remembered(setup)
        setup.issuer.end_grants()
        setup.clock.ahead += 7200
        await setup.connect()
        await until_remembered(setup, since=first.fetched_at)
        assert lists(setup) == 2


async def test_a_renewed_token_and_further_requests_ask_for_nothing(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path) as setup:
        await setup.connect()
        await until_remembered(setup)
        setup.clock.ahead += 54
        await setup.ask()
        await until(lambda: setup.issuer.refreshes == 1)
        await setup.ask()
        assert lists(setup) == 1


async def test_after_a_start_what_is_stored_is_used(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path) as setup:
        await setup.connect()
        before = await until_remembered(setup)
        upstream = setup.upstream
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD) as proxy:
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="a")).text == "a"
            assert await wait_until_stable(lambda: len(upstream.calls("tools/list"))) == 1
        assert await proxy.application.catalogs.get(proxy.application.servers["notes"], NOTES) == before


async def test_the_first_use_of_a_grant_asks_if_nothing_is_remembered(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        assert await wait_until_stable(lambda: lists(setup)) == 0
        upstream = setup.upstream
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD) as proxy:
        assert not upstream.calls("tools/list")
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="a")).text == "a"
        await until(lambda: len(upstream.calls("tools/list")) == 1)


async def test_another_server_under_the_same_name_is_not_taken_for_it(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path) as setup:
        await setup.connect()
        await until_remembered(setup)
    other = await servers.mcp_server(setup.issuer)
    async with running_proxy(tmp_path, {"notes": other.url}, authorization=COLD) as proxy:
        assert await proxy.application.catalogs.get(proxy.application.servers["notes"], NOTES) is None


async def test_nobody_waits_for_a_slow_server(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with setup_with(servers, tmp_path) as setup:
        setup.upstream.answers["initialize"] = FakeResponse(gate=gate, status=500)
        await setup.connect()
        await until(lambda: setup.upstream.calls("initialize"))
        assert (await setup.ask("meanwhile")).text == "meanwhile"
    # The fetch is still waiting: the end of the proxy did not.
    assert setup.upstream.calls("initialize")[0].gone.is_set()
    gate.set()


async def test_a_failure_is_logged_once_and_not_repeated_before_the_next_consent(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with setup_with(servers, tmp_path) as setup:
        setup.upstream.answers["initialize"] = setup.upstream.answers["server/discover"] = FakeResponse(status=500)
        await setup.connect()
        await until(lambda: [record for record in caplog.records if record.name == CATALOG_LOGGER])
        (line,) = (record.getMessage() for record in caplog.records if record.name == CATALOG_LOGGER)
        assert line == "server notes: what it offers could not be remembered: it answers 500."
        assert (await setup.ask()).text == "x"
        assert await wait_until_stable(lambda: len(setup.upstream.calls("initialize"))) == 1
        setup.upstream.answers.clear()
        setup.issuer.end_grants()
        setup.clock.ahead += 7200
        await setup.connect()
        await until_remembered(setup)


async def test_a_new_token_that_does_not_work_is_logged_with_what_to_do(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with setup_with(servers, tmp_path) as setup:
        link = await setup.link()
        setup.upstream.endless_401 = True
        await consent(link)
        await until(lambda: [record for record in caplog.records if record.name == CATALOG_LOGGER])
        (line,) = (record.getMessage() for record in caplog.records if record.name == CATALOG_LOGGER)
        assert "it refuses the token (401)" in line
        assert "mcp-auth-proxy login notes" in line
        # No authorization has begun because of it, and one token was renewed.
        assert (setup.issuer.authorizations, setup.issuer.refreshes) == (1, 1)
        assert len(setup.proxy.links) == 1
        assert not any(secret in caplog.text for secret in setup.issuer.secrets())


async def test_answers_without_end_are_bounded(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path) as setup:
        tools = [{"name": f"tool-{number}", "description": "x" * 500} for number in range(600)]
        setup.upstream.answers["tools/list"] = lambda received: FakeResponse.json(
            {"jsonrpc": "2.0", "id": received.message["id"], "result": {"tools": tools, "nextCursor": "more"}}
        )
        await setup.connect()
        found = await until_remembered(setup)
        assert "tools" not in found.lists
        assert found.initialize
        assert lists(setup) == 2


async def test_what_is_nested_too_deep_is_not_remembered(servers: Servers, tmp_path: Path) -> None:
    async with setup_with(servers, tmp_path) as setup:
        deep = b"[" * 900 + b"]" * 900
        setup.upstream.answers["initialize"] = lambda received: FakeResponse(
            headers=(("content-type", "application/json"),),
            body=b'{"jsonrpc":"2.0","id":1,"result":{"capabilities":{},"x":%s}}' % deep,
        )
        await setup.connect()
        await until(lambda: setup.upstream.calls("initialize"))
        assert (await setup.ask()).text == "x"


async def test_a_grant_that_needs_no_user_is_not_asked_for(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path, authorization=COLD) as setup:
        assert (await setup.client.call("echo", text="a")).text == "a"
        assert await wait_until_stable(lambda: len(setup.upstream.calls("tools/list"))) == 0


async def test_a_consent_for_another_process_is_noticed(servers: Servers, tmp_path: Path) -> None:
    """Both serve one store; the second was asked, and its link was used at the first."""
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    connected_at_second: list[Account] = []
    (tmp_path / "a").mkdir()
    store = {"url": f"sqlite:///{tmp_path}/proxy.db", "keys": [f"file:{tmp_path}/proxy.key"]}
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD, store=store) as first,
        running_proxy(tmp_path / "a", {"notes": upstream.url}, authorization=COLD, store=store) as second,
        first.client("notes") as one,
        second.client("notes") as two,
    ):
        second.application.broker.on_connected(connected_at_second.append)
        link_in((await two.call("echo", text="x")).message)
        # Its own flow has ended there: only what was asked for is left.
        waiting = second.application.broker.pending(NOTES)
        assert waiting is not None
        await second.application.broker.cancel_flow(waiting.flow)
        await consent(link_in((await one.call("echo", text="x")).message))
        await until(lambda: connected_at_second == [NOTES])
        assert (await two.call("echo", text="y")).text == "y"
        await until(lambda: upstream.calls("tools/list"))
        assert await wait_until_stable(lambda: len(upstream.calls("tools/list"))) <= 2


async def test_logout_asks_for_nothing(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        upstream = setup.upstream
    settings = load(write_config(tmp_path, {"notes": upstream.url}, authorization=COLD), environ={})
    before = len(upstream.requests)
    assert await logout(settings, "notes", forget_client=False) == 0
    assert len(upstream.requests) == before


async def test_only_some_servers_are_asked_at_a_time(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "FETCHES", 2)
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    gate = asyncio.Event()
    upstream.answers["initialize"] = lambda received: FakeResponse(gate=gate, status=500)
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization=COLD) as proxy:
        for name in ("a", "b", "c"):
            async with proxy.client(f"notes@{name}") as client:
                await consent(link_in((await client.call("echo", text="x")).message))
        assert await wait_until_stable(lambda: len(upstream.calls("initialize"))) == 2
        gate.set()
        await until(lambda: len(upstream.calls("initialize")) == 3)


async def test_a_server_that_is_slow_keeps_nobody_from_asking_another(servers: Servers, tmp_path: Path) -> None:  # T90
    issuer = await servers.authorization_server(auto_consent=True)
    slow, good = await servers.mcp_server(issuer), await servers.mcp_server(issuer)
    gate = asyncio.Event()
    slow.answers["initialize"] = lambda received: FakeResponse(gate=gate, status=500)
    async with running_proxy(tmp_path, {"slow": slow.url, "good": good.url}, authorization=COLD) as proxy:
        for name in ("slow@a", "slow@b", "slow@c", "slow@d", "good"):
            async with proxy.client(name) as client:
                await consent(link_in((await client.call("echo", text="x")).message))
        await until(lambda: good.calls("tools/list"))
        assert len(slow.calls("initialize")) == catalogs.FETCHES_OF_SERVER
        gate.set()
