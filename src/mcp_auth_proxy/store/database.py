"""Owns the one connection to the store: transactions, reads, and what goes wrong with them."""

import asyncio
import logging
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.store.bootstrap import BUSY_SECONDS, inspect, obtain_keys, prepare, wal_files
from mcp_auth_proxy.store.cipher import Cipher, load_key
from mcp_auth_proxy.store.sqlite_errors import translated

Row = sqlite3.Row
Params = Mapping[str, object] | Sequence[object]
T = TypeVar("T")

_QUEUE_SECONDS = 10.0
_SPARE_BYTES = 256 * 1024
_log = logging.getLogger(__name__)


def _ignore(line: str) -> None:
    pass


class Transaction:
    """What may be done between begin and commit."""

    def __init__(self, run: Callable[[str, Params], Coroutine[Any, Any, list[Row]]]) -> None:
        self._run = run

    async def execute(self, sql: str, params: Params = ()) -> list[Row]:
        """Runs one statement; the rows it gives, which for RETURNING are those it changed."""
        return await self._run(sql, params)

    async def fetch_one(self, sql: str, params: Params = ()) -> Row | None:
        """The first row, or None."""
        rows = await self._run(sql, params)
        return rows[0] if rows else None


class Database:
    """The store of one process. Made by ``open``; ``close`` must be awaited.

    Every method but ``open`` raises StoreUnavailable when SQLite can't do what it should now.
    """

    def __init__(self, connection: aiosqlite.Connection, path: Path, cipher: Cipher) -> None:
        self.cipher = cipher
        self.path = path
        self._connection = connection
        self._lock = asyncio.Lock()
        self._identity = _identity(path)
        self._data_version = 0
        self._closed = False
        self._last_write_failed = False
        self._reported: set[tuple[str, str]] = set()

    @classmethod
    async def open(
        cls,
        settings: StoreSettings,
        *,
        announce: Callable[[str], None] = _ignore,
        environ: Mapping[str, str] = os.environ,
    ) -> "Database":
        """Opens the store, or makes it. ``announce`` is called with the line that tells of a new key.

        Raises StoreRefused (nothing is written then) and StoreUnavailable.
        """
        keys, made = await asyncio.to_thread(obtain_keys, settings, environ)
        if made is not None:
            announce(f"A new store key was made: {made}. Back it up: without it the store can't be opened.")
        cipher = Cipher(keys)
        await asyncio.to_thread(prepare, settings.path, cipher)
        # At its debug level aiosqlite logs the parameters of every statement.
        logging.getLogger("aiosqlite").setLevel(logging.WARNING)
        uri = f"{settings.path.as_uri()}?mode=rw"
        with translated(settings.path):
            connection = await aiosqlite.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            database = cls(connection, settings.path, cipher)
            for pragma in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA foreign_keys = ON"):
                await database._run(pragma)
            await database.changed()
        except BaseException:
            await _uninterrupted(connection.close())
            raise
        return database

    @classmethod
    async def open_to_read(cls, settings: StoreSettings, *, environ: Mapping[str, str] = os.environ) -> "Database":
        """Opens a store that exists, and writes nothing: none is made, migrated or tidied up.

        Raises StoreRefused and StoreUnavailable, here or, where its schema is older than ours, from a query.
        """
        cipher = Cipher([await asyncio.to_thread(load_key, source, environ) for source in settings.keys])
        await asyncio.to_thread(inspect, settings.path, cipher)
        # As in inspect: without a log file, "immutable" keeps SQLite from making one.
        quiet = not wal_files(settings.path)[0].exists()
        uri = f"{settings.path.as_uri()}?mode=ro{'&immutable=1' if quiet else ''}"
        with translated(settings.path):
            connection = await aiosqlite.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        return cls(connection, settings.path, cipher)

    async def close(self) -> None:
        """Ends the connection and its thread, after the transaction that may be running. May be called again."""
        await _uninterrupted(self._close())

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One transaction, which may write; the only one of this process while it lasts.

        Committed, and durable, when the block ends; rolled back when it raises or is cancelled.
        """
        async with self._exclusive():
            self._check_file()
            try:
                await self._run("BEGIN IMMEDIATE")
                yield Transaction(self._run)
            except BaseException as error:
                self._last_write_failed = self._last_write_failed or isinstance(error, StoreUnavailable)
                await _uninterrupted(self._roll_back())
                raise
            await _uninterrupted(self._commit())

    async def fetch_all(self, sql: str, params: Params = ()) -> list[Row]:
        """All rows of a query, as committed."""
        async with self._exclusive():
            return await self._run(sql, params)

    async def fetch_one(self, sql: str, params: Params = ()) -> Row | None:
        """The first row of a query, as committed, or None."""
        rows = await self.fetch_all(sql, params)
        return rows[0] if rows else None

    async def changed(self) -> bool:
        """True when another process has written since the last call."""
        before = self._data_version
        rows = await self.fetch_all("PRAGMA data_version")
        self._data_version = rows[0][0]
        return self._data_version != before

    async def writable(self) -> None:
        """Returns when the store can be written now. After a failed write nothing less than a write tells."""
        if self._last_write_failed:
            async with self.transaction() as transaction:
                await transaction.execute(
                    "INSERT INTO meta (name, value) VALUES ('probe', ?) "
                    "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                    (os.urandom(8),),
                )
        self._check_space()
        async with self._exclusive():
            self._check_file()
            try:
                await self._run("BEGIN IMMEDIATE")
            finally:
                await _uninterrupted(self._roll_back())

    def report_broken(self, table: str, uid: str, problem: Exception) -> None:
        """Logs, once, that a row is skipped because it does not open."""
        if (table, uid) not in self._reported:
            self._reported.add((table, uid))
            metrics.store_failures.labels("decryption").inc()
            _log.warning("store: a row of %s is skipped (row %s): %s", table, uid, problem)

    @asynccontextmanager
    async def _exclusive(self) -> AsyncIterator[None]:
        # One connection: a read in the midst of another task's transaction would see what may yet be rolled back.
        try:
            async with asyncio.timeout(_QUEUE_SECONDS):
                await self._lock.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"The store {self.path} did not come free in time; try again.") from None
        try:
            yield
        finally:
            self._lock.release()

    async def _close(self) -> None:
        async with self._lock:
            if not self._closed:
                self._closed = True
                await self._connection.close()

    async def _run(self, sql: str, params: Params = ()) -> list[Row]:
        if self._closed:
            raise StoreUnavailable("The store is closed: the proxy is shutting down.")
        with translated(self.path):
            return list(await self._connection.execute_fetchall(sql, params))

    async def _commit(self) -> None:
        try:
            await self._run("COMMIT")
        except BaseException:
            self._last_write_failed = True
            await self._roll_back()
            raise
        self._last_write_failed = False

    async def _roll_back(self) -> None:
        # Statements queue for the connection's thread, so this comes after a BEGIN that was cancelled on its way.
        # Where there is nothing to roll back any more, SQLite says so with an error.
        try:
            await self._run("ROLLBACK")
        except (sqlite3.Error, StoreUnavailable) as error:
            _log.debug("store: nothing rolled back (%s)", error)

    def _check_file(self) -> None:
        if _identity(self.path) != self._identity:
            raise StoreUnavailable(f"The store {self.path} was removed or replaced while in use: restart the proxy.")

    def _check_space(self) -> None:
        if not os.access(self.path, os.W_OK):
            raise StoreUnavailable(f"The store {self.path} can't be written: its file is read-only.")
        if shutil.disk_usage(self.path.parent).free < _SPARE_BYTES:
            raise StoreUnavailable(f"The disk of the store {self.path} is full: free some space.")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def _uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Finishes the work even when the task is cancelled meanwhile, and only then lets the cancellation go on."""
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # seen, so that asyncio does not complain about it
    raise cancellation
