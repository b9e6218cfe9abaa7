"""Flows and their attempts, each of which is accepted once."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import Account, FlowStatus
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.flows import CANCELLED, KEPT_ATTEMPTS, KEPT_SECONDS, KEPT_UNANSWERED_SECONDS, Flows
from store.builders import NOW, attempt, flow, registration, sha256, store_settings


@pytest.fixture
def flows(engine: Engine) -> Flows:
    return Flows(engine)


async def test_a_flow_comes_back_as_it_was_saved(flows: Flows) -> None:
    await flows.save(flow())
    assert await flows.get("flow-1") == flow()
    assert await flows.get("other") is None
    await flows.save(replace(flow(), scopes=("read", "more")))
    assert await flows.get("flow-1") == replace(flow(), scopes=("read", "more"))


async def test_a_flow_and_its_attempts_survive_a_restart(tmp_path: Path) -> None:
    for step in range(2):
        engine = await open_store(store_settings(tmp_path))
        flows = Flows(engine)
        if step == 0:
            await flows.save(flow())
            assert await flows.add_attempt(attempt("s"))
        else:
            assert await flows.take_attempt(sha256("s"), NOW) == (flow(), attempt("s"))
        await engine.close()


async def test_live_is_the_newest_that_still_waits(flows: Flows) -> None:
    await flows.save(flow("old"))
    await flows.save(flow("new", at=NOW + 10))
    await flows.save(flow("other-server", "warehouse", at=NOW + 20))
    assert await flows.live(Account("local", "linear"), NOW + 11) == flow("new", at=NOW + 10)
    assert await flows.finish("new", FlowStatus.DONE)
    assert await flows.live(Account("local", "linear"), NOW + 11) == flow("old")
    assert await flows.live(Account("local", "linear"), NOW + 600) is None
    assert await flows.live(Account("someone", "linear"), NOW) is None


async def test_each_account_of_a_server_has_flows_of_its_own(flows: Flows) -> None:
    work = Account("local", "linear", "work")
    client = registration(account="work")
    of_work = replace(flow("work", at=NOW + 10), key=replace(flow().key, account=work), registration=client)
    await flows.save(flow())
    await flows.save(of_work)
    assert await flows.live(Account("local", "linear"), NOW) == flow()
    assert await flows.live(work, NOW) == of_work
    await flows.cancel(work)
    assert await flows.live(work, NOW) is None
    assert await flows.live(Account("local", "linear"), NOW) == flow()


async def test_an_attempt_is_taken_once(flows: Flows) -> None:  # T12
    await flows.save(flow())
    await flows.add_attempt(attempt("s"))
    assert await flows.find_attempt(sha256("s")) == (flow(), attempt("s"))
    taken = await asyncio.gather(*(flows.take_attempt(sha256("s"), NOW) for _ in range(10)))
    assert [found for found in taken if found] == [(flow(), attempt("s"))]
    assert await flows.find_attempt(sha256("s")) is None


async def test_an_unknown_or_expired_attempt_is_not_taken(flows: Flows) -> None:  # T12, T14
    await flows.save(flow())
    await flows.add_attempt(attempt("s"))
    assert await flows.take_attempt(sha256("other"), NOW) is None
    assert await flows.find_attempt(sha256("other")) is None
    assert await flows.take_attempt(sha256("s"), NOW + 600) is None
    assert await flows.take_attempt(sha256("s"), NOW + 599)


async def test_a_flow_that_ended_has_no_attempts(flows: Flows) -> None:
    await flows.save(flow())
    await flows.add_attempt(attempt("s"))
    assert await flows.finish("flow-1", FlowStatus.FAILED, "denied")
    assert await flows.take_attempt(sha256("s"), NOW) is None
    assert not await flows.add_attempt(attempt("t"))
    assert not await flows.add_attempt(attempt("t", "never-saved"))
    assert not await flows.finish("flow-1", FlowStatus.DONE)
    ended = await flows.get("flow-1")
    assert ended is not None
    assert (ended.status, ended.reason) == (FlowStatus.FAILED, "denied")


async def test_the_oldest_and_the_newest_attempts_are_kept(flows: Flows) -> None:
    await flows.save(flow())
    for number in range(KEPT_ATTEMPTS + 5):
        assert await flows.add_attempt(attempt(f"s{number}", at=NOW + number))
    lost = [number for number in range(KEPT_ATTEMPTS + 5) if not await flows.find_attempt(sha256(f"s{number}"))]
    assert lost == list(range(KEPT_ATTEMPTS // 2, KEPT_ATTEMPTS // 2 + 5))
    assert await flows.add_attempt(attempt("backwards", at=NOW - 3600))
    assert await flows.find_attempt(sha256("backwards"))


async def test_cancel_ends_what_is_pending(flows: Flows) -> None:
    await flows.save(flow())
    await flows.save(flow("other-server", "warehouse"))
    await flows.add_attempt(attempt("s"))
    await flows.cancel(Account("local", "linear"))
    ended = await flows.get("flow-1")
    assert ended is not None
    assert (ended.status, ended.reason) == (FlowStatus.FAILED, CANCELLED)
    assert await flows.find_attempt(sha256("s")) is None
    assert await flows.live(Account("local", "warehouse"), NOW)


async def test_purge_deletes_attempts_in_time_and_flows_later(flows: Flows) -> None:
    await flows.save(flow())
    await flows.add_attempt(attempt("s"))
    await flows.purge(NOW + 599)
    assert await flows.find_attempt(sha256("s"))
    await flows.purge(NOW + 600)
    assert await flows.find_attempt(sha256("s")) is None
    assert await flows.get("flow-1")
    await flows.finish("flow-1", FlowStatus.DONE)
    await flows.purge(NOW + 600 + KEPT_SECONDS - 1)
    assert await flows.get("flow-1")
    await flows.purge(NOW + 600 + KEPT_SECONDS)
    assert await flows.get("flow-1") is None


@pytest.mark.parametrize("status", [FlowStatus.PENDING, FlowStatus.FAILED])
async def test_the_newest_flow_of_an_account_is_kept_longer_if_nobody_authorized(
    flows: Flows, status: FlowStatus
) -> None:
    await flows.save(flow("older"))
    await flows.save(flow("newest", at=NOW + 1))
    await flows.save(flow("elsewhere", "warehouse"))
    await flows.finish("newest", status, "no" if status is FlowStatus.FAILED else "")
    await flows.purge(NOW + 601 + KEPT_SECONDS)
    assert [kept.id for kept in await flows.unanswered()] == ["elsewhere", "newest"]
    newest = await flows.newest(Account("local", "linear"), NOW + 601 + KEPT_SECONDS)
    assert newest is not None
    assert newest.id == "newest"
    await flows.purge(NOW + 601 + KEPT_UNANSWERED_SECONDS)
    assert await flows.unanswered() == []


async def test_a_cancelled_flow_is_not_kept_longer(flows: Flows) -> None:
    await flows.save(flow())
    await flows.cancel(Account("local", "linear"))
    assert await flows.unanswered() == []
    await flows.purge(NOW + 600 + KEPT_SECONDS)
    assert await flows.get("flow-1") is None


@pytest.mark.sqlite
async def test_a_broken_attempt_or_flow_counts_as_missing(flows: Flows, engine: Engine) -> None:  # T47
    for name in ("a", "b"):
        await flows.save(flow(name))
        await flows.add_attempt(attempt(name, name))
    async with engine.transaction() as transaction:
        await transaction.execute("UPDATE attempts SET code_verifier = x'01' WHERE flow_id = 'a'")
        await transaction.execute("UPDATE flows SET extra_params = '[1' WHERE id = 'b'")
    assert await flows.take_attempt(sha256("a"), NOW) is None
    assert await flows.take_attempt(sha256("b"), NOW) is None
    assert await flows.live(Account("local", "linear"), NOW) == flow("a")


@pytest.mark.sqlite
async def test_no_state_and_no_verifier_is_readable_in_the_files(flows: Flows, tmp_path: Path) -> None:  # T45
    await flows.save(flow())
    await flows.add_attempt(attempt("canary-state"))
    assert not any(b"canary" in path.read_bytes() for path in tmp_path.iterdir())
