"""A pool of connections to one origin, bounded in number and kept alive between requests."""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable

from mcp_auth_proxy.errors import UpstreamPoolTimeout, UpstreamProtocolError, UpstreamUnreachable
from mcp_auth_proxy.net.addresses import AddressPolicy, AddressRefused
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_connection import HttpConnection
from mcp_auth_proxy.net.urls import Origin

IDLE_TIMEOUT = 30.0
"""Seconds that an idle connection is kept, unless the server has shown or announced that it closes sooner."""

LEARNED_SHARE = 0.8
"""If a server closed an idle connection, the next ones are kept for this share of the time it was idle."""

LEARNED_FOR = 60.0
"""Seconds for which a learned idle timeout holds: the close may have been a restart."""

LEARNED_BRIEFLY = 10.0
"""The same for a learned idle timeout of less than ``MIN_LEARNED_IDLE``."""

MIN_LEARNED_IDLE = 0.5
"""Seconds. If a connection was idle for at least this long when the server closed it, that was its idle timeout.

After less, it may have been a restart, so this counts only if the next connection ends in the same way."""

REAP_INTERVAL = 5.0
"""Seconds between two searches for connections that have been idle for too long."""

POOL_TIMEOUT = 5.0
"""Seconds that a request waits for a connection if all are in use."""


class SharedSlots:
    """The connections of all pools together, open or being opened: each takes a descriptor of the process."""

    def __init__(self, limit: int, close_idle: Callable[[], bool]) -> None:
        """``close_idle`` closes an idle connection of any pool; it returns False if there is none."""
        self.limit = limit
        self.used = 0
        self._close_idle = close_idle

    def acquire(self) -> None:
        """Take a slot; close an idle connection if none is left. Raises UpstreamPoolTimeout if none is idle either."""
        if self.used >= self.limit and not self._close_idle():
            raise UpstreamPoolTimeout(
                f"All {self.limit} connections that the process may open to servers are in use: its limit on open "
                "files (ulimit -n) is too low."
            )
        self.used += 1

    def release(self) -> None:
        self.used -= 1


class ConnectionPool:
    """The connections to one origin. The most recently used is acquired first, so that the others can expire.

    ``limit`` bounds their number; ``connect_timeout`` is in seconds; all connections read into ``buffer``. Each address
    that is dialed is checked with ``policy``; None: the origin may lead anywhere.
    """

    def __init__(
        self,
        origin: Origin,
        dialer: Dialer,
        *,
        limit: int,
        connect_timeout: float,
        buffer: memoryview,
        shared: SharedSlots,
        policy: AddressPolicy | None = None,
    ) -> None:
        self.name = str(origin)
        self.buffer = buffer
        self._origin = origin
        self._dialer = dialer
        self._policy = policy
        self.limit = limit
        self._connect_timeout = connect_timeout
        self._loop = asyncio.get_running_loop()
        self._shared = shared
        self._slots = 0
        """Connections, open or being opened. At most ``limit``."""
        self._connections: set[HttpConnection] = set()
        self._idle: deque[HttpConnection] = deque()
        self._waiters: deque[asyncio.Future[HttpConnection | None]] = deque()
        """Requests that wait for a released connection, or for None: a free slot to open one."""
        self._idle_timeout = IDLE_TIMEOUT
        self._learned_until = 0.0
        self._suspected_at = float("-inf")
        """When a connection was last closed at its first reuse, after a brief idle time."""
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def open(self) -> int:
        """The number of connections, idle or in use."""
        return len(self._connections)

    @property
    def idle(self) -> int:
        """The number of idle connections."""
        return len(self._idle)

    # For requests

    def acquire_nowait(self) -> HttpConnection | None:
        """Return an idle connection that is still open, or None."""
        if not self._idle:
            return None
        now = self._loop.time()
        idle_timeout = self._current_idle_timeout(now)
        while self._idle:
            connection = self._idle.pop()
            connection.idle_for = idle_for = now - connection.idle_since
            if idle_for < idle_timeout and idle_for < connection.idle_timeout and connection.is_open():
                return connection
            connection.close()
        return None

    async def acquire(self) -> HttpConnection:
        """Return a new connection or, if no more are allowed, the next one that is released.

        Raises UpstreamUnreachable, and UpstreamPoolTimeout if none is released in time.
        """
        while self._slots >= self.limit:
            connection = await self._wait()
            if connection is None:
                break  # the slot of a closed connection, which is counted already
            if connection.is_open():
                return connection
            connection.close()
        else:
            self._shared.acquire()
            self._slots += 1
        try:
            connection = await self._connect()
        except BaseException:  # also if the request is cancelled: a slot that is not released is lost for good
            self._release_slot()
            raise
        self._connections.add(connection)
        return connection

    def learn_idle_timeout(self, idle_for: float) -> None:
        """Keep connections for a shorter time: the server closed one that had been idle for ``idle_for`` seconds."""
        now = self._loop.time()
        self._idle_timeout = min(self._current_idle_timeout(now), idle_for * LEARNED_SHARE)
        self._learned_until = now + (LEARNED_FOR if idle_for >= MIN_LEARNED_IDLE else LEARNED_BRIEFLY)

    @property
    def idle_since(self) -> float | None:
        """When the connection that has been idle for longest was released; None if none is idle."""
        return self._idle[0].idle_since if self._idle else None

    def close_idle(self) -> None:
        """Close the connection that has been idle for longest."""
        self._idle.popleft().close()

    def close(self) -> None:
        """Abort every connection and refuse new ones."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(UpstreamPoolTimeout("The proxy is shutting down."))
        for connection in list(self._connections):
            connection.fail(UpstreamProtocolError("the proxy is shutting down."))
        self._idle.clear()

    # PoolCallbacks

    def connection_released(self, connection: HttpConnection) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                connection.idle_for = 0.0
                waiter.set_result(connection)
                return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = self._loop.call_later(REAP_INTERVAL, self._reap)

    def connection_stale(self, connection: HttpConnection) -> None:
        if connection.idle_for >= MIN_LEARNED_IDLE:
            self.learn_idle_timeout(connection.idle_for)
        elif connection.uses == 2:
            # A server that closes after each response without saying so: it does this to connections that were opened
            # since, too. One that was reused before shows that the server keeps them.
            now, suspected_at = time.monotonic(), self._suspected_at
            self._suspected_at = now
            if connection.opened_at > suspected_at > now - LEARNED_FOR:
                self.learn_idle_timeout(connection.idle_for)

    def connection_closed(self, connection: HttpConnection, *, idle: bool) -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        if idle and connection in self._idle:
            self._idle.remove(connection)
            idle_for = self._loop.time() - connection.idle_since
            if idle_for >= MIN_LEARNED_IDLE:
                self.learn_idle_timeout(idle_for)
        self._release_slot()

    # Connections and slots

    async def _connect(self) -> HttpConnection:
        try:
            connection = await self._dialer.open(
                self._origin, self._new_connection, timeout=self._connect_timeout, policy=self._policy
            )
            if connection.closed or self._closed:
                connection.abort()
                raise UpstreamUnreachable("it closed the connection at once")
        except UpstreamUnreachable as error:
            raise UpstreamUnreachable(f"{self.name} can't be reached: {error}.") from None
        except AddressRefused as refused:
            raise UpstreamUnreachable(
                f"{self.name} is not used: {refused}; if that is intended, list the host in the key "
                "admin.allow_private."
            ) from None
        return connection

    def _new_connection(self, sock: socket.socket) -> HttpConnection:
        return HttpConnection(self, sock)

    async def _wait(self) -> HttpConnection | None:
        """Wait for a released connection, or for None: a free slot to open one. Raises UpstreamPoolTimeout."""
        waiter: asyncio.Future[HttpConnection | None] = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(POOL_TIMEOUT):
                return await waiter
        except TimeoutError:
            self._return_unused(waiter)
        except asyncio.CancelledError:
            self._return_unused(waiter)
            raise
        raise UpstreamPoolTimeout(
            f"All {self.limit} connections to {self.name} are in use, and none was released within "
            f"{POOL_TIMEOUT:g} s; limits.upstream_connections allows more."
        )

    def _return_unused(self, waiter: asyncio.Future[HttpConnection | None]) -> None:
        """Return a connection or a slot that was handed over just as the wait ended."""
        if not waiter.done() or waiter.cancelled() or waiter.exception() is not None:
            return
        connection = waiter.result()
        if connection is None:
            self._release_slot()
        elif not connection.closed:
            self.connection_released(connection)

    def _release_slot(self) -> None:
        # A slot over the limit, which was lowered meanwhile, goes to nobody.
        while self._waiters and self._slots <= self.limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._slots -= 1
        self._shared.release()

    def _current_idle_timeout(self, now: float) -> float:
        if self._idle_timeout < IDLE_TIMEOUT and now > self._learned_until:
            self._idle_timeout = IDLE_TIMEOUT
        return self._idle_timeout

    def _reap(self) -> None:
        """Close the connections that have been idle for too long."""
        now = self._loop.time()
        idle_timeout = self._current_idle_timeout(now)
        for connection in [c for c in self._idle if now - c.idle_since >= min(idle_timeout, c.idle_timeout)]:
            self._idle.remove(connection)
            connection.close()
        self._reaper = self._loop.call_later(REAP_INTERVAL, self._reap) if self._idle else None
