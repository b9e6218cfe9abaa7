"""Transactions, reads, notifications and time, on a real server."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fakes.postgresql import Server, settings_for
from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import Engine, open_store, open_store_read_only
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.postgresql import connection as connection_module
from mcp_auth_proxy.store.shared_secrets import SharedSecrets
from store.builders import grant

pytestmark = pytest.mark.postgresql

INSERT = "INSERT INTO meta (name, value) VALUES (:name, :value)"
COUNT = "SELECT count(*) AS number FROM meta WHERE substr(name, 1, 2) = 't:'"
Execute = Callable[..., list[tuple[object, ...]]]


async def add(engine: Engine, name: str) -> None:
    async with engine.transaction() as transaction:
        await transaction.execute(INSERT, {"name": f"t:{name}", "value": b"\x00\xff"})


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout: float = 20) -> None:
    """Wait, bounded, until the condition holds."""
    deadline = time.monotonic() + timeout
    while not await condition():
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        await asyncio.sleep(0.01)


async def count(engine: Engine) -> int:
    row = await engine.fetch_one(COUNT)
    assert row is not None
    number: int = row["number"]
    return number


async def test_values_come_back_as_they_were_written(engine: Engine) -> None:
    await add(engine, "ü 'x' :y ::z \\ \"")
    (row,) = await engine.fetch_all("SELECT * FROM meta WHERE name = :name", {"name": "t:ü 'x' :y ::z \\ \""})
    assert row["value"] == b"\x00\xff"
    assert isinstance(row["value"], bytes)
    assert list(row.keys()) == ["name", "value"]
    assert await engine.fetch_one("SELECT * FROM meta WHERE name = :name", {"name": "none"}) is None


@pytest.mark.parametrize("number", [0, -(2**31), 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1])
async def test_integers_of_every_size_are_sent(engine: Engine, number: int) -> None:
    sql = "SELECT id FROM grants WHERE id = :id OR id < :id LIMIT :count"
    rows = await engine.fetch_all(sql, {"id": number, "count": 1})
    assert rows == []


async def test_what_a_failed_block_wrote_is_gone(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.transaction() as transaction:
            await transaction.execute(INSERT, {"name": "t:a", "value": b""})
            raise ZeroDivisionError
    assert await count(engine) == 0
    await add(engine, "a")
    assert await count(engine) == 1


async def test_a_transaction_that_goes_on_after_a_failed_statement_keeps_nothing(engine: Engine) -> None:
    with pytest.raises(StoreUnavailable, match="kept nothing"):
        async with engine.transaction() as transaction:
            await transaction.execute(INSERT, {"name": "t:a", "value": b""})
            with pytest.raises(StoreUnavailable):
                await transaction.execute("SELECT nothing FROM meta")
    assert await count(engine) == 0
    await engine.check_writable()


async def test_transactions_of_all_processes_wait_for_each_other(engine: Engine, another: Engine) -> None:
    async def add_next(each: Engine) -> None:
        async with each.transaction() as transaction:
            row = await transaction.fetch_one(COUNT)
            assert row is not None
            await transaction.execute(INSERT, {"name": f"t:{row['number']}", "value": b""})

    await asyncio.gather(*(add_next(each) for each in (engine, another) for _ in range(10)))
    assert await count(engine) == 20


async def test_reads_go_on_beside_a_transaction_and_see_what_is_committed(engine: Engine) -> None:
    async with engine.transaction() as transaction:
        await transaction.execute(INSERT, {"name": "t:a", "value": b""})
        assert [await count(engine) for _ in range(8)] == [0] * 8
    assert await count(engine) == 1


@pytest.mark.parametrize("turns", range(0, 24, 2))
async def test_a_cancelled_task_leaves_no_transaction_open(engine: Engine, turns: int) -> None:
    async def write() -> None:
        async with engine.transaction() as transaction:
            for number in range(3):
                await transaction.execute(INSERT, {"name": f"t:{number}", "value": b""})

    task = asyncio.create_task(write())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await count(engine) in (0, 3)
    await add(engine, "after")


async def test_a_process_that_stands_still_in_a_transaction_does_not_hold_up_the_others(
    engine: Engine, another: Engine
) -> None:
    """It takes the four seconds after which the server ends such a transaction."""
    with pytest.raises(StoreUnavailable):
        async with engine.transaction() as transaction:
            await transaction.execute(INSERT, {"name": "t:a", "value": b""})
            await add(another, "b")
    assert await count(another) == 1
    await add(engine, "c")


async def test_close_may_be_called_again_and_nothing_works_afterwards(store: StoreSettings) -> None:
    opened = await open_store(store)
    await opened.changed()
    await opened.close()
    await opened.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await opened.fetch_all(COUNT)
    with pytest.raises(StoreUnavailable, match="closed"):
        async with opened.transaction():
            pass


async def test_writes_of_others_are_noticed_and_own_ones_are_not(engine: Engine, another: Engine) -> None:
    assert [await engine.changed(), await engine.changed(), await engine.changed("b")] == [True, False, True]
    assert await another.changed()
    began = time.monotonic()
    await add(another, "a")
    await until(engine.changed, "the write of another")
    assert time.monotonic() - began < 1
    assert [await engine.changed(), await engine.changed("b"), await engine.changed("b")] == [False, True, False]
    assert not await another.changed()


async def test_what_was_written_while_nobody_listened_is_noticed(
    engine: Engine, another: Engine, store: StoreSettings, execute: Execute
) -> None:
    assert await engine.changed()
    await add(another, "a")
    await until(engine.changed, "the write of another")
    listening = "query LIKE 'LISTEN%' OR query LIKE '%pg_listening_channels%'"
    found = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND ({listening})"
    assert execute(store, found)

    async def changed() -> bool:
        try:
            return await engine.changed()
        except StoreUnavailable:
            return False

    await until(changed, "a new connection")
    await add(another, "b")
    await until(changed, "the write of another")


async def test_a_transaction_that_wrote_nothing_tells_nobody(engine: Engine, another: Engine) -> None:
    await engine.changed()
    async with another.transaction() as transaction:
        await transaction.execute("UPDATE meta SET value = :value WHERE name = 'none'", {"value": b""})
    await another.check_writable()
    await add(another, "a")
    await until(engine.changed, "the write of another")
    assert not await engine.changed()


async def test_the_time_is_that_of_the_server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 300)
    assert abs(engine.now() - now) < 2


async def test_a_reading_command_can_not_write(store: StoreSettings) -> None:
    opened = await open_store_read_only(store)
    try:
        assert await count(opened) == 0
        with pytest.raises(StoreUnavailable, match="read-only"):
            await add(opened, "a")
        with pytest.raises(StoreUnavailable, match="read-only"):
            await opened.check_writable()
    finally:
        await opened.close()


async def test_a_row_that_something_else_has_changed_is_missing(
    engine: Engine, store: StoreSettings, execute: Execute, caplog: pytest.LogCaptureFixture
) -> None:
    stored = await Grants(engine).add(grant())
    execute(store, "UPDATE grants SET token_endpoint = 'https://attacker.example'")
    assert await Grants(engine).get(stored.id) is None
    assert await Grants(engine).all() == []
    assert "something else than mcp-auth-proxy has changed it" in caplog.text


async def test_an_id_is_never_used_again(engine: Engine) -> None:
    grants = Grants(engine)
    first = await grants.add(grant())
    await grants.delete_one(first.id)
    assert (await grants.add(grant())).id > first.id


async def test_tables_that_are_not_ours_any_more_are_named(
    engine: Engine, store: StoreSettings, execute: Execute
) -> None:
    execute(store, "ALTER TABLE shared_secrets DROP COLUMN seal")
    with pytest.raises(StoreUnavailable, match="its tables are not as mcp-auth-proxy has made them"):
        await SharedSecrets(engine).get("a")


async def test_the_proxy_goes_on_after_the_server_was_started_again(
    own_server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = await open_store(settings_for(own_server.url("store"), tmp_path))
    try:
        await add(engine, "a")
        await engine.changed()
        own_server.stop("immediate")
        with pytest.raises(StoreUnavailable, match="can't be reached"):
            await count(engine)
        with pytest.raises(StoreUnavailable, match="can't be reached"):
            await add(engine, "b")
        with pytest.raises(StoreUnavailable):
            await engine.check_writable()
        await until(lambda: _holds("none is renewed" in caplog.text), "the line in the log")
        own_server.start()
        await until(lambda: _works(engine.check_writable()), "the store")
        assert await count(engine) == 1
        await add(engine, "c")
        await until(lambda: _works(engine.changed()), "the listener")
        assert (caplog.text.count("none is renewed"), caplog.text.count("works again")) == (1, 1)
        # Idle connections that the server has closed are not noticed by anybody.
        own_server.stop()
        own_server.start()
        await add(engine, "d")
        assert await count(engine) == 3
    finally:
        await engine.close()


async def test_a_server_that_is_frozen_is_given_up_in_time(
    own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await open_store(settings_for(own_server.url("store"), tmp_path))
    monkeypatch.setattr(connection_module, "STATEMENT_TIMEOUT", 1.0)
    monkeypatch.setattr(connection_module.Connection._bounded, "__defaults__", (1.0,))
    monkeypatch.setattr(connection_module.Connection.command, "__kwdefaults__", {"timeout": 1.0})
    try:
        await asyncio.gather(*(count(engine) for _ in range(4)))
        with own_server.frozen():
            began = time.monotonic()
            found = await asyncio.gather(count(engine), add(engine, "a"), count(engine), return_exceptions=True)
            assert all(isinstance(each, StoreUnavailable) for each in found)
            assert time.monotonic() - began < 9
            with pytest.raises(StoreUnavailable):
                await count(engine)
        await until(lambda: _works(add(engine, "b")), "the store")
        assert await count(engine) == 1
    finally:
        await engine.close()


async def _holds(condition: object) -> bool:
    return bool(condition)


async def _works(work: Awaitable[object]) -> bool:
    try:
        await work
    except StoreUnavailable:
        return False
    return True
