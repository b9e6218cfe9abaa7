"""What others can make the store grow by is bounded, and what is in use is kept (T89)."""

import time
from dataclasses import replace

import pytest

from mcp_auth_proxy.models import Account, FlowStatus
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.flows import (
    KEPT_ATTEMPTS_IN_ALL,
    KEPT_FLOWS,
    KEPT_IN_ALL,
    KEPT_SECONDS,
    KEPT_UNANSWERED_SECONDS,
    Flows,
)
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.registrations import KEPT_REGISTRATIONS, Registrations
from store.builders import NOW, attempt, flow, grant, registration, sha256

CALLBACK = registration().redirect_uri
STARTS = 2000


async def count(engine: Engine, table: str) -> int:
    (row,) = await engine.fetch_all(f"SELECT count(*) AS found FROM {table}")
    return int(row["found"])


async def test_thousands_of_starts_leave_twenty_flows_of_an_account(engine: Engine) -> None:  # T89
    flows = Flows(engine)
    await flows.save(flow("of another", "notes"))
    await flows.add_attempt(attempt("of another", "of another"))
    await flows.save(replace(flow("kept"), expires_at=NOW + 10 * STARTS))
    await flows.add_attempt(attempt("kept", "kept"))
    for number in range(STARTS):
        ended = replace(flow(f"flow-{number}", at=NOW + number), status=FlowStatus.FAILED, reason="refused")
        await flows.save(ended)
    assert await count(engine, "flows") == KEPT_FLOWS + 1
    assert await count(engine, "attempts") == 2
    # Whoever waits for a user is not evicted by those that have ended, however many there were.
    assert await flows.take_attempt(sha256("kept"), NOW) is not None
    assert await flows.take_attempt(sha256("of another"), NOW) is not None
    assert await flows.get(f"flow-{STARTS - 1}") == ended


async def test_flows_that_all_wait_are_bounded_too_and_the_newest_are_kept(engine: Engine) -> None:
    flows = Flows(engine)
    for number in range(3 * KEPT_FLOWS):
        await flows.save(flow(f"flow-{number}", at=NOW + number))
        for visit in range(2):
            await flows.add_attempt(attempt(f"{number}-{visit}", f"flow-{number}", at=NOW + number))
    assert await count(engine, "flows") == KEPT_FLOWS
    assert await count(engine, "attempts") == 2 * KEPT_FLOWS
    assert await flows.get(f"flow-{2 * KEPT_FLOWS - 1}") is None
    assert await flows.get(f"flow-{2 * KEPT_FLOWS}") is not None


async def test_a_new_flow_is_kept_whatever_the_clock_says(engine: Engine) -> None:
    flows = Flows(engine)
    for number in range(KEPT_FLOWS):
        await flows.save(flow(f"flow-{number}", at=NOW + 10_000))
    await flows.save(flow("new"))
    assert await flows.get("new") == flow("new")
    assert await count(engine, "flows") == KEPT_FLOWS


async def test_the_flows_of_all_accounts_together_are_bounded_and_a_start_stays_fast(engine: Engine) -> None:  # T89
    flows = Flows(engine)
    await flows.save(replace(flow("waiting"), expires_at=NOW + 10 * KEPT_IN_ALL))
    (row,) = await engine.fetch_all("SELECT * FROM flows")
    names = list(row.keys())
    more = f"INSERT INTO flows ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"
    async with engine.transaction() as transaction:
        for number in range(KEPT_IN_ALL + 500):
            changes = {
                "id": f"flow-{number}",
                "uid": f"{number:032x}",
                "server": f"server-{number}",
                "expires_at": NOW - 1,
                "created_at": NOW - number,
            }
            await transaction.execute(more, {name: row[name] for name in names} | changes)
    for number in range(3):
        begun = time.perf_counter()
        await flows.save(flow(f"new-{number}", f"new-{number}"))
        assert time.perf_counter() - begun < 1
        assert await count(engine, "flows") == KEPT_IN_ALL
        assert await flows.get("waiting") is not None
    assert await flows.get("new-0") is not None


async def test_the_attempts_of_all_flows_together_are_bounded(engine: Engine) -> None:  # T89
    flows = Flows(engine)
    await flows.save(flow("visited"))
    await flows.save(flow("other", "notes"))
    await flows.add_attempt(attempt("of the owner", "visited"))
    await flows.add_attempt(attempt("of another", "other"))
    (row,) = await engine.fetch_all("SELECT * FROM attempts WHERE flow_id = 'visited'")
    names = list(row.keys())
    more = f"INSERT INTO attempts ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})"
    for number in range(5):  # flows of others, so that no flow has more than its share
        await flows.save(flow(f"flow-{number}", f"server-{number}"))
    async with engine.transaction() as transaction:
        for number in range(KEPT_ATTEMPTS_IN_ALL - 2):
            changes = {"uid": f"{number:032x}", "state_hash": sha256(str(number)), "flow_id": f"flow-{number % 5}"}
            await transaction.execute(more, {name: row[name] for name in names} | changes)
    for number in range(3):
        begun = time.perf_counter()
        assert await flows.add_attempt(attempt(f"new-{number}", "visited", at=NOW + 1))
        assert time.perf_counter() - begun < 1
        assert await count(engine, "attempts") <= KEPT_ATTEMPTS_IN_ALL
        assert await flows.find_attempt(sha256(f"new-{number}")) is not None
    for state in ("of the owner", "of another"):
        assert await flows.find_attempt(sha256(state)) is not None


async def test_expired_flows_and_attempts_are_deleted(engine: Engine) -> None:
    flows = Flows(engine)
    for number in range(KEPT_FLOWS):
        await flows.save(flow(f"flow-{number}"))
        for visit in range(2):
            await flows.add_attempt(attempt(f"{number}-{visit}", f"flow-{number}"))
    await flows.purge(NOW + 599)
    assert await count(engine, "attempts") == 2 * KEPT_FLOWS
    await flows.purge(NOW + 600)
    assert (await count(engine, "attempts"), await count(engine, "flows")) == (0, KEPT_FLOWS)
    await flows.purge(NOW + 600 + KEPT_SECONDS)
    assert await count(engine, "flows") == 1  # the newest, for `status`
    await flows.purge(NOW + 600 + KEPT_UNANSWERED_SECONDS)
    assert await count(engine, "flows") == 0


async def test_a_server_has_at_most_twenty_registrations(engine: Engine) -> None:  # T89
    registrations = Registrations(engine)
    await registrations.save(registration("notes"))
    for number in range(STARTS // 4):
        await registrations.save(replace(registration(issuer=f"https://as.example/{number}"), created_at=NOW + number))
    assert await count(engine, "registrations") == KEPT_REGISTRATIONS + 1
    last = STARTS // 4 - 1
    assert await registrations.find("linear", f"https://as.example/{last}", CALLBACK) is not None
    assert await registrations.find("linear", f"https://as.example/{last - KEPT_REGISTRATIONS}", CALLBACK) is None
    assert await registrations.find("notes", "https://as.example", CALLBACK) is not None


async def test_the_registration_of_a_live_grant_is_kept(engine: Engine) -> None:  # T89
    registrations, grants = Registrations(engine), Grants(engine)
    used, ended = registration(issuer="https://used.example"), registration(issuer="https://ended.example")
    for client in (used, ended):
        await registrations.save(client)
        await grants.add(replace(grant(issuer=client.issuer, at=NOW), registration=client))
    # Of one account only the newest grant is live.
    await grants.add(grant(issuer=used.issuer))
    for number in range(2 * KEPT_REGISTRATIONS):
        await registrations.save(replace(registration(issuer=f"https://as.example/{number}"), created_at=NOW + number))
    assert await registrations.find("linear", used.issuer, CALLBACK) == used
    assert await registrations.find("linear", ended.issuer, CALLBACK) is None
    assert await count(engine, "registrations") == KEPT_REGISTRATIONS


@pytest.mark.parametrize("times", [10_000.0, -10_000.0])
async def test_a_new_registration_is_kept_whatever_the_clock_says(engine: Engine, times: float) -> None:
    registrations = Registrations(engine)
    for number in range(2 * KEPT_REGISTRATIONS):
        of = replace(registration(account=f"account-{number}"), created_at=NOW)
        await registrations.save(of)
        await Grants(engine).add(
            replace(grant(), key=replace(grant().key, account=Account("local", "linear", of.account)), registration=of)
        )
    new = replace(registration(issuer="https://new.example"), created_at=NOW + times)
    await registrations.save(new)
    assert await registrations.find("linear", "https://new.example", CALLBACK) == new
    assert await count(engine, "registrations") == KEPT_REGISTRATIONS
