"""Several processes on one store: one flow for each account and mode, one window, one registration."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.broker_setup import NOTES, BrokerSetup, broker_setup
from fakes.authorization_server import FakeAuthorizationServer
from fakes.headless import Browser
from fakes.proxy import until
from mcp_auth_proxy.broker import FlowRequest, PendingAuthorization, store_watch
from mcp_auth_proxy.errors import AddressRefused, AuthorizationDenied
from mcp_auth_proxy.models import Account, FlowMode
from mcp_auth_proxy.oauth import pasted_address

HEADLESS = FlowRequest(mode=FlowMode.HEADLESS)
WORK = Account("local", "notes", "work")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look every 20 ms."""
    monkeypatch.setattr(store_watch, "WATCH_INTERVAL", 0.02)


@pytest.fixture
async def another(setup: BrokerSetup, tmp_path: Path) -> AsyncIterator[BrokerSetup]:
    async with broker_setup(tmp_path, *setup.servers.values(), clock=setup.clock) as started:
        yield started


async def requested(
    setup: BrokerSetup, wanted: FlowRequest = HEADLESS, account: Account = NOTES
) -> tuple[PendingAuthorization, bool]:
    status, challenge = await setup.ask(account=account)
    outcome, new = await setup.broker.request_flow(account, wanted, status=status, challenge=challenge)
    assert isinstance(outcome, PendingAuthorization)
    return outcome, new


async def came_back(setup: BrokerSetup, pending: PendingAuthorization) -> str:
    """Sign in at the address of a headless flow; return the address of the redirect."""
    address = await setup.broker.authorization_url(pending.flow)
    assert address is not None
    async with Browser() as browser:
        return await browser.stop_before(address)


async def paste(setup: BrokerSetup, address: str, account: Account = NOTES) -> None:
    await setup.broker.complete_pasted(account, pasted_address.read(address, "http://127.0.0.1:8787/oauth/callback"))


async def test_processes_that_are_asked_at_once_share_one_flow(
    setup: BrokerSetup, another: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    outcomes = await asyncio.gather(*(each.pending() for each in (setup, another) for _ in range(6)))
    assert len({outcome.flow.id for outcome in outcomes}) == len({outcome.link for outcome in outcomes}) == 1
    assert len(setup.announced + another.announced) == 1
    assert (issuer.registrations, issuer.discoveries) == (1, 1)
    await setup.broker.complete(*await setup.callback(outcomes[0]))
    assert all([await outcome.wait(5) for outcome in outcomes])


async def test_processes_that_replace_an_old_link_at_once_share_the_new_one(
    setup: BrokerSetup, another: BrokerSetup
) -> None:
    old = [await each.pending() for each in (setup, another)]
    setup.clock.ahead += 550
    new = await asyncio.gather(setup.broker.fresh_link(old[0]), another.broker.fresh_link(old[1]))
    assert new[0].flow.id == new[1].flow.id != old[0].flow.id
    assert len(setup.announced + another.announced) == 2


async def test_callers_of_one_account_name_share_one_registration(
    setup: BrokerSetup, another: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    callers = [(each, Account(f"caller-{number}", "notes")) for number, each in enumerate((setup, setup, another))]
    flows = await asyncio.gather(*(each.pending(account) for each, account in callers))
    assert len({pending.flow.id for pending in flows}) == 3
    assert len({pending.flow.registration.client_id for pending in flows}) == issuer.registrations == 1


async def test_what_one_process_cannot_begin_the_next_tries(
    setup: BrokerSetup, another: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    gate = issuer.gates["register"] = asyncio.Event()
    first = asyncio.create_task(setup.pending())
    await until(lambda: issuer.registrations == 1, "a registration")
    second = asyncio.create_task(another.pending())
    first.cancel()
    await setup.broker.aclose()
    gate.set()
    assert (await second).made_here


async def test_a_grant_that_came_while_a_process_waited_for_its_turn_is_used(
    setup: BrokerSetup, another: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    gate = issuer.gates["metadata"] = asyncio.Event()
    first = asyncio.create_task(setup.pending())
    await until(lambda: issuer.discoveries == 1, "the first of two processes")
    second = asyncio.create_task(another.challenged())
    gate.set()
    pending = await first
    await setup.broker.complete(*await setup.callback(pending))
    outcome = await second
    token = await outcome.wait(5) if isinstance(outcome, PendingAuthorization) else outcome
    assert token is not None
    assert (await another.ask(token))[0] == 200
    assert another.announced == []


async def test_one_process_opens_the_window(setup: BrokerSetup, another: BrokerSetup) -> None:
    flow = (await setup.pending()).flow
    claims = await asyncio.gather(*(each.broker.claim_window(flow) for each in (setup, another) for _ in range(3)))
    # The process that has it may ask again.
    assert claims in ([True] * 3 + [False] * 3, [False] * 3 + [True] * 3)


async def test_each_mode_has_one_flow(setup: BrokerSetup, another: BrokerSetup) -> None:
    browser = await setup.pending()
    (first, new), (second, again) = await asyncio.gather(requested(setup), requested(another))
    assert first.flow.id == second.flow.id != browser.flow.id
    assert {new, again} == {True, False}
    for each in (setup, another):
        found, new = await requested(each, FlowRequest())
        assert (found.flow.id, new) == (browser.flow.id, False)
        found, new = await requested(each)
        assert (found.flow.id, new) == (first.flow.id, False)


async def test_a_page_hears_of_the_end_of_a_flow_that_was_there_before(
    setup: BrokerSetup, another: BrokerSetup
) -> None:
    pending = await setup.pending()
    told, new = await requested(another, FlowRequest(return_origin="https://app.example"))
    assert (told.flow.id, told.flow.return_origin, new) == (pending.flow.id, "https://app.example", False)
    stored = await setup.flows.get(pending.flow.id)
    assert stored is not None
    assert stored.return_origin == "https://app.example"
    other, new = await requested(setup, FlowRequest(return_origin="https://other.example"))
    assert (other.flow.id != pending.flow.id, new) == (True, True)


async def test_a_pasted_address_is_taken_once_and_lets_other_processes_continue(
    setup: BrokerSetup, another: BrokerSetup, issuer: FakeAuthorizationServer
) -> None:
    waiting = await another.pending()
    pending, _ = await requested(setup)
    address = await came_back(setup, pending)
    await paste(setup, address)
    assert await pending.wait(0) is not None
    assert await waiting.wait(5) is not None
    for each in (setup, another):
        with pytest.raises(AddressRefused, match="was used already"):
            await paste(each, address)
    assert issuer.token_requests() == 1


async def test_a_pasted_address_that_is_too_old_or_of_another_account_is_named(setup: BrokerSetup) -> None:
    pending, _ = await requested(setup)
    address = await came_back(setup, pending)
    with pytest.raises(AddressRefused, match="not ours"):
        await paste(setup, address, WORK)
    with pytest.raises(AddressRefused, match="not ours"):
        await paste(setup, address, Account("anna", "notes"))
    setup.clock.ahead += 700
    with pytest.raises(AddressRefused, match="too old"):
        await paste(setup, address)
    # Also after a start, which deletes old attempts.
    await setup.flows.purge(setup.clock())
    with pytest.raises(AddressRefused, match="too old"):
        await paste(setup, address)


async def test_a_pasted_address_without_the_promised_iss_is_asked_for_again(setup: BrokerSetup) -> None:
    pending, _ = await requested(setup)
    address = await came_back(setup, pending)
    with pytest.raises(AddressRefused, match="sends iss"):
        await paste(setup, address.partition("&iss=")[0])
    await paste(setup, address)


async def test_a_pasted_refusal_ends_the_flow(setup: BrokerSetup, issuer: FakeAuthorizationServer) -> None:
    issuer.authorize_error = ("access_denied", "The user said no.")
    pending, _ = await requested(setup)
    address = await came_back(setup, pending)
    with pytest.raises(AuthorizationDenied, match="access_denied"):
        await paste(setup, address)
    with pytest.raises(AddressRefused, match="has failed"):
        await paste(setup, address)


async def test_a_flow_whose_process_is_gone_is_not_waited_for_elsewhere(setup: BrokerSetup, tmp_path: Path) -> None:
    """Without one public_url each process has its own, and a link leads to the one that made it."""
    pending = await setup.pending()
    served = True
    async with broker_setup(
        tmp_path,
        *setup.servers.values(),
        clock=setup.clock,
        public_url="http://127.0.0.1:8788",
        is_served=lambda _: served,
    ) as other:
        assert (await other.pending()).link == pending.link
        served = False
        own = await other.pending()
        assert own.flow.id != pending.flow.id
        assert own.link.startswith("http://127.0.0.1:8788/connect/notes?flow=")
