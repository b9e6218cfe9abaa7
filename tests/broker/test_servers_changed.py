"""Servers that are removed or changed while requests, flows, renewals and device polls are in progress."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from broker.broker_setup import NOTES, BrokerSetup, broker_setup, server
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


def remove(setup: BrokerSetup, name: str = "notes") -> None:
    del setup.servers[name]
    setup.broker.servers_changed(removed=[name], changed=[])


def change(setup: BrokerSetup, **values: object) -> ServerSettings:
    """Change the settings of ``notes``; return what they were."""
    before = setup.servers["notes"]
    setup.servers["notes"] = replace(before, **values)  # type: ignore[arg-type]
    setup.broker.servers_changed(removed=[], changed=["notes"])
    return before


async def ended(setup: BrokerSetup, pending: PendingAuthorization) -> str:
    """Wait, bounded, until a flow has failed in the store; return the reason."""
    for _ in range(500):
        flow = await setup.flows.get(pending.flow.id)
        assert flow is not None
        if flow.status is FlowStatus.FAILED:
            return flow.reason
    raise AssertionError("the flow still waits")


# Removed


async def test_requests_for_a_removed_server_get_a_clean_error(setup: BrokerSetup) -> None:
    token = await setup.connect()
    status, challenge = await setup.ask()
    before = setup.servers["notes"]
    remove(setup)
    assert setup.broker.token_nowait(NOTES) == (False, None)
    with pytest.raises(AuthorizationError, match=GONE):
        await setup.broker.token(NOTES)
    with pytest.raises(AuthorizationError, match=GONE):
        await setup.broker.challenged(
            NOTES, sent_to=before, status=status, challenge=challenge, used=token, history=ChallengeHistory()
        )
    with pytest.raises(AuthorizationError, match=GONE):
        await setup.broker.authorize(NOTES, status=status, challenge=challenge)
    assert await setup.broker.connections() == []


async def test_a_server_that_comes_back_has_its_grant_again(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    await setup.connect()
    before = setup.servers["notes"]
    remove(setup)
    setup.servers["notes"] = before
    token = await setup.broker.token(NOTES)
    assert token is not None
    assert (await setup.ask(token))[0] == 200
    assert issuer.authorizations == 1


async def test_requests_that_wait_for_a_removed_server_get_the_reason_and_its_link_ends(setup: BrokerSetup) -> None:
    pending = await setup.pending()
    callback = await setup.callback(pending)
    waiting = asyncio.create_task(pending.wait(5))
    await asyncio.sleep(0)
    remove(setup)
    with pytest.raises(AuthorizationDenied, match=GONE):
        await waiting
    assert setup.broker.pending(NOTES) is None
    assert await ended(setup, pending) == "Server notes is no longer configured."
    with pytest.raises(CallbackRefused):
        await setup.broker.open_link("notes", pending.flow.id)
    with pytest.raises((CallbackRefused, AuthorizationError)):
        await setup.broker.complete(*callback)
    assert await setup.broker.fresh_link(pending) is pending


async def test_a_link_of_another_run_says_that_its_server_was_removed(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    async with broker_setup(tmp_path) as another:
        with pytest.raises(AuthorizationError, match=GONE):
            await another.broker.open_link("notes", pending.flow.id)
        with pytest.raises(CallbackRefused):
            await another.broker.open_link("none", "unknown")


async def test_a_callback_for_a_server_removed_meanwhile_stores_no_token_in_use(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    pending = await setup.pending()
    callback = await setup.callback(pending)
    issuer.gates["token"] = gate = asyncio.Event()
    completing = asyncio.create_task(setup.broker.complete(*callback))
    await issuer.log.wait_for(lambda received: received.endpoint == "token")
    remove(setup)
    gate.set()
    with pytest.raises(AuthorizationError):
        await completing
    assert setup.broker.token_nowait(NOTES) == (False, None)


async def test_a_discovery_in_progress_starts_no_flow_for_a_removed_server(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    issuer.gates["register"] = gate = asyncio.Event()
    asking = asyncio.create_task(setup.challenged())
    await issuer.log.wait_for(lambda received: received.endpoint == "register")
    remove(setup)
    gate.set()
    with pytest.raises(AuthorizationError, match=GONE):
        await asking
    assert setup.announced == []
    assert await setup.flows.live(NOTES, setup.clock()) is None


async def test_a_renewal_in_progress_is_stored_but_its_token_is_not_used(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    token = await setup.connect()
    issuer.end_access_tokens()
    issuer.gates["token"] = gate = asyncio.Event()
    status, challenge = await setup.ask(token)
    renewing = asyncio.create_task(
        setup.broker.challenged(
            NOTES,
            sent_to=setup.servers["notes"],
            status=status,
            challenge=challenge,
            used=token,
            history=ChallengeHistory(),
        )
    )
    await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
    remove(setup)
    gate.set()
    with pytest.raises(AuthorizationError, match=GONE):
        await renewing
    assert setup.broker.token_nowait(NOTES) == (False, None)
    (grant,) = await setup.grants.all()
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
    async with broker_setup(tmp_path, server(upstream.url), server(upstream.url, "other")) as setup:
        await setup.connect()
        await setup.connect(other)
        remove(setup)
        await until(lambda: issuer.refreshes == 1)
    # A timer may fire some microseconds early by the clock of the broker, and is then set again.
    assert set(fired) == {other}


async def test_polling_for_a_removed_server_stops(servers: Servers, tmp_path: Path) -> None:
    async with ExtensionServer.running() as issuer:
        upstream = await servers.mcp_server(issuer)
        device = {"grant": GrantType.DEVICE_CODE}
        kept = Account(LOCAL, "kept")
        async with broker_setup(
            tmp_path, server(upstream.url, **device), server(upstream.url, "kept", **device)
        ) as setup:
            pending, other = await setup.pending(), await setup.pending(kept)
            remove(setup)
            with pytest.raises(AuthorizationDenied, match=GONE):
                await pending.wait(0)
            for one in issuer.devices.values():
                issuer.decide_device(one.user_code)
            assert await other.wait(10) is not None
            polled = {request.form["device_code"] for request in issuer.seen("token")}
            assert other.flow.device is not None
            assert polled == {other.flow.device.device_code}


async def test_disconnecting_a_removed_server_deletes_and_says_why_nothing_was_revoked(setup: BrokerSetup) -> None:
    await setup.connect()
    remove(setup)
    (grant,) = (await setup.broker.disconnect(NOTES)).grants
    assert grant.reason == "Server notes is no longer configured."
    assert await setup.grants.all() == []


async def test_a_change_in_the_store_is_noticed_while_a_server_is_gone(
    setup: BrokerSetup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await setup.connect()
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        # This time servers_changed is not called.
        del setup.servers["notes"]
        await another.broker.disconnect(NOTES)
        await until(lambda: setup.broker.token_nowait(NOTES) == (False, None))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# Changed


async def test_a_changed_url_drops_the_token_and_the_old_url_brings_it_back(
    setup: BrokerSetup, servers: Servers, issuer: FakeAuthorizationServer
) -> None:  # T49
    await setup.connect()
    elsewhere = await servers.mcp_server(issuer)
    before = change(setup, url=elsewhere.url)
    assert setup.broker.token_nowait(NOTES) == (False, None)
    assert await setup.broker.token(NOTES) is None
    change(setup, url=before.url)
    token = await setup.broker.token(NOTES)
    assert token is not None
    assert (await setup.ask(token))[0] == 200


async def test_a_change_that_does_not_concern_the_grant_keeps_token_and_flow(
    setup: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    pending = await setup.pending()
    change(setup, upstream_timeout=7.0)
    assert setup.broker.pending(NOTES) is pending
    await setup.broker.complete(*await setup.callback(pending))
    token = await setup.broker.token(NOTES)
    change(setup, upstream_timeout=8.0)
    assert setup.broker.token_nowait(NOTES) == (True, token)


async def test_requests_that_wait_for_a_changed_server_get_the_reason_and_may_try_again(
    setup: BrokerSetup, servers: Servers, issuer: FakeAuthorizationServer
) -> None:
    pending = await setup.pending()
    elsewhere = await servers.mcp_server(issuer)
    change(setup, url=elsewhere.url)
    with pytest.raises(AuthorizationDenied, match=CHANGED):
        await pending.wait(0)
    token = await setup.connect()
    assert (await setup.ask(token))[0] == 200
    assert {request.bearer for request in elsewhere.calls()} == {None, token.header.decode().removeprefix("Bearer ")}


async def test_a_pinned_issuer_ends_flows_of_another(setup: BrokerSetup) -> None:
    pending = await setup.pending()
    change(setup, oauth=OAuthSettings(issuer="https://as.example"))
    with pytest.raises(AuthorizationDenied, match=CHANGED):
        await pending.wait(0)


async def test_a_renewal_in_progress_does_not_bring_the_token_to_another_url(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, servers: Servers
) -> None:  # T49
    token = await setup.connect()
    issuer.end_access_tokens()
    issuer.gates["token"] = gate = asyncio.Event()
    renewing = asyncio.create_task(setup.challenged(token))
    await issuer.log.wait_for(lambda received: received.form.get("grant_type") == "refresh_token")
    elsewhere: FakeMcpServer = await servers.mcp_server(issuer)
    change(setup, url=elsewhere.url)
    gate.set()
    # The challenge of the old server says nothing about the new one.
    with pytest.raises(AuthorizationError):
        await renewing
    assert await setup.broker.token(NOTES) is None
    assert (await setup.ask(await setup.connect()))[0] == 200


async def test_the_challenge_of_the_old_url_starts_no_discovery_for_the_new_one(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, upstream: FakeMcpServer, servers: Servers
) -> None:  # T49
    token = await setup.connect()
    status, challenge = await setup.ask()
    seen = len(upstream.requests), len(issuer.log.requests)
    elsewhere = await servers.mcp_server(issuer)
    before = change(setup, url=elsewhere.url)
    with pytest.raises(AuthorizationError, match="its url leads elsewhere now"):
        await setup.broker.challenged(
            NOTES, sent_to=before, status=status, challenge=challenge, used=token, history=ChallengeHistory()
        )
    with pytest.raises(AuthorizationError, match="its url leads elsewhere now"):
        setup.broker.check_origin(before)
    assert (len(upstream.requests), len(issuer.log.requests), elsewhere.requests) == (*seen, [])
    change(setup, url=before.url + "?another=query")
    setup.broker.check_origin(before)


async def test_other_servers_are_left_alone(servers: Servers, issuer: FakeAuthorizationServer, tmp_path: Path) -> None:
    urls = {name: (await servers.mcp_server(issuer)).url for name in ("notes", "one", "two")}
    one, two = Account(LOCAL, "one"), Account(LOCAL, "two")
    async with broker_setup(tmp_path, *(server(url, name) for name, url in urls.items())) as setup:
        await setup.connect()
        token, pending = await setup.connect(one), await setup.pending(two)
        remove(setup)
        assert setup.broker.token_nowait(one) == (True, token)
        assert setup.broker.pending(two) is pending
