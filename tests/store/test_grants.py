"""Grants: storing, renewing one at a time, fencing, ending."""

import asyncio
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import HEALTHY, Account, FlowStatus, Grant
from mcp_auth_proxy.store import Engine, lease, open_store
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import _BEGIN, SUPERSEDED, Grants
from store.builders import NOW, attempt, flow, grant, registration, sha256, store_settings, tokens

DEFAULT, WORK = Account("local", "linear"), Account("local", "linear", "work")
OWNER, OTHER = "elsewhere:1:a", "elsewhere:2:b"
_PAIR = "SELECT id, access_token FROM grants WHERE id IN (:a, :b)"
_SET_TOKEN = "UPDATE grants SET access_token = :access_token WHERE id = :id"


@pytest.fixture
def grants(engine: Engine) -> Grants:
    return Grants(engine)


async def test_a_grant_comes_back_as_it_was_given(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert stored == replace(grant(), id=stored.id)
    assert await grants.get(stored.id) == stored
    assert await grants.current(DEFAULT) == stored
    assert await grants.all() == [stored]


async def test_what_may_be_absent_stays_absent(grants: Grants) -> None:
    bare = replace(
        grant(),
        tokens=replace(tokens(), refresh_token=None, expires_at=None, scopes=()),
        registration=replace(registration(), client_secret=None, secret_expires_at=None),
        scopes=(),
    )
    stored = await grants.add(bare)
    assert await grants.get(stored.id) == replace(bare, id=stored.id)


async def test_other_principals_and_servers_see_nothing(grants: Grants) -> None:
    await grants.add(grant())
    assert await grants.current(Account("someone", "linear")) is None
    assert await grants.current(Account("local", "warehouse")) is None
    assert await grants.get(999) is None


async def test_a_further_account_is_one_beside_another_that_has_not_ended(grants: Grants) -> None:
    assert not await grants.has_other_account(WORK)
    first = await grants.add(grant())
    assert await grants.has_other_account(WORK)
    assert not await grants.has_other_account(DEFAULT)
    assert not await grants.has_other_account(Account("someone", "linear", "work"))
    assert not await grants.has_other_account(Account("local", "notes", "work"))
    await grants.end(first.id, version=first.version, reason="It is over.", now=NOW)
    assert not await grants.has_other_account(WORK)


async def test_a_label_is_stored_and_survives_a_renewal(grants: Grants) -> None:
    stored = await grants.add(grant())
    await grants.set_label(stored.id, "me@work.example")
    await grants.set_label(999, "nobody")
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    renewed = await grants.renewed(stored.id, version=1, owner=OWNER, tokens=tokens("2"))
    assert renewed is not None
    assert renewed.label == "me@work.example"


async def test_grants_can_be_given_to_another_principal(grants: Grants) -> None:
    stored = await grants.add(of_work(grant()))
    assert await grants.assign(WORK, "prn_1")
    given = await grants.current(Account("prn_1", "linear", "work"))
    assert given is not None
    assert given.tokens == stored.tokens
    assert (given.id, given.version) == (stored.id, stored.version)
    assert await grants.current(WORK) is None


async def test_a_grant_of_the_other_principal_is_not_replaced(grants: Grants) -> None:
    mine = await grants.add(grant())
    key = replace(mine.key, account=Account("prn_1", "linear"))
    theirs = await grants.add(replace(grant(name="2"), key=key))
    assert not await grants.assign(DEFAULT, "prn_1")
    assert [await grants.get(mine.id), await grants.get(theirs.id)] == [mine, theirs]
    await grants.end(theirs.id, version=theirs.version, reason="It is over.", now=NOW)
    assert await grants.assign(DEFAULT, "prn_1")
    given = await grants.current(key.account)
    assert given is not None
    assert given.id == mine.id


async def test_each_account_of_a_server_has_a_grant_of_its_own(grants: Grants) -> None:
    first = await grants.add(grant())
    second = await grants.add(of_work(grant(name="2")))
    assert await grants.current(DEFAULT) == first
    assert await grants.current(WORK) == second
    assert await grants.delete(WORK) == [second]
    assert await grants.current(WORK) is None
    assert await grants.all() == [first]


async def test_a_grant_of_another_issuer_supersedes_in_its_own_account_alone(grants: Grants) -> None:
    first = await grants.add(grant())
    await grants.add(of_work(grant(name="2")))
    third = await grants.add(of_work(grant(issuer="https://new.example", at=NOW + 5)))
    assert [found for found in await grants.all() if found.ended_at is None] == [first, third]


async def test_a_grant_with_the_same_key_replaces_and_continues_the_version(grants: Grants) -> None:
    first = await grants.add(grant())
    assert await grants.begin_refresh(first.id, version=1, owner=OWNER, now=NOW)
    second = await grants.add(grant(at=NOW + 5, name="2"))
    assert (second.id, second.version) == (first.id, 2)
    assert await grants.all() == [second]
    assert await grants.renewed(first.id, version=1, owner=OWNER, tokens=tokens("late")) is None


async def test_a_grant_ends_the_flow_that_brought_it(grants: Grants, engine: Engine) -> None:
    flows = Flows(engine)
    await flows.save(flow())
    await flows.add_attempt(attempt("s"))
    stored = await grants.add_from(grant(), "flow-1")
    assert stored is not None
    assert await grants.all() == [stored]
    ended = await flows.get("flow-1")
    assert ended is not None
    assert ended.status is FlowStatus.DONE
    assert await flows.find_attempt(sha256("s")) is None


async def test_a_second_consent_by_the_same_link_counts_too(grants: Grants, engine: Engine) -> None:
    await Flows(engine).save(flow())
    for name in ("1", "2"):
        assert await grants.add_from(grant(name=name), "flow-1")
    (stored,) = await grants.all()
    assert (stored.tokens.access_token, stored.version) == ("canary-access-2", 2)


@pytest.mark.parametrize("how", ["cancelled", "done, then cancelled", "gone"])
async def test_a_grant_of_a_flow_that_was_cancelled_is_not_stored(grants: Grants, engine: Engine, how: str) -> None:
    flows = Flows(engine)
    if how != "gone":
        await flows.save(flow())
        if how != "cancelled":
            assert await grants.add_from(grant(), "flow-1")
            await grants.delete(DEFAULT)
        await flows.cancel(DEFAULT)
    assert await grants.add_from(grant(), "flow-1") is None
    assert await grants.all() == []


async def test_the_origin_that_a_grant_is_for_goes_with_the_next_authorization(grants: Grants) -> None:
    for origin in ("https://old.example", "https://new.example", None):
        given = replace(grant(), key=replace(grant().key, upstream=origin))
        stored = await grants.add(given)
        assert await grants.get(stored.id) == stored
        assert stored.key.upstream == origin
    assert len(await grants.all()) == 1


async def test_a_grant_of_another_issuer_supersedes_and_says_so(grants: Grants) -> None:
    old = await grants.add(grant())
    other_server = await grants.add(grant("warehouse"))
    new = await grants.add(grant(issuer="https://new.example", at=NOW + 5))
    assert await grants.current(DEFAULT) == new
    ended = await grants.get(old.id)
    assert ended is not None
    assert (ended.ended_at, ended.ended_reason) == (NOW + 5, SUPERSEDED)
    assert await grants.current(Account("local", "warehouse")) == other_server


async def test_a_renewal_increments_the_version_and_releases_the_lease(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    begun = await grants.get(stored.id)
    assert begun is not None
    assert (begun.refresh_begun_at, begun.refresh_owner) == (NOW, OWNER)
    new = await grants.renewed(stored.id, version=1, owner=OWNER, tokens=tokens("2", NOW + 9))
    assert new == replace(stored, tokens=tokens("2", NOW + 9), version=2)
    assert await grants.current(DEFAULT) == new
    assert not await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)


async def test_one_refresh_at_a_time(grants: Grants) -> None:  # F3
    stored = await grants.add(grant())
    begun = await asyncio.gather(
        *(grants.begin_refresh(stored.id, version=1, owner=f"elsewhere:1:{n}", now=NOW) for n in range(10))
    )
    assert begun.count(True) == 1


async def test_the_same_owner_may_begin_again(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW + 10)
    assert not await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW + 30)


async def test_an_old_lease_is_taken_over_and_its_late_write_fenced_off(grants: Grants) -> None:  # F13
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    assert not await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW + lease.LONGEST)
    assert await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW + lease.LONGEST + 1)
    assert await grants.renewed(stored.id, version=1, owner=OWNER, tokens=tokens("late")) is None
    await grants.release_refresh(stored.id, version=1, owner=OWNER)
    new = await grants.renewed(stored.id, version=1, owner=OTHER, tokens=tokens("2"))
    assert new is not None
    assert new.tokens.access_token == "canary-access-2"


async def test_a_lease_from_the_future_does_not_last(grants: Grants) -> None:  # F9
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW + 3600)
    assert await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW)


async def test_a_released_lease_is_free_at_once(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    await grants.release_refresh(stored.id, version=1, owner=OTHER)
    assert not await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW)
    await grants.release_refresh(stored.id, version=1, owner=OWNER)
    assert await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW)


async def test_a_process_killed_in_a_refresh_is_found_and_taken_over_at_once(grants: Grants, tmp_path: Path) -> None:
    # F6
    stored = await grants.add(grant())
    code = (
        "import asyncio, os, pathlib, signal, sys\n"
        "from store.builders import NOW, store_settings\n"
        "from mcp_auth_proxy.store import open_store\n"
        "from mcp_auth_proxy.store.grants import Grants\n"
        "async def main():\n"
        "    engine = await open_store(store_settings(pathlib.Path(sys.argv[1])))\n"
        "    grants, grant = Grants(engine), int(sys.argv[2])\n"
        "    assert await grants.begin_refresh(grant, version=1, owner=grants.owners.new(), now=NOW)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    paths = os.pathsep.join(str(Path(__file__).parents[depth] / name) for depth, name in ((1, ""), (2, "src")))
    environ = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(stored.id)], env=environ, timeout=30, check=False)
    found = await grants.get(stored.id)
    assert found is not None
    assert found.refresh_begun_at == NOW
    assert await grants.interrupted(NOW + 1) == ({DEFAULT: NOW}, False)
    owner = grants.owners.new()
    assert await grants.begin_refresh(stored.id, version=1, owner=owner, now=NOW + 1, needed=False)


async def test_a_living_process_holds_its_lease(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert await grants.interrupted(NOW) == ({}, False)
    assert await grants.begin_refresh(stored.id, version=1, owner=grants.owners.new(), now=NOW)
    assert not await grants.begin_refresh(stored.id, version=1, owner=grants.owners.new(), now=NOW)
    assert await grants.interrupted(NOW) == ({}, True)
    assert await grants.interrupted(NOW + lease.LONGEST + 1) == ({}, True)


async def test_a_living_process_that_is_late_is_only_taken_over_if_that_is_needed(grants: Grants) -> None:
    stored = await grants.add(grant())
    late, owner = NOW + lease.LONGEST + 1, grants.owners.new()
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    assert not await grants.begin_refresh(stored.id, version=1, owner=owner, now=late, needed=False)
    assert await grants.begin_refresh(stored.id, version=1, owner=owner, now=late)


async def test_a_refresh_that_was_given_up_stays_recorded_and_may_be_taken_over(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    assert not await grants.note_failure(stored.id, version=1, owner=OTHER, health=HEALTHY, keep=True)
    assert not await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW)
    assert await grants.note_failure(stored.id, version=1, owner=OWNER, health=HEALTHY, keep=True)
    found = await grants.get(stored.id)
    assert found is not None
    assert found.refresh_begun_at == NOW
    assert not await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW, needed=False)
    assert await grants.renewed(stored.id, version=1, owner=OWNER, tokens=tokens("late")) is None
    assert await grants.begin_refresh(stored.id, version=1, owner=OTHER, now=NOW)


async def test_a_refresh_that_was_begun_again_meanwhile_is_not_taken_over(grants: Grants, engine: Engine) -> None:
    """Two transactions of a database server may both have seen the old begin."""
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    seen = {"id": stored.id, "version": 1, "owner": OTHER, "now": NOW + 50, "seen": OWNER, "seen_at": NOW}
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW + 40)
    async with engine.transaction() as transaction:
        assert await transaction.execute(_BEGIN, seen) == []


async def test_end_keeps_the_row_and_its_reason(grants: Grants) -> None:  # F2
    stored = await grants.add(grant())
    assert not await grants.end(stored.id, version=7, reason="x", now=NOW)
    assert await grants.end(stored.id, version=1, reason="The refresh token was revoked.", now=NOW + 1)
    assert not await grants.end(stored.id, version=1, reason="x", now=NOW)
    assert await grants.current(DEFAULT) is None
    assert not await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    (ended,) = await grants.all()
    assert (ended.ended_at, ended.ended_reason) == (NOW + 1, "The refresh token was revoked.")


async def test_a_grant_that_ended_during_its_refresh_stays_ended(grants: Grants) -> None:
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner=OWNER, now=NOW)
    assert await grants.end(stored.id, version=1, reason="x", now=NOW)
    assert await grants.renewed(stored.id, version=1, owner=OWNER, tokens=tokens("2")) is None


async def test_delete_returns_what_is_to_be_revoked_and_its_id_never_comes_back(grants: Grants) -> None:
    stored = await grants.add(grant())
    kept = await grants.add(grant("warehouse"))
    assert await grants.delete(DEFAULT) == [stored]
    assert await grants.all() == [kept]
    assert await grants.delete(DEFAULT) == []
    assert await grants.delete(Account("local", "warehouse")) == [kept]
    assert (await grants.add(grant())).id > kept.id


async def test_swapped_rows_fail_and_others_work(
    grants: Grants, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:  # T47
    a, b, good = [await grants.add(grant(name, name=name)) for name in ("a", "b", "c")]
    await swap(engine, a, b)
    with caplog.at_level(logging.DEBUG):
        assert await grants.all() == [good]
        assert await grants.current(Account("local", "a")) is None
        assert await grants.get(b.id) is None
        assert await grants.current(Account("local", "c")) == good
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("grants" in line and "canary" not in line for line in warnings)


async def test_a_store_with_broken_rows_starts_and_takes_new_grants(tmp_path: Path) -> None:  # T47
    engine = await open_store(store_settings(tmp_path))
    a, b = [await Grants(engine).add(grant(name, name=name)) for name in ("a", "b")]
    await swap(engine, a, b)
    async with engine.transaction() as transaction:
        await transaction.execute("UPDATE grants SET grant_type = 'nonsense' WHERE id = :id", {"id": b.id})
    await engine.close()
    engine = await open_store(store_settings(tmp_path))
    grants = Grants(engine)
    assert await grants.all() == []
    new = await grants.add(grant("a", name="new"))
    assert await grants.current(Account("local", "a")) == new
    assert await grants.delete(Account("local", "b")) == []
    assert await grants.all() == [new]
    await engine.close()


def of_work(given: Grant) -> Grant:
    client = replace(given.registration, account=WORK.name)
    return replace(given, key=replace(given.key, account=WORK), registration=client)


async def swap(engine: Engine, a: Grant, b: Grant) -> None:
    async with engine.transaction() as transaction:
        rows = await transaction.execute(_PAIR, {"a": a.id, "b": b.id})
        for row, other in zip(rows, reversed(rows), strict=True):
            await transaction.execute(_SET_TOKEN, {"access_token": other["access_token"], "id": row["id"]})
