"""Transactions, reads and trouble."""

import asyncio
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import database as database_module
from mcp_auth_proxy.store.database import Database
from mcp_auth_proxy.store.grants import Grants
from store.builders import grant, store_settings

INSERT = "INSERT INTO client_bindings (server, client_id, issuer) VALUES (?, 'c', 'i')"
COUNT = "SELECT COUNT(*) AS number FROM client_bindings"


async def count(database: Database) -> int:
    row = await database.fetch_one(COUNT)
    assert row is not None
    return int(row["number"])


async def test_pragmas_are_those_of_the_design(database: Database) -> None:
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}
    for name, value in expected.items():
        row = await database.fetch_one(f"PRAGMA {name}")
        assert row is not None
        assert row[0] == value


async def test_a_transaction_that_raises_changes_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.transaction() as transaction:
            await transaction.execute(INSERT, ("a",))
            raise ZeroDivisionError
    assert await count(database) == 0
    async with database.transaction() as transaction:
        await transaction.execute(INSERT, ("a",))
    assert await count(database) == 1


async def test_reads_see_nothing_that_may_be_rolled_back(database: Database) -> None:
    async with database.transaction() as transaction:
        await transaction.execute(INSERT, ("a",))
        reading = asyncio.create_task(count(database))
        await asyncio.sleep(0)
        assert not reading.done()
    assert await reading == 1


async def test_transactions_wait_for_each_other(database: Database) -> None:
    async def add(number: int) -> None:
        async with database.transaction() as transaction:
            row = await transaction.fetch_one(COUNT)
            assert row is not None
            await transaction.execute(INSERT, (f"s{row['number']}",))

    await asyncio.gather(*(add(number) for number in range(20)))
    assert await count(database) == 20


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_task_leaves_no_transaction_open(database: Database, turns: int) -> None:
    async def write() -> None:
        async with database.transaction() as transaction:
            for number in range(3):
                await transaction.execute(INSERT, (f"s{number}",))

    task = asyncio.create_task(write())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await count(database) in (0, 3)
    async with database.transaction() as transaction:
        await transaction.execute(INSERT, ("after",))


async def test_close_ends_the_thread_and_may_be_repeated(tmp_path: Path) -> None:
    before = threading.active_count()
    opened = await Database.open(store_settings(tmp_path))
    await opened.close()
    await opened.close()
    deadline = time.monotonic() + 5
    # The threads of asyncio.to_thread stay; that of the connection does not.
    while any(thread.name.endswith("(_connection_worker_thread)") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, (before, threading.enumerate())
        await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="closed"):
        await opened.fetch_all(COUNT)
    with pytest.raises(StoreUnavailable, match="closed"):
        async with opened.transaction():
            pass


async def test_close_waits_for_the_running_transaction(tmp_path: Path) -> None:
    opened = await Database.open(store_settings(tmp_path))
    async with opened.transaction() as transaction:
        closing = asyncio.create_task(opened.close())
        await asyncio.sleep(0)
        closing.cancel()
        await transaction.execute(INSERT, ("a",))
    await asyncio.gather(closing, return_exceptions=True)
    with pytest.raises(StoreUnavailable):
        await opened.fetch_all(COUNT)
    again = await Database.open(store_settings(tmp_path))
    assert await count(again) == 1
    await again.close()


async def test_changed_tells_of_writes_by_others_once(database: Database, tmp_path: Path) -> None:
    assert not await database.changed()
    await Grants(database).add(grant())
    assert not await database.changed()
    other = await Database.open(store_settings(tmp_path))
    assert not await database.changed()
    await Grants(other).add(grant("other"))
    await other.close()
    assert await database.changed()
    assert not await database.changed()


async def test_a_store_locked_by_another_process_is_unavailable_and_recovers(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F11
    await database.fetch_all("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked by another process"):
        await Grants(database).add(grant())
    with pytest.raises(StoreUnavailable, match="locked"):
        await database.writable()
    assert await Grants(database).all() == []
    other.execute("ROLLBACK")
    other.close()
    await database.writable()
    await Grants(database).add(grant())


async def test_it_waits_for_a_lock_that_is_let_go(database: Database, tmp_path: Path) -> None:  # F11
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    adding = asyncio.create_task(Grants(database).add(grant()))
    await asyncio.sleep(0.05)
    assert not adding.done()
    other.execute("ROLLBACK")
    other.close()
    assert (await adding).id


async def test_waiting_for_ones_turn_is_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:  # F11
    monkeypatch.setattr(database_module, "_QUEUE_SECONDS", 0.01)
    async with database.transaction():
        with pytest.raises(StoreUnavailable, match="try again"):
            await database.fetch_all(COUNT)


async def test_a_full_disk_is_unavailable_until_a_write_succeeds(database: Database) -> None:  # F8
    (row,) = await database.fetch_all("PRAGMA page_count")
    await database.fetch_all(f"PRAGMA max_page_count = {row[0]}")
    with pytest.raises(StoreUnavailable, match="full"):
        for number in range(1000):
            await Grants(database).add(grant(f"s{number}"))
    stored = len(await Grants(database).all())
    await database.fetch_all("PRAGMA max_page_count = 1000000")
    await database.writable()
    await Grants(database).add(grant("after"))
    assert len(await Grants(database).all()) == stored + 1


async def test_a_store_that_cannot_be_written_is_unavailable(database: Database) -> None:  # F8
    await database.fetch_all("PRAGMA query_only = 1")
    with pytest.raises(StoreUnavailable, match="can't be written"):
        await Grants(database).add(grant())
    with pytest.raises(StoreUnavailable, match="can't be written"):
        await database.writable()
    await database.fetch_all("PRAGMA query_only = 0")
    await database.writable()


async def test_a_store_that_was_removed_takes_no_writes(database: Database, tmp_path: Path) -> None:  # F8
    (tmp_path / "store.db").unlink()
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        await Grants(database).add(grant())
    with pytest.raises(StoreUnavailable):
        await database.writable()


async def test_faults_of_our_own_sql_are_not_hidden(database: Database) -> None:
    with pytest.raises(sqlite3.OperationalError):
        await database.fetch_all("SELECT nothing FROM nowhere")
