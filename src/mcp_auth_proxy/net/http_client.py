"""Send HTTP requests over pools of connections, one pool for each origin and address policy.

A request is sent a second time only if no byte of its response has arrived and repeating it is harmless. A reused
connection is checked first, so one that the server has closed already costs nothing. The server may still close it
while the request is on its way: GET, HEAD, DELETE and OPTIONS are then sent once more on a new connection (RFC 9110
§9.2.2). A POST is not, because this case can't be distinguished from a server that died in the middle of a tool call.
To make it rare, idle connections are kept for less time than the server announces (``Keep-Alive: timeout``) or has
shown. One close that crosses a request, as in a restart, shows nothing. A connection that was opened under one address
policy, or under none, is used for no other.
"""

import asyncio
import sys
from collections.abc import Collection
from operator import itemgetter

from mcp_auth_proxy.errors import UpstreamPoolTimeout
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_connection import READ_SIZE, HttpConnection, StaleConnection
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.net.pool import ConnectionPool, SharedSlots
from mcp_auth_proxy.net.urls import Origin

GUARDED = "adhoc"
"""What the connections under an address policy are counted as: anybody may invent origins, not series."""

_REPEATABLE = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})


class HttpClient:
    """Send requests to upstreams. Belongs to one event loop.

    ``connections_per_origin`` bounds each pool; ``connect_timeout`` is in seconds and includes the look-up of the
    name, a forward proxy and TLS. ``connections`` bounds all pools together; None: nothing does.
    """

    def __init__(
        self,
        dialer: Dialer | None = None,
        *,
        connections_per_origin: int,
        connections: int | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        self._dialer = dialer or Dialer()
        self._limit = connections_per_origin
        self._connect_timeout = connect_timeout
        self._pools: dict[Origin | tuple[Origin, AddressPolicy], ConnectionPool] = {}
        self._buffer = memoryview(bytearray(READ_SIZE))
        self._shared = SharedSlots(connections or sys.maxsize, self._close_idle)
        self._closed = False

    async def send(
        self,
        origin: Origin,
        head: bytes,
        body: bytes = b"",
        *,
        method: bytes,
        head_timeout: float,
        policy: AddressPolicy | None = None,
    ) -> Response:
        """Send a request and return the response as soon as its head has arrived. Cancelling closes the connection.

        ``policy``: which addresses may be dialed, None for any.
        Raises UpstreamUnreachable, UpstreamPoolTimeout, UpstreamProtocolError, and UpstreamTimeout after
        ``head_timeout`` seconds. Each text names the server's host and port.
        """
        pool = self._pools.get(_key(origin, policy)) or self._new_pool(origin, policy)
        connection = pool.acquire_nowait() or await pool.acquire()
        try:
            return await connection.request(head, body, method=method, timeout=head_timeout)
        except StaleConnection:
            if method not in _REPEATABLE:
                raise
        connection = await pool.acquire()
        return await connection.request(head, body, method=method, timeout=head_timeout)

    def idle_connection(self, origin: Origin, policy: AddressPolicy | None = None) -> HttpConnection | None:
        """Return an idle connection on which a request can be sent at once, or None."""
        pool = self._pools.get(_key(origin, policy))
        return pool.acquire_nowait() if pool is not None else None

    def pool(self, origin: Origin, policy: AddressPolicy | None = None) -> ConnectionPool | None:
        """Return the pool of an origin, or None before the first request to it."""
        return self._pools.get(_key(origin, policy))

    @property
    def has_guarded(self) -> bool:
        """Whether there are pools under an address policy."""
        return any(not isinstance(key, Origin) for key in self._pools)

    def discard_unused(self, needed: Collection[tuple[Origin, AddressPolicy]]) -> None:
        """Forget the pools under an address policy that no server needs, but for those with active requests."""
        for key, pool in list(self._pools.items()):
            if not isinstance(key, Origin) and key not in needed and pool.open == pool.idle:
                del self._pools[key]
                pool.close()

    def set_limit(self, connections_per_origin: int, connections: int | None = None) -> None:
        """Change how many connections there may be, as in the constructor. Those over a limit are used until they
        close.
        """
        self._limit = connections_per_origin
        self._shared.limit = connections or sys.maxsize
        for pool in self._pools.values():
            pool.limit = connections_per_origin

    def connections(self) -> dict[tuple[str, ...], float]:
        """Return how many connections each origin has, by origin and state (active, idle).

        Those under an address policy are counted together.
        """
        numbers: dict[tuple[str, ...], float] = {}
        for key, pool in self._pools.items():
            if pool.open:
                name = f"{key.scheme}://{key.authority}" if isinstance(key, Origin) else GUARDED
                numbers[name, "active"] = numbers.get((name, "active"), 0) + pool.open - pool.idle
                numbers[name, "idle"] = numbers.get((name, "idle"), 0) + pool.idle
        return numbers

    async def aclose(self) -> None:
        """Close every connection at once; incomplete responses break off."""
        self._closed = True
        for pool in self._pools.values():
            pool.close()
        # Transports close their sockets in the next turn of the event loop.
        await asyncio.sleep(0)

    def _new_pool(self, origin: Origin, policy: AddressPolicy | None) -> ConnectionPool:
        if self._closed:
            raise UpstreamPoolTimeout("The proxy is shutting down.")
        pool = self._pools[_key(origin, policy)] = ConnectionPool(
            origin,
            self._dialer,
            limit=self._limit,
            connect_timeout=self._connect_timeout,
            buffer=self._buffer,
            shared=self._shared,
            policy=policy,
        )
        return pool

    def _close_idle(self) -> bool:
        """Close the connection that has been idle for longest; return False if none is idle."""
        idle = [(since, pool) for pool in self._pools.values() if (since := pool.idle_since) is not None]
        if not idle:
            return False
        min(idle, key=itemgetter(0))[1].close_idle()
        return True


def _key(origin: Origin, policy: AddressPolicy | None) -> Origin | tuple[Origin, AddressPolicy]:
    """Return the key of a pool: the origin alone for those of the configuration, which are looked up most often."""
    return origin if policy is None else (origin, policy)
