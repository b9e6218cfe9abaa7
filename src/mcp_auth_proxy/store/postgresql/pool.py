"""The connections of the process, a few at most. A broken one is dropped, and the next use connects again."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp_auth_proxy.config.settings import PostgresqlUrl
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store.postgresql.clock import ServerClock
from mcp_auth_proxy.store.postgresql.connection import Connection

SIZE = 4
"""Connections besides that of the listener."""

QUEUE_TIMEOUT = 8.0
"""Seconds to wait for one of them."""

PAUSE = 1.0
"""Seconds after a failure to connect in which nobody tries again: each attempt may take long."""


class Pool:
    """Connections to one database. ``close`` must be awaited."""

    def __init__(self, url: PostgresqlUrl, clock: ServerClock, *, read_only: bool = False) -> None:
        self._url = url
        self._clock = clock
        self._read_only = read_only
        self._places = asyncio.Semaphore(SIZE)
        self._idle: list[Connection] = []
        self._failure: StoreUnavailable | None = None
        self._failed_at = 0.0
        self._closed = False

    @asynccontextmanager
    async def connection(self, *, fresh: bool = False) -> AsyncIterator[Connection]:
        """Lend a connection; with ``fresh`` a new one, and those that are idle are dropped. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(QUEUE_TIMEOUT):
                await self._places.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"The store {self._url} is busy and was not free in time. Try again.") from None
        connection: Connection | None = None
        try:
            if self._closed:
                raise StoreUnavailable("The store is closed: the proxy is shutting down.")
            if fresh:
                await self._drop_idle()
            connection = self._idle.pop() if self._idle else await self.connect()
            yield connection
        finally:
            try:
                if connection is not None:
                    await self._take_back(connection)
            finally:
                self._places.release()

    async def connect(self) -> Connection:
        """Return a connection that is not of the pool. Raises StoreUnavailable, at once for a while after a failure."""
        if self._failure is not None and time.monotonic() < self._failed_at + PAUSE:
            raise type(self._failure)(str(self._failure))
        try:
            connection = await Connection.open(self._url, self._clock, read_only=self._read_only)
        except StoreUnavailable as error:
            self._failure, self._failed_at = error, time.monotonic()
            # What was connected before is gone too, most likely, and would have to be found out one by one.
            await self._drop_idle()
            raise
        self._failure = None
        return connection

    async def close(self) -> None:
        """Close all connections, once those in use are given back. May be called again."""
        self._closed = True
        for _ in range(SIZE):
            await self._places.acquire()
        await self._drop_idle()
        for _ in range(SIZE):
            self._places.release()

    async def _take_back(self, connection: Connection) -> None:
        if self._closed or connection.broken or connection.in_transaction:
            await connection.close()
        else:
            connection.was_idle = True
            self._idle.append(connection)

    async def _drop_idle(self) -> None:
        while self._idle:
            await self._idle.pop().close()
