"""Servers that are removed or changed while requests, flows, renewals and device polls are in progress."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from broker.scene import NOTES, BrokerScene, broker_scene, server
from fakes.authorization_server import FakeAuthorizationServer
from fakes.extension_server import ExtensionServer
from fakes.fixtures import Servers
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import until
from mcp_auth_proxy.broker import ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused
from mcp_auth_proxy.models import LOCAL, Account, FlowStatus, GrantType

GONE = r"^Server notes is no longer configured\.$"
CHANGED = "Server notes was reconfigured"


def remove(it: BrokerScene, name: str = "notes") -> None:
    del it.servers[name]
    it.broker.servers_changed(removed=[name], changed=[])


def change(it: BrokerScene, **values: object) -> ServerSettings:
    """Change the settings of ``notes``; return what they were."""
    before = it.servers["notes"]
    it.servers["notes"] = replace(before, **values)  # type: ignore[arg-type]
    it.broker.servers_changed(removed=[], changed=["notes"])
    return before


async def ended(it: BrokerScene, pending: PendingAuthorization) -> str:
    """Wait, bounded, until a flow has failed in the store; return the reason."""
    for _ in range(500):
        flow = await it.flows.get(pending.flow.id)
        assert flow is not None
        if flow.status is FlowStatus.FAILED:
            return flow.reason
    raise AssertionError("the flow still waits")


# Removed


async def test_requests_for_a_removed_server_get_a_clean_error(it: BrokerScene) -> None:
    token = await it.connect()
    status, challenge = await it.ask()
    remove(it)
    assert it.broker.token_nowait(NOTES) == (False, None)
    with pytest.raises(AuthorizationError, match=GONE):
        await it.broker.token(NOTES)
    with pytest.raises(AuthorizationError, match=GONE):
        await it.broker.challenged(NOTES, status=status, challenge=challenge, used=token, history=ChallengeHistory())
    with pytest.raises(AuthorizationError, match=GONE):
        await it.broker.authorize(NOTES, status=status, challenge=challenge)
    assert await it.broker.connections() == []


async def test_a_server_that_comes_back_has_its_grant_again(it: BrokerScene, issuer: FakeAuthorizationServer) -> None:
    await it.connect()
    before = it.servers["notes"]
    remove(it)
    it.servers["notes"] = before
    token = await it.broker.token(NOTES)
    assert token is not None
    assert (await it.ask(token))[0] == 200
    assert issuer.authorizations == 1


async def test_what_waits_for_a_removed_server_is_told_and_its_link_is_dead(it: BrokerScene) -> None:
    pending = await it.pending()
    callback = await it.callback(pending)
    waiting = asyncio.create_task(pending.wait(5))
    await asyncio.sleep(0)
    remove(it)
    with pytest.raises(AuthorizationDenied, match=GONE):
        await waiting
    assert it.broker.pending(NOTES) is None
    assert await ended(it, pending) == "Server notes is no longer configured."
    with pytest.raises(CallbackRefused):
        await it.broker.open_link("notes", pending.flow.id)
    with pytest.raises((CallbackRefused, AuthorizationError)):
        await it.broker.complete(*callback)
    assert await it.broker.fresh_link(pending) is pending


async def test_a_link_of_another_run_says_that_its_server_was_removed(it: BrokerScene, tmp_path: Path) -> None:
    pending = await it.pending()
    async with broker_scene(tmp_path) as another:
        with pytest.raises(AuthorizationError, match=GONE):
            await another.broker.open_link("notes", pending.flow.id)
        with pytest.raises(CallbackRefused):
            await another.broker.open_link("none", "unknown")


async def test_a_callback_for_a_server_removed_meanwhile_stores_no_token_in_use(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    pending = await it.pending()
    callback = await it.callback(pending)
    issuer.gates["token"] = gate = asyncio.Event()
    completing = asyncio.create_task(it.broker.complete(*callback))
    await issuer.log.wait_for(lambda received: received.endpoint == "token")
    remove(it)
    gate.set()
    with pytest.raises(AuthorizationError):
        await completing
    assert it.broker.token_nowait(NOTES) == (False, None)


async def test_a_discovery_in_progress_starts_no_flow_for_a_removed_server(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    issuer.gates["register"] = gate = asyncio.Event()
    asking = asyncio.create_task(it.challenged())
    await issuer.log.wait_for(lambda received: received.endpoint == "register")
    remove(it)
    gate.set()
    with pytest.raises(AuthorizationError, match=GONE):
        await asking
    assert it.announced == []
    assert await it.flows.live(NOTES, it.clock()) is None


async def test_a_renewal_in_progress_is_stored_but_its_token_is_not_used(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    token = await it.connect()
    issuer.end_access_tokens()
    issuer.gates["token"] = gate = asyncio.Event()
    status, challenge = await it.ask(token)
    renewing = asyncio.create_task(
        it.broker.challenged(NOTES, status=status, challenge=challenge, used=token, history=ChallengeHistory())
    )
    await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
    remove(it)
    gate.set()
    with pytest.raises(AuthorizationError, match=GONE):
        await renewing
    assert it.broker.token_nowait(NOTES) == (False, None)
    (grant,) = await it.grants.all()
    assert (grant.version, grant.ended_at) == (2, None)


async def test_the_timer_of_a_removed_server_is_stopped(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer = await servers.authorization_server(auto_consent=True, token_seconds=2.0)
    upstream = await servers.mcp_server(issuer)
    fired: list[Account] = []
    on_timer = TokenCache._on_timer

    def record(cache: TokenCache, account: Account, cached: object) -> None:
        fired.append(account)
        on_timer(cache, account, cached)  # type: ignore[arg-type]

    monkeypatch.setattr(TokenCache, "_on_timer", record)
    other = Account(LOCAL, "other")
    async with broker_scene(tmp_path, server(upstream.url), server(upstream.url, "other")) as it:
        await it.connect()
        await it.connect(other)
        remove(it)
        await until(lambda: issuer.refreshes == 1)
    assert fired == [other]


async def test_polling_for_a_removed_server_stops(servers: Servers, tmp_path: Path) -> None:
    async with ExtensionServer.running() as issuer:
        upstream = await servers.mcp_server(issuer)
        device = {"grant": GrantType.DEVICE_CODE}
        kept = Account(LOCAL, "kept")
        async with broker_scene(tmp_path, server(upstream.url, **device), server(upstream.url, "kept", **device)) as it:
            pending, other = await it.pending(), await it.pending(kept)
            remove(it)
            with pytest.raises(AuthorizationDenied, match=GONE):
                await pending.wait(0)
            for one in issuer.devices.values():
                issuer.decide_device(one.user_code)
            assert await other.wait(10) is not None
            polled = {request.form["device_code"] for request in issuer.seen("token")}
            assert other.flow.device is not None
            assert polled == {other.flow.device.device_code}


async def test_disconnecting_a_removed_server_deletes_and_says_why_nothing_was_revoked(it: BrokerScene) -> None:
    await it.connect()
    remove(it)
    (grant,) = (await it.broker.disconnect(NOTES)).grants
    assert grant.reason == "Server notes is no longer configured."
    assert await it.grants.all() == []


async def test_a_change_in_the_store_is_noticed_while_a_server_is_gone(
    it: BrokerScene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await it.connect()
    async with broker_scene(tmp_path, *it.servers.values()) as another:
        # This time the broker is not told.
        del it.servers["notes"]
        await another.broker.disconnect(NOTES)
        await until(lambda: it.broker.token_nowait(NOTES) == (False, None))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# Changed


async def test_a_changed_url_drops_the_token_and_the_old_url_brings_it_back(
    it: BrokerScene, servers: Servers, issuer: FakeAuthorizationServer
) -> None:  # T49
    await it.connect()
    elsewhere = await servers.mcp_server(issuer)
    before = change(it, url=elsewhere.url)
    assert it.broker.token_nowait(NOTES) == (False, None)
    assert await it.broker.token(NOTES) is None
    change(it, url=before.url)
    token = await it.broker.token(NOTES)
    assert token is not None
    assert (await it.ask(token))[0] == 200


async def test_a_change_that_does_not_concern_the_grant_keeps_token_and_flow(
    it: BrokerScene, issuer: FakeAuthorizationServer
) -> None:
    pending = await it.pending()
    change(it, upstream_timeout=7.0)
    assert it.broker.pending(NOTES) is pending
    await it.broker.complete(*await it.callback(pending))
    token = await it.broker.token(NOTES)
    change(it, upstream_timeout=8.0)
    assert it.broker.token_nowait(NOTES) == (True, token)


async def test_what_waits_for_a_changed_server_is_told_and_may_try_again(
    it: BrokerScene, servers: Servers, issuer: FakeAuthorizationServer
) -> None:
    pending = await it.pending()
    elsewhere = await servers.mcp_server(issuer)
    change(it, url=elsewhere.url)
    with pytest.raises(AuthorizationDenied, match=CHANGED):
        await pending.wait(0)
    token = await it.connect()
    assert (await it.ask(token))[0] == 200
    assert {request.bearer for request in elsewhere.calls()} == {None, token.header.decode().removeprefix("Bearer ")}


async def test_a_pinned_issuer_ends_what_waits_for_another(it: BrokerScene) -> None:
    pending = await it.pending()
    change(it, oauth=OAuthSettings(issuer="https://as.example"))
    with pytest.raises(AuthorizationDenied, match=CHANGED):
        await pending.wait(0)


async def test_a_renewal_in_progress_does_not_bring_the_token_to_another_url(
    it: BrokerScene, issuer: FakeAuthorizationServer, servers: Servers
) -> None:  # T49
    token = await it.connect()
    issuer.end_access_tokens()
    issuer.gates["token"] = gate = asyncio.Event()
    renewing = asyncio.create_task(it.challenged(token))
    await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
    elsewhere: FakeMcpServer = await servers.mcp_server(issuer)
    change(it, url=elsewhere.url)
    gate.set()
    # The challenge of the old server says nothing about the new one.
    with pytest.raises(AuthorizationError):
        await renewing
    assert await it.broker.token(NOTES) is None
    assert (await it.ask(await it.connect()))[0] == 200


async def test_other_servers_are_left_alone(servers: Servers, issuer: FakeAuthorizationServer, tmp_path: Path) -> None:
    urls = {name: (await servers.mcp_server(issuer)).url for name in ("notes", "one", "two")}
    one, two = Account(LOCAL, "one"), Account(LOCAL, "two")
    async with broker_scene(tmp_path, *(server(url, name) for name, url in urls.items())) as it:
        await it.connect()
        token, pending = await it.connect(one), await it.pending(two)
        remove(it)
        assert it.broker.token_nowait(one) == (True, token)
        assert it.broker.pending(two) is pending
