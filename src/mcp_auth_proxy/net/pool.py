"""The kept connections to one origin, a bounded number."""

import asyncio
import socket
from collections import deque

from mcp_auth_proxy.errors import UpstreamPoolTimeout, UpstreamProtocolError, UpstreamUnreachable
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_connection import Connection
from mcp_auth_proxy.net.urls import Origin

IDLE_TIMEOUT = 30.0
"""Seconds that an idle connection is kept where the upstream shows no shorter habit."""

LEARNED_SHARE = 0.8
"""How much of the age at which an upstream closed a connection the next ones are kept for."""

LEARNED_FOR = 60.0
LEARNED_BRIEFLY = 10.0
"""Seconds after which a learnt life, and one of under a second, is forgotten: the close may have been a restart."""

MIN_LEARNED_IDLE = 1.0
"""Seconds of idleness from which a close that harmed nobody is taken for a habit of the upstream."""

REAP_INTERVAL = 5.0
"""Seconds between looks for idle connections whose life is over."""

BUSY_WAIT = 5.0
"""Seconds that a request waits for one of the connections of an origin."""


class ConnectionPool:
    """The connections to one origin. The one idle for the shortest time is used first, so that the others can go."""

    def __init__(self, origin: Origin, dialer: Dialer, limit: int, buffer: memoryview) -> None:
        self.name = str(origin)
        self.buffer = buffer
        self._origin = origin
        self._dialer = dialer
        self.limit = limit
        self._loop = asyncio.get_running_loop()
        self._slots = 0
        """Connections, and those being made."""
        self._made: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._life = IDLE_TIMEOUT
        self._learned_until = 0.0
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def open(self) -> int:
        """How many connections there are, idle or in use."""
        return len(self._made)

    @property
    def idle(self) -> int:
        return len(self._idle)

    # For requests

    def acquire_nowait(self) -> Connection | None:
        """Return an idle connection that is seen to be open, or None."""
        if not self._idle:
            return None
        now = self._loop.time()
        life = self._current_life(now)
        while self._idle:
            connection = self._idle.pop()
            connection.idle_for = age = now - connection.idle_since
            if age < life and age < connection.idle_timeout and connection.is_open():
                return connection
            connection.close()
        return None

    async def acquire(self) -> Connection:
        """Return a new connection; where no more are allowed, the first that comes free.

        Raises UpstreamUnreachable and UpstreamBusy.
        """
        while self._slots >= self.limit:
            connection = await self._wait()
            if connection is None:
                break  # the place of a connection that is gone, counted already
            if connection.is_open():
                return connection
            connection.close()
        else:
            self._slots += 1
        try:
            connection = await self._dialer.open(self._origin, self._make)
            if connection.closed or self._closed:
                connection.abort()
                raise UpstreamUnreachable(f"{self.name} can't be reached: it closed the connection at once.")
        except BaseException:
            self._free_slot()
            raise
        self._made.add(connection)
        return connection

    def stale(self, connection: Connection) -> None:
        self.learn(connection.idle_for)

    def learn(self, age: float) -> None:
        """The upstream closed a connection that had been idle for this long (seconds): keep others shorter."""
        now = self._loop.time()
        self._life = min(self._current_life(now), age * LEARNED_SHARE)
        self._learned_until = now + (LEARNED_FOR if age >= MIN_LEARNED_IDLE else LEARNED_BRIEFLY)

    def close(self) -> None:
        """Abort every connection, and refuse new ones."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(UpstreamPoolTimeout("The proxy is shutting down."))
        for connection in list(self._made):
            connection.fail(UpstreamProtocolError("the proxy is shutting down."))
        self._idle.clear()

    # For connections

    def released(self, connection: Connection) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                connection.idle_for = 0.0
                waiter.set_result(connection)
                return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = self._loop.call_later(REAP_INTERVAL, self._reap)

    def connection_closed(self, connection: Connection, *, idle: bool) -> None:
        if connection not in self._made:
            return
        self._made.discard(connection)
        if idle and connection in self._idle:
            self._idle.remove(connection)
            age = self._loop.time() - connection.idle_since
            if age >= MIN_LEARNED_IDLE:
                self.learn(age)
        self._free_slot()

    def _make(self, sock: socket.socket) -> Connection:
        return Connection(self, sock)

    async def _wait(self) -> Connection | None:
        """Return a connection that came free, or None for a place in which a new one may be made."""
        waiter: asyncio.Future[Connection | None] = self._loop.create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(BUSY_WAIT):
                return await waiter
        except TimeoutError:
            self._give_back(waiter)
        except asyncio.CancelledError:
            self._give_back(waiter)
            raise
        raise UpstreamPoolTimeout(
            f"All {self.limit} connections to {self.name} are in use, and none came free within {BUSY_WAIT:g} s; "
            "limits.upstream_connections allows more."
        )

    def _give_back(self, waiter: asyncio.Future[Connection | None]) -> None:
        """What came in the very moment in which the waiting ended."""
        if not waiter.done() or waiter.cancelled() or waiter.exception() is not None:
            return
        connection = waiter.result()
        if connection is None:
            self._free_slot()
        elif not connection.closed:
            self.released(connection)

    def _free_slot(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._slots -= 1

    def _current_life(self, now: float) -> float:
        if self._life < IDLE_TIMEOUT and now > self._learned_until:
            self._life = IDLE_TIMEOUT
        return self._life

    def _reap(self) -> None:
        now = self._loop.time()
        life = self._current_life(now)
        for connection in [c for c in self._idle if now - c.idle_since >= min(life, c.idle_timeout)]:
            self._idle.remove(connection)
            connection.close()
        self._reaper = self._loop.call_later(REAP_INTERVAL, self._reap) if self._idle else None
