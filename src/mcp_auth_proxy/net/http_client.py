"""Requests to upstreams over kept connections, a bounded number to each origin.

When is a request sent twice? Never once a byte of its response has come, and never if it may have been acted upon and
must not be repeated (design §4.4). A kept connection is looked at before it is used, so one that the upstream had
closed by then costs nothing (§4.7). What remains is the close that crosses the request on its way: GET, HEAD, DELETE
and the like are then sent once more on a new connection (RFC 9110 §9.2.2); a POST is not, since nothing tells this case
from a server that died over the tool call. To make that rare, idle connections are kept for less time than the upstream
announces (``Keep-Alive: timeout``) or has shown.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from mcp_auth_proxy.errors import UpstreamPoolTimeout
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_connection import READ_SIZE, Connection, ConnectionStale, Response
from mcp_auth_proxy.net.pool import ConnectionPool
from mcp_auth_proxy.net.urls import Origin

_REPEATABLE = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})


class HttpClient:
    """Sends requests to upstreams. Belongs to one event loop.

    ``connections_per_origin`` bounds the connections to each; ``connect_timeout`` is in seconds and includes the
    look-up of the name, a forward proxy and TLS. Raises ConfigurationError where ``outbound.ca_bundle`` or the
    proxy settings in ``environ`` can't be used.
    """

    def __init__(
        self,
        *,
        ca_bundle: Path | None = None,
        connections_per_origin: int,
        connect_timeout: float = 10.0,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._dialer = Dialer(ca_bundle=ca_bundle, timeout=connect_timeout, environ=environ)
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

    def set_limit(self, connections_per_origin: int) -> None:
        """Change how many connections an origin may have. Those over the limit are used until they close."""
        self._limit = connections_per_origin
        for pool in self._pools.values():
            pool.limit = connections_per_origin

    def connections(self) -> dict[tuple[str, ...], float]:
        """Return how many connections each origin has, by origin and state (active, idle)."""
        numbers: dict[tuple[str, ...], float] = {}
        for origin, pool in self._pools.items():
            if pool.open:
                name = f"{origin.scheme}://{origin.authority}"
                numbers[name, "active"] = pool.open - pool.idle
                numbers[name, "idle"] = pool.idle
        return numbers

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
