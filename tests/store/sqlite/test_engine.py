"""Transactions, reads and errors on a SQLite file."""

import asyncio
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.sqlite import engine as engine_module
from store.builders import grant, store_settings

INSERT = "INSERT INTO client_bindings (uid, server, client_id, issuer) VALUES (:server, :server, 'c', 'i')"
COUNT = "SELECT COUNT(*) AS number FROM client_bindings"


async def count(engine: Engine) -> int:
    row = await engine.fetch_one(COUNT)
    assert row is not None
    return int(row["number"])


async def test_the_pragmas_make_commits_durable(engine: Engine) -> None:
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    for name, value in expected.items():
        row = await engine.fetch_one(f"PRAGMA {name}")
        assert row is not None
        assert row[name] == value
    row = await engine.fetch_one("PRAGMA busy_timeout")
    assert row is not None
    assert row["timeout"] == 5000


async def test_a_transaction_that_raises_changes_nothing(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction() as transaction:
            await transaction.execute(INSERT, {"server": "a"})
            raise ZeroDivisionError
    assert await count(engine) == 0
    async with engine.transaction() as transaction:
        await transaction.execute(INSERT, {"server": "a"})
    assert await count(engine) == 1


async def test_reads_see_nothing_that_may_be_rolled_back(engine: Engine) -> None:
    async with engine.transaction() as transaction:
        await transaction.execute(INSERT, {"server": "a"})
        reading = asyncio.create_task(count(engine))
        await asyncio.sleep(0)
        assert not reading.done()
    assert await reading == 1


async def test_transactions_wait_for_each_other(engine: Engine) -> None:
    async def add(number: int) -> None:
        async with engine.transaction() as transaction:
            row = await transaction.fetch_one(COUNT)
            assert row is not None
            await transaction.execute(INSERT, {"server": f"s{row['number']}"})

    await asyncio.gather(*(add(number) for number in range(20)))
    assert await count(engine) == 20


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_task_leaves_no_transaction_open(engine: Engine, turns: int) -> None:
    async def write() -> None:
        async with engine.transaction() as transaction:
            for number in range(3):
                await transaction.execute(INSERT, {"server": f"s{number}"})

    task = asyncio.create_task(write())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await count(engine) in (0, 3)
    async with engine.transaction() as transaction:
        await transaction.execute(INSERT, {"server": "after"})


async def test_close_ends_the_thread_and_may_be_called_again(tmp_path: Path) -> None:
    before = threading.active_count()
    opened = await open_store(store_settings(tmp_path))
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
    opened = await open_store(store_settings(tmp_path))
    async with opened.transaction() as transaction:
        closing = asyncio.create_task(opened.close())
        await asyncio.sleep(0)
        closing.cancel()
        await transaction.execute(INSERT, {"server": "a"})
    await asyncio.gather(closing, return_exceptions=True)
    with pytest.raises(StoreUnavailable):
        await opened.fetch_all(COUNT)
    again = await open_store(store_settings(tmp_path))
    assert await count(again) == 1
    await again.close()


async def test_changed_reports_writes_by_others_once(engine: Engine, tmp_path: Path) -> None:
    assert not await engine.changed()
    await Grants(engine).add(grant())
    assert not await engine.changed()
    other = await open_store(store_settings(tmp_path))
    assert not await engine.changed()
    await Grants(other).add(grant("other"))
    await other.close()
    assert await engine.changed()
    assert not await engine.changed()


async def test_a_store_locked_by_another_process_is_unavailable_and_recovers(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F11
    await engine.fetch_all("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked by another process"):
        await Grants(engine).add(grant())
    with pytest.raises(StoreUnavailable, match="locked"):
        await engine.check_writable()
    assert await Grants(engine).all() == []
    other.execute("ROLLBACK")
    other.close()
    await engine.check_writable()
    await Grants(engine).add(grant())


async def test_it_waits_for_a_lock_that_is_released(engine: Engine, tmp_path: Path) -> None:  # F11
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    adding = asyncio.create_task(Grants(engine).add(grant()))
    await asyncio.sleep(0.05)
    assert not adding.done()
    other.execute("ROLLBACK")
    other.close()
    assert (await adding).id


async def test_waiting_for_a_transaction_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:  # F11
    monkeypatch.setattr(engine_module, "_QUEUE_TIMEOUT", 0.01)
    async with engine.transaction():
        with pytest.raises(StoreUnavailable, match="Try again"):
            await engine.fetch_all(COUNT)


async def test_a_full_disk_is_unavailable_until_a_write_succeeds(engine: Engine) -> None:  # F8
    (row,) = await engine.fetch_all("PRAGMA page_count")
    await engine.fetch_all(f"PRAGMA max_page_count = {row['page_count']}")
    with pytest.raises(StoreUnavailable, match="full"):
        for number in range(1000):
            await Grants(engine).add(grant(f"s{number}"))
    stored = len(await Grants(engine).all())
    await engine.fetch_all("PRAGMA max_page_count = 1000000")
    await engine.check_writable()
    await Grants(engine).add(grant("after"))
    assert len(await Grants(engine).all()) == stored + 1


async def test_a_store_that_cannot_be_written_is_unavailable(engine: Engine) -> None:  # F8
    await engine.fetch_all("PRAGMA query_only = 1")
    with pytest.raises(StoreUnavailable, match="can't be written"):
        await Grants(engine).add(grant())
    with pytest.raises(StoreUnavailable, match="can't be written"):
        await engine.check_writable()
    await engine.fetch_all("PRAGMA query_only = 0")
    await engine.check_writable()


async def test_a_store_that_was_removed_accepts_no_writes(engine: Engine, tmp_path: Path) -> None:  # F8
    (tmp_path / "store.db").unlink()
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        await Grants(engine).add(grant())
    with pytest.raises(StoreUnavailable):
        await engine.check_writable()


async def test_errors_in_our_own_sql_are_not_hidden(engine: Engine) -> None:
    with pytest.raises(StoreUnavailable, match="syntax error"):
        await engine.fetch_all("SELECT nothing FROM nowhere")
