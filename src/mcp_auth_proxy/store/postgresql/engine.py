"""The store of a process in a PostgreSQL database: transactions, reads, and what others have written."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from mcp_auth_proxy.config.settings import PostgresqlUrl, StoreSettings
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store.broken_rows import BrokenRows
from mcp_auth_proxy.store.cipher import Cipher, key_warnings, load_keys
from mcp_auth_proxy.store.engine import NO_PARAMS, Params, Row, Transaction
from mcp_auth_proxy.store.lease import Owners
from mcp_auth_proxy.store.local_files import local_path
from mcp_auth_proxy.store.postgresql import schema
from mcp_auth_proxy.store.postgresql.bootstrap import BEGIN, Place, inspect, prepare
from mcp_auth_proxy.store.postgresql.clock import ServerClock
from mcp_auth_proxy.store.postgresql.connection import Connection
from mcp_auth_proxy.store.postgresql.errors import ConnectionRefused
from mcp_auth_proxy.store.postgresql.listener import Listener
from mcp_auth_proxy.store.postgresql.pool import PAUSE, QUEUE_TIMEOUT, Pool
from mcp_auth_proxy.store.schema_guard import SchemaGuard
from mcp_auth_proxy.store.uninterrupted import uninterrupted

_PROBE = """
    INSERT INTO meta (name, value) VALUES ('probe', :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""
_WRITABLE = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on' AS read_only"
logger = logging.getLogger(__name__)


class PostgresqlEngine:
    """An ``Engine`` on a PostgreSQL database. Create it with ``open``; ``close`` must be awaited.

    One transaction writes to a store at a time, as with SQLite: each waits for a lock of the database. So what a
    transaction has read does not change until it ends, and the queries need not know which engine runs them.
    """

    def __init__(
        self, url: PostgresqlUrl, pool: Pool, clock: ServerClock, place: Place, cipher: Cipher, owners: Owners
    ) -> None:
        self.cipher = cipher
        self.owners = owners
        self._url = url
        self._pool = pool
        self._clock = clock
        self._place = place
        self._name = secrets.token_hex(8)
        self._listener = Listener(pool, clock, url, channel=place.channel, own=self._name)
        self._lock = asyncio.Lock()
        self._schema = SchemaGuard(str(url), schema.NEWEST)
        self._seen: dict[str, int] = {}
        self._broken_rows = BrokenRows()
        self._last_write_failed = False

    @classmethod
    async def open(
        cls,
        settings: StoreSettings,
        *,
        read_only: bool = False,
        patience: float = 0.0,
        environ: Mapping[str, str] = os.environ,
    ) -> "PostgresqlEngine":
        """Open, create or migrate the store; with ``read_only`` nothing is written. See ``store.open_store``."""
        url = settings.postgresql
        if url is None:
            raise ValueError("the store is a file")
        for warning in () if read_only else key_warnings(settings):
            logger.warning("%s", warning)
        cipher = Cipher(await asyncio.to_thread(load_keys, settings, environ))
        clock = ServerClock()
        pool = Pool(url, clock, read_only=read_only)
        owners = Owners(settings.path if read_only else _beside(settings))
        try:
            await _wait_for(pool, url, patience)
            async with pool.connection() as connection:
                if read_only:
                    place = await inspect(connection, url, cipher)
                else:
                    place = await prepare(connection, url, cipher, owners, clock.now)
        except BaseException:  # also if cancelled: the connection would stay open
            await uninterrupted(pool.close())
            raise
        return cls(url, pool, clock, place, cipher, owners)

    async def close(self) -> None:
        """Close the connections, once a running transaction has ended. May be called again."""
        await uninterrupted(self._close())

    def now(self) -> float:
        """Return the time of the server, in Unix seconds."""
        return self._clock.now()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Begin a transaction that may write; no other on this store runs meanwhile, in any process.

        It is committed, and durable, when the block ends; rolled back if the block raises or is cancelled.
        """
        async with self._begun() as connection:
            wrote = False

            async def run(sql: str, params: Params) -> list[Row]:
                nonlocal wrote
                result = await connection.run(sql, params)
                wrote = wrote or result.wrote
                return result.rows

            try:
                yield Transaction(run)
            except BaseException as error:  # also if cancelled: an open transaction would block every later write
                self._last_write_failed = self._last_write_failed or isinstance(error, StoreUnavailable)
                await uninterrupted(self._roll_back(connection))
                raise
            await uninterrupted(self._commit(connection, told=wrote))

    async def fetch_all(self, sql: str, params: Params = NO_PARAMS) -> list[Row]:
        """Return all rows of a query, as committed."""
        async with self._pool.connection() as connection:
            try:
                return await self._read(connection, sql, params)
            except StoreUnavailable:
                if not connection.is_outdated:
                    raise
        async with self._pool.connection(fresh=True) as connection:
            return await self._read(connection, sql, params)

    async def fetch_one(self, sql: str, params: Params = NO_PARAMS) -> Row | None:
        """Return the first row of a query, as committed, or None."""
        rows = await self.fetch_all(sql, params)
        return rows[0] if rows else None

    async def changed(self, reader: str = "") -> bool:
        """Return whether another process has written since the last call of the same ``reader``; True for its first."""
        before = self._seen.get(reader)
        writes = await self._listener.listening()
        if writes != before:
            await self.check_schema()
        self._seen[reader] = writes
        return writes != before

    async def check_schema(self) -> None:
        """Raise StoreMigrated if a newer version has migrated the store since it was opened."""
        await self.fetch_all(schema.VERSION)

    async def check_writable(self) -> None:
        """Check that the store can be written now. After a failed write this includes a write."""
        if self._last_write_failed:
            async with self.transaction() as transaction:
                await transaction.execute(_PROBE, {"value": os.urandom(8)})
        row = await self.fetch_one(_WRITABLE)
        if row is not None and row["read_only"]:
            raise StoreUnavailable(
                f"The store {self._url} can't be written: the server is read-only, maybe a standby. Name the primary "
                "in store.url (target_session_attrs=read-write)."
            )

    def report_broken(self, table: str, uid: str, problem: Exception) -> None:
        """Log, once for each row, that it is skipped because it can't be decrypted or decoded."""
        self._broken_rows.report(table, uid, problem)

    async def _read(self, connection: Connection, sql: str, params: Params) -> list[Row]:
        try:
            # The schema afterwards: if it is ours still, then so were the rows.
            result, found = await connection.run_both(sql, params, schema.VERSION)
        except StoreUnavailable:
            if not connection.broken:
                self._check((await connection.run(schema.VERSION)).rows)
            raise
        self._check(found.rows)
        return result.rows

    def _check(self, rows: list[Row]) -> None:
        self._schema.check(rows[0]["version"] if rows else 0)

    @asynccontextmanager
    async def _begun(self) -> AsyncIterator[Connection]:
        """Lend a connection with a transaction that alone may write."""
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT):
                await self._lock.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"The store {self._url} is busy and was not free in time. Try again.") from None
        try:
            for fresh in (False, True):
                async with self._pool.connection(fresh=fresh) as connection:
                    try:
                        found = await connection.command(f"{BEGIN}; {self._place.lock}; {schema.VERSION}")
                    except StoreUnavailable:
                        # Nothing was done yet, so it may be begun again.
                        if connection.is_outdated and not fresh:
                            continue
                        self._last_write_failed = True
                        raise
                    self._check(found)
                    yield connection
                    return
        finally:
            self._lock.release()

    async def _commit(self, connection: Connection, *, told: bool) -> None:
        """Commit; ``told``: tell the other processes, which hear of it with the commit or not at all."""
        try:
            if connection.has_failed:
                raise StoreUnavailable(f"The store {self._url} has kept nothing of a transaction that failed.")
            notify = f"SELECT pg_notify('{self._place.channel}', '{self._name}'); " if told else ""
            await connection.command(f"{notify}COMMIT")
        except BaseException:  # whatever failed, the transaction must not stay open
            self._last_write_failed = True
            await self._roll_back(connection)
            raise
        self._last_write_failed = False

    async def _roll_back(self, connection: Connection) -> None:
        if connection.in_transaction:
            try:
                await connection.command("ROLLBACK")
            except StoreUnavailable as error:
                logger.debug("store: nothing rolled back (%s)", error)

    async def _close(self) -> None:
        async with self._lock:
            await self._listener.close()
            await self._pool.close()
            self.owners.close()


def _beside(settings: StoreSettings) -> Path:
    """Return the path beside which processes on this machine have their files; one of nothing, if none is safe."""
    try:
        return local_path(settings)
    except OSError:
        return Path(os.devnull, settings.path.name)


async def _wait_for(pool: Pool, url: PostgresqlUrl, patience: float) -> None:
    """Connect; try again for ``patience`` seconds while the server can't be reached. Raises StoreUnavailable."""
    loop = asyncio.get_running_loop()
    until, has_told = loop.time() + patience, False
    while True:
        try:
            async with pool.connection():
                return
        except ConnectionRefused:
            raise
        except StoreUnavailable as error:
            if loop.time() + PAUSE >= until:
                raise
            if not has_told:
                has_told = True
                logger.warning("%s It is tried again for %.0f seconds.", error, patience)
        await asyncio.sleep(PAUSE)
