"""Requests to upstreams over kept connections, a bounded number to each origin.

When is a request sent twice? Never once a byte of its response has come, and never where it may have been acted
upon and must not be repeated (design §4.4). A kept connection is looked at before it is used, so one that the
upstream had closed by then costs nothing (§4.7). What remains is the close that crosses the request on its way:
GET, HEAD, DELETE and the like are then sent once more on a new connection (RFC 9110 §9.2.2); a POST is not, since
nothing tells this case from a server that died over the tool call. To make that rare, the life of idle connections
is kept under what the upstream announces (``Keep-Alive: timeout``) or has shown.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Mapping

from mcp_auth_proxy.config.settings import OutboundSettings
from mcp_auth_proxy.errors import UpstreamPoolTimeout, UpstreamProtocolError, UpstreamUnreachable
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_connection import READ_SIZE, Connection, ConnectionStale, Response
from mcp_auth_proxy.net.origin import Origin, split

__all__ = ["Origin", "UpstreamClient", "split"]

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

_REPEATABLE = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})


class ConnectionPool:
    """The connections to one origin. The one idle for the shortest time is used first, so that the others can go."""

    def __init__(self, origin: Origin, dialer: Dialer, limit: int, buffer: memoryview) -> None:
        self.name = str(origin)
        self.buffer = buffer
        self._origin = origin
        self._dialer = dialer
        self._limit = limit
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
        while self._slots >= self._limit:
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
            f"All {self._limit} connections to {self.name} are in use, and none came free within {BUSY_WAIT:g} s; "
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


class UpstreamClient:
    """Sends requests to upstreams. Belongs to one event loop.

    ``connections_per_origin`` bounds the connections to each; ``connect_timeout`` is in seconds and includes the
    look-up of the name, a forward proxy and TLS. Raises ConfigurationError where ``outbound.ca_bundle`` or the
    proxy settings in ``environ`` can't be used.
    """

    def __init__(
        self,
        *,
        outbound: OutboundSettings,
        connections_per_origin: int,
        connect_timeout: float = 10.0,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._dialer = Dialer(ca_bundle=outbound.ca_bundle, timeout=connect_timeout, environ=environ)
        self._limit = connections_per_origin
        self._pools: dict[Origin, ConnectionPool] = {}
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._closed = False

    async def send(
        self, origin: Origin, request: bytes, body: bytes = b"", *, method: bytes, head_timeout: float
    ) -> Response:
        """Send one request, head and body; return the response as soon as its head has come.

        Cancelling closes the connection. Raises UpstreamUnreachable, UpstreamTimeout after ``head_timeout``
        seconds, UpstreamBroken and UpstreamBusy; each text names the upstream's host and port.
        """
        pool = self._pools.get(origin) or self._new_pool(origin)
        connection = pool.acquire_nowait() or await pool.acquire()
        try:
            return await _answer(connection, request, body, method, head_timeout)
        except ConnectionStale:
            if method not in _REPEATABLE:
                raise
        return await _answer(await pool.acquire(), request, body, method, head_timeout)

    def idle_connection(self, origin: Origin) -> Connection | None:
        """Return a kept connection on which a request can be begun at once, where there is one."""
        pool = self._pools.get(origin)
        return pool.acquire_nowait() if pool is not None else None

    def pool(self, origin: Origin) -> ConnectionPool | None:
        """Return the connections to an origin, if there have been any."""
        return self._pools.get(origin)

    async def aclose(self) -> None:
        """Close every connection at once; responses under way break off."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        # Transports close their sockets in the next turn of the loop.
        await asyncio.sleep(0)

    def _new_pool(self, origin: Origin) -> ConnectionPool:
        if self._closed:
            raise UpstreamPoolTimeout("The proxy is shutting down.")
        pool = self._pools[origin] = ConnectionPool(origin, self._dialer, self._limit, self._buffer)
        return pool


async def _answer(connection: Connection, request: bytes, body: bytes, method: bytes, head_timeout: float) -> Response:
    answer = connection.exchange(request, body, bodiless=method == b"HEAD", timeout=head_timeout)
    try:
        return await answer
    except asyncio.CancelledError:
        if answer.cancelled():
            connection.abort()
        elif answer.exception() is None:
            # It came in the very moment of the cancellation.
            answer.result().close()
        raise
