"""One connection to the server. Every wait on it is bounded: a server that is frozen must not stop the proxy."""

import asyncio
import contextlib
import logging
import os
import socket
import traceback
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row
from psycopg.types.numeric import Int4BinaryDumper, Int8

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.config.settings import PostgresqlUrl
from mcp_auth_proxy.store.engine import NO_PARAMS, Params, Row
from mcp_auth_proxy.store.postgresql.clock import ServerClock, boot_time
from mcp_auth_proxy.store.postgresql.errors import lost, translated, unreachable
from mcp_auth_proxy.store.postgresql.statements import numbered

T = TypeVar("T")

STATEMENT_TIMEOUT = 6.0
"""Seconds. Our statements take milliseconds, or LOCK_TIMEOUT."""

LOCK_TIMEOUT = 5.0
"""Seconds that a statement waits for what others have locked."""

CONNECT_TIMEOUT = 8.0
"""Seconds for all addresses of the server; each is given half of them."""

_IDLE_IN_TRANSACTION = 4.0
"""Seconds after which the server ends a transaction that goes on with nothing: its process was stopped."""

_LAST_WAIT = 1.0
"""Seconds for a statement whose task was cancelled, and for the end of a connection that was cut."""

_PREPARE_AFTER = 2
_WRITES = ("INSERT", "UPDATE", "DELETE")
_DEFAULTS = {
    # Parameter → variable that may name it instead, and value.
    "connect_timeout": ("PGCONNECT_TIMEOUT", str(int(CONNECT_TIMEOUT / 2))),
    "fallback_application_name": ("", "mcp-auth-proxy"),
    "client_encoding": ("", "UTF8"),
    "keepalives_idle": ("", "5"),
    "keepalives_interval": ("", "2"),
    "keepalives_count": ("", "2"),
    "tcp_user_timeout": ("", str(int(1000 * STATEMENT_TIMEOUT))),
}
_SESSION = f"""
    SET statement_timeout = {int(1000 * STATEMENT_TIMEOUT)};
    SET lock_timeout = {int(1000 * LOCK_TIMEOUT)};
    SET idle_in_transaction_session_timeout = {int(1000 * _IDLE_IN_TRANSACTION)};
    SET client_min_messages = warning;
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
_READ_ONLY = "SET default_transaction_read_only = on"
_TIME = "SELECT extract(epoch FROM clock_timestamp())::float8 AS now"


@dataclass(frozen=True, slots=True)
class Result:
    """What a statement has returned, and whether it has changed rows."""

    rows: list[Row]
    wrote: bool


class Connection:
    """A connection in autocommit mode. Use it in one task at a time; ``close`` must be awaited."""

    def __init__(self, url: PostgresqlUrl, raw: "psycopg.AsyncConnection[DictRow]") -> None:
        self.url = url
        self.raw = raw
        self._cut = False
        self._is_stale = False
        self.was_idle = False
        """Whether it has been in use before."""

    @classmethod
    async def open(cls, url: PostgresqlUrl, clock: ServerClock, *, read_only: bool = False) -> Self:
        """Connect, and set what holds for the session. Raises StoreUnavailable."""
        # It warns of what follows from a lost connection, which is reported once, as an error of the store.
        logging.getLogger("psycopg").setLevel(logging.ERROR)
        secret_values.remember(os.environ.get("PGPASSWORD"))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                raw = await _connected(url)
        except (psycopg.Error, OSError, TimeoutError) as error:
            raise unreachable(url, error) from None
        # One type for nearly every int: each combination of types is a statement of its own to prepare.
        raw.adapters.register_dumper(int, Int4BinaryDumper)
        connection = cls(url, raw)
        try:
            await connection.command(_SESSION)
            if read_only:
                await connection.command(_READ_ONLY)
            await connection.measure(clock)
        except BaseException:  # also if cancelled: the connection would stay open
            await connection.close()
            raise
        return connection

    @property
    def broken(self) -> bool:
        """Whether the connection is of no use any more."""
        return self._cut or self._is_stale or self.raw.closed

    @property
    def is_outdated(self) -> bool:
        """Whether it was of no use from the start, and another one may be: the server was started again meanwhile, or
        a migration has changed a table that prepared statements read."""
        return self._is_stale or (self.was_idle and self.raw.closed and not self._cut)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and not ended."""
        return not self.broken and self.raw.pgconn.transaction_status != TransactionStatus.IDLE

    @property
    def has_failed(self) -> bool:
        """Whether a statement of the running transaction has failed, so that it can't be committed."""
        return not self.broken and self.raw.pgconn.transaction_status == TransactionStatus.INERROR

    async def run(self, sql: str, params: Params = NO_PARAMS) -> Result:
        """Run one statement with named parameters. Raises StoreUnavailable."""
        statement = numbered(sql)
        return await self._bounded(self._execute(statement.text, [_sent(params[name]) for name in statement.names]))

    async def run_both(self, sql: str, params: Params, after: str) -> tuple[Result, Result]:
        """Run a statement and, without waiting, one that has no parameters. Raises StoreUnavailable."""
        statement = numbered(sql)
        values = [_sent(params[name]) for name in statement.names]
        return await self._bounded(self._execute_both(statement.text, values, after))

    async def command(self, text: str, *, timeout: float = STATEMENT_TIMEOUT) -> list[Row]:
        """Run statements without parameters, all at once; return the rows of the last. Raises StoreUnavailable."""
        return await self._bounded(self._command(text), timeout)

    async def measure(self, clock: ServerClock) -> None:
        """Ask for the server's time. Raises StoreUnavailable."""
        asked_at = boot_time()
        result = await self.run(_TIME)
        clock.measured(result.rows[0]["now"], asked_at=asked_at, answered_at=boot_time())

    async def close(self) -> None:
        """Close the connection. A transaction that was not committed is rolled back by the server."""
        with contextlib.suppress(psycopg.Error, OSError):
            await self.raw.close()

    async def _execute(self, text: str, values: Sequence[object]) -> Result:
        with translated(self.url), self._noting_staleness():
            # The text is one of our own statements, in which numbers stand for values.
            return await _result(await self.raw.execute(text, values, binary=True))

    async def _execute_both(self, text: str, values: Sequence[object], after: str) -> tuple[Result, Result]:
        with translated(self.url), self._noting_staleness():
            async with self.raw.pipeline():
                first = await self.raw.execute(text, values, binary=True)
                second = await self.raw.execute(after, binary=True)
            return await _result(first), await _result(second)

    @contextlib.contextmanager
    def _noting_staleness(self) -> Iterator[None]:
        try:
            yield
        except psycopg.errors.FeatureNotSupported:
            # "cached plan must not change result type"
            self._is_stale = True
            raise

    async def _command(self, text: str) -> list[Row]:
        with translated(self.url):
            cursor = await self.raw.execute(text, prepare=False)
            while cursor.nextset():
                pass
            return (await _result(cursor)).rows

    async def _bounded(self, work: Coroutine[Any, Any, T], timeout: float = STATEMENT_TIMEOUT) -> T:
        """Wait for a statement, for a limited time; if its task is cancelled meanwhile, only a little longer.

        A driver that is cancelled would wait for the server to notice, which may be frozen. So the connection is cut
        instead, which ends the statement here.
        """
        task = asyncio.ensure_future(work)
        cancellation: asyncio.CancelledError | None = None
        try:
            # The server's own limit comes first: it leaves the connection usable.
            await asyncio.wait([task], timeout=timeout + _LAST_WAIT)
        except asyncio.CancelledError as error:
            cancellation = error
            await self._wait_again(task)
        if not task.done():
            self._cut_off()
            await self._wait_again(task)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if cancellation is not None:
            if not task.cancelled():
                task.exception()  # retrieved, or asyncio would log that it never was
            raise cancellation
        if self._cut:
            raise lost(self.url)
        return task.result()

    async def _wait_again(self, task: "asyncio.Task[Any]") -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=_LAST_WAIT)

    def _cut_off(self) -> None:
        """End the connection for both directions, though a statement is waiting on it."""
        self._cut = True
        with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.raw.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)


async def _connected(url: PostgresqlUrl) -> "psycopg.AsyncConnection[DictRow]":
    try:
        return await psycopg.AsyncConnection.connect(
            url.text,
            autocommit=True,
            prepare_threshold=_PREPARE_AFTER,
            row_factory=dict_row,
            cursor_factory=psycopg.AsyncRawCursor,
            **_defaults(url),
        )
    except BaseException as error:  # also if cancelled
        # The driver's frames hold the socket for as long as anything holds the error. Meanwhile the server waits for
        # the rest of the login, a minute at most, in which no database of it can be dropped.
        traceback.clear_frames(error.__traceback__)
        raise


async def _result(cursor: "psycopg.AsyncCursor[DictRow]") -> Result:
    rows: list[Any] = await cursor.fetchall() if cursor.description is not None else []
    return Result(rows, (cursor.statusmessage or "").startswith(_WRITES) and cursor.rowcount > 0)


def _sent(value: object) -> object:
    return Int8(value) if type(value) is int and not -(2**31) <= value < 2**31 else value


def _defaults(url: PostgresqlUrl) -> dict[str, Any]:
    """Return the parameters that neither the URL nor the environment gives. All are texts, as libpq wants them."""
    given = conninfo.conninfo_to_dict(url.text)
    return {
        name: value
        for name, (variable, value) in _DEFAULTS.items()
        if given.get(name) is None and not (variable and os.environ.get(variable))
    }
