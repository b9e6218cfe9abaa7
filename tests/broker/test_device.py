"""Flows that end on another device: when a poll is sent, what its answer leads to, and what is never sent twice."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.broker_setup import NOTES, BrokerSetup, broker_setup, server
from fakes.extension_server import ExtensionServer
from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.proxy import until
from mcp_auth_proxy.broker import PendingAuthorization, device
from mcp_auth_proxy.broker.device import DENIALS
from mcp_auth_proxy.errors import AuthorizationDenied, StoreUnavailable
from mcp_auth_proxy.models import FlowStatus, Grant, GrantType
from mcp_auth_proxy.oauth import device_authorization
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants

PENDING = FakeResponse.json({"error": "authorization_pending"}, 400)


@pytest.fixture
async def issuer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ExtensionServer]:
    """An authorization server that may be polled every 20 ms: the shortest interval is too long for a test."""
    for bound in ("INTERVAL_MIN", "INTERVAL_MAX"):
        monkeypatch.setattr(device_authorization, bound, 0.02)
    monkeypatch.setattr(device, "SLOW_DOWN_STEP", 0.05)
    async with ExtensionServer.running() as server:
        yield server


@pytest.fixture
async def setup(servers: Servers, issuer: ExtensionServer, tmp_path: Path) -> AsyncIterator[BrokerSetup]:
    upstream = await servers.mcp_server(issuer)
    async with broker_setup(tmp_path, server(upstream.url, grant=GrantType.DEVICE_CODE)) as setup:
        yield setup


def allow(issuer: ExtensionServer) -> None:
    """Consent to the newest device authorization."""
    issuer.decide_device(list(issuer.devices.values())[-1].user_code)


async def test_the_link_shows_the_code_and_the_consent_brings_the_token(
    setup: BrokerSetup, issuer: ExtensionServer
) -> None:
    pending = await setup.pending()
    assert pending.flow.device is not None
    assert setup.announced == [(pending.flow, pending.link)]
    await until(lambda: issuer.polls >= 2, "two polls")
    assert not pending.done
    allow(issuer)
    token = await pending.wait(5)
    assert token is not None
    assert (await setup.ask(token))[0] == 200
    polls = issuer.polls
    assert await setup.broker.token(NOTES) is token
    flow = await setup.flows.get(pending.flow.id)
    assert flow is not None
    assert (flow.status, issuer.polls) == (FlowStatus.DONE, polls)


@pytest.mark.parametrize("error", ["access_denied", "expired_token", "server_made_this_up"])
async def test_a_refusal_ends_the_flow_with_its_reason(setup: BrokerSetup, issuer: ExtensionServer, error: str) -> None:
    issuer.answers["token"] = FakeResponse.json({"error": error}, 400)
    pending = await setup.pending()
    with pytest.raises(AuthorizationDenied, match=DENIALS.get(error, error)):
        await pending.wait(5)
    flow = await setup.flows.get(pending.flow.id)
    assert flow is not None
    assert flow.status is FlowStatus.FAILED
    assert DENIALS.get(error, error) in flow.reason
    assert setup.broker.pending(NOTES) is None


async def test_a_client_that_the_server_has_forgotten_is_registered_again(
    setup: BrokerSetup, issuer: ExtensionServer
) -> None:
    pending = await setup.pending()
    issuer.forget_clients()
    with pytest.raises(AuthorizationDenied):
        await pending.wait(5)
    assert isinstance(await setup.challenged(), PendingAuthorization)
    assert issuer.registrations == 2


async def test_a_code_that_nobody_used_in_time_is_not_polled_for_any_more(
    setup: BrokerSetup, issuer: ExtensionServer
) -> None:
    pending = await setup.pending()
    setup.clock.ahead += 3601
    with pytest.raises(AuthorizationDenied, match="not used in time"):
        await pending.wait(5)
    assert isinstance(await setup.challenged(), PendingAuthorization)
    assert issuer.device_requests == 2


async def test_a_server_that_asks_for_it_is_polled_less_often(setup: BrokerSetup, issuer: ExtensionServer) -> None:
    issuer.slow_downs = 3
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await setup.pending()
    await until(lambda: issuer.polls == 4, "four polls")
    # 20 ms, and 50 ms more after each slow_down (RFC 8628 §3.5).
    assert loop.time() - begun >= 0.02 + 0.07 + 0.12 + 0.17 - 0.02  # uvloop rounds its clock to milliseconds


async def test_a_server_that_does_not_answer_is_polled_again(
    setup: BrokerSetup, issuer: ExtensionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "INTERVAL_MAX", 0.05)
    down = iter([FakeResponse.html(status=503), FakeResponse.drop()])
    issuer.answers["token"] = lambda _: next(down, None)
    pending = await setup.pending()
    allow(issuer)
    assert await pending.wait(10) is not None
    assert issuer.polls == 3


async def test_a_poll_is_bounded_by_the_servers_retry_after(setup: BrokerSetup, issuer: ExtensionServer) -> None:
    issuer.answers["token"] = FakeResponse.too_many("60")
    pending = await setup.pending()
    await until(lambda: issuer.polls == 1, "a poll")
    assert await pending.wait(0.3) is None
    assert issuer.polls == 1


async def test_a_store_that_is_locked_for_a_moment_loses_no_tokens(
    setup: BrokerSetup, issuer: ExtensionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "SAVE_DELAYS", (0.01, 0.01))
    add, failures = Grants.add_from, 2

    async def locked(self: Grants, grant: Grant, flow_id: str) -> Grant | None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailable("It is locked.")
        return await add(self, grant, flow_id)

    monkeypatch.setattr(Grants, "add_from", locked)
    pending = await setup.pending()
    allow(issuer)
    assert await pending.wait(5) is not None
    assert (failures, len(await setup.grants.all())) == (0, 1)


async def test_a_store_that_stays_locked_is_an_error_and_the_code_is_not_sent_again_in_vain(
    setup: BrokerSetup, issuer: ExtensionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "SAVE_DELAYS", ())

    async def broken(self: Flows, *args: Any, **options: Any) -> bool:
        raise StoreUnavailable("It is locked.")

    monkeypatch.setattr(Flows, "claim_poll", broken)
    pending = await setup.pending()
    assert await pending.wait(0.2) is None
    assert issuer.polls == 0
    monkeypatch.undo()
    allow(issuer)
    assert await pending.wait(30) is not None


async def test_a_flow_that_is_cancelled_during_a_poll_gives_its_tokens_back(
    setup: BrokerSetup, issuer: ExtensionServer, tmp_path: Path
) -> None:
    issuer.gates["token"] = gate = asyncio.Event()
    pending = await setup.pending()
    allow(issuer)
    await issuer.log.wait_for(lambda received: received.endpoint == "token")
    async with broker_setup(tmp_path) as another:
        await another.flows.cancel(NOTES)
    gate.set()
    with pytest.raises(AuthorizationDenied, match="cancelled"):
        await pending.wait(5)
    await until(lambda: issuer.revocations == 1, "a revocation")
    assert await setup.grants.all() == []


async def test_another_process_does_not_poll_for_a_flow_that_this_one_polls_for(
    setup: BrokerSetup, issuer: ExtensionServer, tmp_path: Path
) -> None:
    pending = await setup.pending()
    assert pending.flow.device is not None
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        other = another.broker.pending(NOTES)
        assert other is not None
        assert other.flow.id == pending.flow.id
        allow(issuer)
        tokens = [await pending.wait(5), await other.wait(5)]
    assert None not in tokens
    codes = [request.form["device_code"] for request in issuer.seen("token")]
    assert codes.count(pending.flow.device.device_code) == len(codes)
    granted = [stored for stored in await setup.grants.all() if stored.ended_at is None]
    assert len(granted) == 1
    assert not issuer.ledger.grants[-1].ended


async def test_after_a_restart_the_stored_flow_is_polled_for_without_a_request(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    settings = server(upstream.url, grant=GrantType.DEVICE_CODE)
    async with broker_setup(tmp_path, settings) as first:
        pending = await first.pending()
    allow(issuer)
    async with broker_setup(tmp_path, settings) as again:
        resumed = again.broker.pending(NOTES)
        assert resumed is None or resumed.flow.id == pending.flow.id
        await until(lambda: again.broker.token_nowait(NOTES)[1] is not None, "a token")
    # A server that was changed meanwhile does not get the grant of the old one.
    changed = replace(settings, url="https://elsewhere.example/mcp")
    async with broker_setup(tmp_path, changed) as elsewhere:
        assert elsewhere.broker.pending(NOTES) is None
        assert await elsewhere.broker.token(NOTES) is None
