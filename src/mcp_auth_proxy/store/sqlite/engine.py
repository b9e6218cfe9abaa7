"""The one connection of the process to the store: transactions, reads, and their errors."""

import asyncio
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiosqlite

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import StoreError, StoreUnavailable
from mcp_auth_proxy.store.broken_rows import BrokenRows
from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.engine import NO_PARAMS, Params, Row, Transaction
from mcp_auth_proxy.store.lease import Owners
from mcp_auth_proxy.store.schema_guard import SchemaGuard
from mcp_auth_proxy.store.sqlite import schema
from mcp_auth_proxy.store.sqlite.bootstrap import connect, existing_keys, obtain_keys, prepare, read_copy
from mcp_auth_proxy.store.sqlite.errors import translated
from mcp_auth_proxy.store.sqlite.paths import write_obstacle
from mcp_auth_proxy.store.uninterrupted import uninterrupted

_PRAGMAS = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON")
_PROBE = """
    INSERT INTO meta (name, value) VALUES ('probe', :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
_QUEUE_TIMEOUT = 10.0
_STATEMENT_TIMEOUT = 8.0
"""Seconds. Our statements take milliseconds, or BUSY_TIMEOUT; a view in place of a table may never end."""

_STEPS_BETWEEN_CHECKS = 100_000
_MIN_FREE_BYTES = 256 * 1024
logger = logging.getLogger(__name__)


class SqliteEngine:
    """An ``Engine`` on a SQLite file. Create it with ``open`` or ``open_read_only``; ``close`` must be awaited."""

    def __init__(self, connection: aiosqlite.Connection, path: Path, cipher: Cipher) -> None:
        self.cipher = cipher
        self.owners = Owners(path.resolve())
        self._path = path
        self._connection = connection
        self._lock = asyncio.Lock()
        self._identity = _identity(path)
        self._schema = SchemaGuard(str(path), len(schema.MIGRATIONS))
        self._data_versions: dict[str, int] = {}
        self._statement_begun_at = 0.0
        self._closed = False
        self._last_write_failed = False
        self._broken_rows = BrokenRows()

    @classmethod
    async def open(
        cls, settings: StoreSettings, *, announce: Callable[[str], None], environ: Mapping[str, str] = os.environ
    ) -> "SqliteEngine":
        """Open, create or migrate the store; see ``store.open_store``."""
        keys, created = await asyncio.to_thread(obtain_keys, settings, environ)
        cipher = Cipher(keys)
        try:
            await asyncio.to_thread(prepare, settings.path, cipher)
        except StoreError:
            if created is not None and not settings.path.exists():
                created.unlink(missing_ok=True)
            raise
        if created is not None:
            announce(f"A new store key was made: {created}. Back it up: without it the store can't be opened.")
        connection = await _connect(settings.path)
        try:
            engine = cls(connection, settings.path, cipher)
            await connection.set_progress_handler(engine._is_overdue, _STEPS_BETWEEN_CHECKS)
            for pragma in _PRAGMAS:
                await engine._run(pragma)
            await engine.changed()
        except BaseException:  # also if cancelled: the database thread would keep the process alive
            await uninterrupted(connection.close())
            raise
        return engine

    @classmethod
    async def open_read_only(
        cls, settings: StoreSettings, *, environ: Mapping[str, str] = os.environ
    ) -> "SqliteEngine":
        """Open the store without writing anything; see ``store.open_store_read_only``."""
        cipher = Cipher(await asyncio.to_thread(existing_keys, settings, environ))
        memory = await asyncio.to_thread(read_copy, settings.path, cipher)
        memory.row_factory = sqlite3.Row
        _silence()
        return cls(await aiosqlite.Connection(lambda: memory, 64), settings.path, cipher)

    async def close(self) -> None:
        """Close the connection and end its thread, once a running transaction has ended. May be called again."""
        await uninterrupted(self._close())

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Begin a transaction that may write; no other of this process runs meanwhile.

        It is committed, and durable, when the block ends; rolled back if the block raises or is cancelled.
        """
        async with self._exclusive():
            self._check_file()
            try:
                await self._run("BEGIN IMMEDIATE")
                # Nobody can migrate from here until the transaction ends.
                await self._check_schema()
                yield Transaction(self._run)
            except BaseException as error:  # also if cancelled: an open transaction would block every later write
                self._last_write_failed = self._last_write_failed or isinstance(error, StoreUnavailable)
                await uninterrupted(self._roll_back())
                raise
            await uninterrupted(self._commit())

    async def fetch_all(self, sql: str, params: Params = NO_PARAMS) -> list[Row]:
        """Return all rows of a query, as committed."""
        async with self._exclusive():
            try:
                rows = await self._run(sql, params)
            except StoreUnavailable:
                await self._check_schema()
                raise
            # Afterwards: if the schema is ours still, then so were the rows.
            await self._check_schema()
            return rows

    async def fetch_one(self, sql: str, params: Params = NO_PARAMS) -> Row | None:
        """Return the first row of a query, as committed, or None."""
        rows = await self.fetch_all(sql, params)
        return rows[0] if rows else None

    async def changed(self, reader: str = "") -> bool:
        """Return whether another process has written since the last call of the same ``reader``; True for its first."""
        before = self._data_versions.get(reader)
        async with self._exclusive():
            rows = await self._run("PRAGMA data_version")
            version = int(rows[0]["data_version"])
            if version != before:
                await self._check_schema()
        self._data_versions[reader] = version
        return version != before

    def now(self) -> float:
        """Return the time of this machine, in Unix seconds."""
        return time.time()

    async def check_schema(self) -> None:
        """Raise StoreMigrated if a newer version has migrated the store since it was opened."""
        async with self._exclusive():
            await self._check_schema()

    async def check_writable(self) -> None:
        """Check that the store can be written now. After a failed write this includes a write."""
        if self._last_write_failed:
            async with self.transaction() as transaction:
                await transaction.execute(_PROBE, {"value": os.urandom(8)})
        self._check_space()
        async with self._exclusive():
            self._check_file()
            try:
                await self._run("BEGIN IMMEDIATE")
                await self._check_schema()
            finally:
                await uninterrupted(self._roll_back())

    def report_broken(self, table: str, uid: str, problem: Exception) -> None:
        """Log, once for each row, that it is skipped because it can't be decrypted or decoded."""
        self._broken_rows.report(table, uid, problem)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        # There is one connection: a read within another task's transaction would see what may still be rolled back.
        try:
            async with asyncio.timeout(_QUEUE_TIMEOUT):
                await self._lock.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"The store {self._path} is busy and was not free in time. Try again.") from None
        try:
            yield
        finally:
            self._lock.release()

    async def _close(self) -> None:
        async with self._lock:
            if not self._closed:
                self._closed = True
                await self._connection.close()
                self.owners.close()

    async def _run(self, sql: str, params: Params = NO_PARAMS) -> list[Row]:
        if self._closed:
            raise StoreUnavailable("The store is closed: the proxy is shutting down.")
        self._statement_begun_at = time.monotonic()
        with translated(self._path):
            return list(await self._connection.execute_fetchall(sql, params))

    def _is_overdue(self) -> bool:
        """Return whether SQLite must interrupt the running statement. Called in the thread of the connection."""
        return time.monotonic() > self._statement_begun_at + _STATEMENT_TIMEOUT

    async def _check_schema(self) -> None:
        (row,) = await self._run("PRAGMA user_version")
        self._schema.check(int(row["user_version"]))

    async def _commit(self) -> None:
        try:
            await self._run("COMMIT")
        except BaseException:  # whatever failed, the transaction must not stay open
            self._last_write_failed = True
            await self._roll_back()
            raise
        self._last_write_failed = False

    async def _roll_back(self) -> None:
        # Statements queue for the connection's thread, so this runs after a BEGIN that was cancelled while queued.
        # SQLite raises an error if there is nothing to roll back.
        try:
            await self._run("ROLLBACK")
        except (sqlite3.Error, StoreUnavailable) as error:
            logger.debug("store: nothing rolled back (%s)", error)

    def _check_file(self) -> None:
        if _identity(self._path) != self._identity:
            raise StoreUnavailable(f"The store {self._path} was removed or replaced while in use. Restart the proxy.")

    def _check_space(self) -> None:
        if not os.access(self._path, os.W_OK):
            obstacle = write_obstacle(self._path) or f"The store {self._path} can't be written: its file is read-only."
            raise StoreUnavailable(obstacle)
        if shutil.disk_usage(self._path.parent).free < _MIN_FREE_BYTES:
            raise StoreUnavailable(f"The disk of the store {self._path} is full. Free some space.")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def _connect(path: Path) -> aiosqlite.Connection:
    _silence()
    with translated(path):
        connection = await aiosqlite.Connection(lambda: connect(path), 64)
    connection.row_factory = sqlite3.Row
    return connection


def _silence() -> None:
    # At its debug level aiosqlite logs the parameters of every statement.
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)
