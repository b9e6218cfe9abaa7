"""Named leases: one owner at a time, and none for ever."""

import asyncio
from pathlib import Path

import pytest

from mcp_auth_proxy.store import Engine, leases, open_store
from mcp_auth_proxy.store.lease import KEPT_SECONDS
from mcp_auth_proxy.store.leases import Leases
from store.builders import NOW, dead_owner, store_settings

ELSEWHERE = "elsewhere:1:a"
ABSURD = [f'["a", {time}]'.encode() for time in ("NaN", "Infinity", "-Infinity", "1" * 400, "9" * 5000)]


@pytest.fixture
def held(engine: Engine) -> Leases:
    return Leases(engine)


async def names(engine: Engine) -> list[str]:
    rows = await engine.fetch_all("SELECT name FROM meta WHERE name LIKE 'lease:%' ORDER BY name")
    return [row["name"] for row in rows]


async def test_one_of_two_owners_has_a_lease_until_it_gives_it_back(held: Leases, engine: Engine) -> None:
    first, second = held.owners.new(), held.owners.new()
    assert await held.claim("a", owner=first, now=NOW, longest=20)
    assert await held.claim("a", owner=first, now=NOW, longest=20)
    assert not await held.claim("a", owner=second, now=NOW + 1, longest=20)
    assert await held.claim("b", owner=second, now=NOW, longest=20)
    assert await held.is_held("a", now=NOW + 20, longest=20)
    assert not await held.is_held("a", now=NOW + 21, longest=20)
    await held.release("a", owner=second, now=NOW)
    assert await held.is_held("a", now=NOW, longest=20)
    await held.release("a", owner=first, now=NOW)
    assert not await held.is_held("a", now=NOW, longest=20)
    assert await held.claim("a", owner=second, now=NOW, longest=20)
    assert await names(engine) == ["lease:a", "lease:b"]


async def test_of_processes_that_claim_at_once_one_wins(tmp_path: Path) -> None:
    stores = [await open_store(store_settings(tmp_path)) for _ in range(4)]
    claims = [Leases(each).claim("a", owner=each.owners.new(), now=NOW, longest=20) for each in stores for _ in "abc"]
    assert sum(await asyncio.gather(*claims)) == 1
    for each in stores:
        await each.close()


async def test_a_lease_that_is_too_old_or_of_the_dead_is_free(held: Leases) -> None:
    assert await held.claim("a", owner=ELSEWHERE, now=NOW, longest=20)
    assert not await held.claim("a", owner="elsewhere:2:b", now=NOW + 20, longest=20)
    assert await held.claim("a", owner="elsewhere:2:b", now=NOW + 21, longest=20)
    await held.release("a", owner=ELSEWHERE, now=NOW)
    assert await held.is_held("a", now=NOW + 22, longest=20)
    assert await held.claim("b", owner=dead_owner(held.owners), now=NOW, longest=20)
    assert await held.claim("b", owner=ELSEWHERE, now=NOW, longest=20)


@pytest.mark.sqlite
@pytest.mark.parametrize("value", [b"", b"nonsense", b"[]", b'{"a": 1}', b"[" * 5000, "text", 5, *ABSURD])
async def test_what_something_else_wrote_there_holds_nothing(  # T91
    held: Leases, engine: Engine, value: object
) -> None:
    async with engine.transaction() as transaction:
        await transaction.execute("INSERT INTO meta (name, value) VALUES ('lease:a', :value)", {"value": value})
    await held.purge(NOW)
    assert await names(engine) == []
    async with engine.transaction() as transaction:
        await transaction.execute("INSERT INTO meta (name, value) VALUES ('lease:a', :value)", {"value": value})
    assert not await held.is_held("a", now=NOW, longest=20)
    assert await held.claim("a", owner=ELSEWHERE, now=NOW, longest=20)


async def test_a_locked_lease_is_held_by_whom_it_was(held: Leases, engine: Engine) -> None:
    assert await held.claim("a", owner=ELSEWHERE, now=NOW, longest=20)
    async with engine.transaction() as transaction:
        await leases.lock(transaction, "a")
        await leases.lock(transaction, "b")
    assert await held.is_held("a", now=NOW, longest=20)
    assert not await held.is_held("b", now=NOW, longest=20)


async def test_leases_that_nobody_gave_back_are_deleted(held: Leases, engine: Engine) -> None:
    assert await held.claim("old", owner=ELSEWHERE, now=NOW, longest=20)
    assert await held.claim("new", owner=ELSEWHERE, now=NOW + KEPT_SECONDS, longest=20)
    async with engine.transaction() as transaction:
        await leases.lock(transaction, "free")
    await held.purge(NOW + KEPT_SECONDS + 1)
    assert await names(engine) == ["lease:new"]
    assert await engine.fetch_all("SELECT name FROM meta WHERE name LIKE 'key:%'")
