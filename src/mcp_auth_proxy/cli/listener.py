"""The listening socket and the HTTP server on it."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, cast

import uvicorn

from mcp_auth_proxy.app import DRAIN_SECONDS, Application
from mcp_auth_proxy.cli.notify import READY, STOPPING, notify
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.errors import AddressInUse, McpAuthProxyError
from mcp_auth_proxy.net.acceptor import Acceptor
from mcp_auth_proxy.net.client_request import RequestServer
from mcp_auth_proxy.net.connection_limits import ConnectionLimits, ConnectionRules, ConnectionSlot
from mcp_auth_proxy.net.http_server import HttpServerConnection
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.web.health import HealthEndpoints

logger = logging.getLogger(__name__)

BACKLOG = 2048
FLUSH_TIMEOUT = 1.0
"""Seconds that clients have at shutdown to read what was sent to them."""

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than most clients keep theirs."""


HEALTH_RULES = ConnectionRules(32, 8, keys=("health_listen", "health_listen"))
"""Connections of probes. They have places of their own: a proxy that is full of clients is not to be restarted. Nor may
one address, such as that of a neighbor in the pod, have all of them."""


def bind(address: Address, *, chosen_by: str = "--listen or the key 'listen'") -> tuple[socket.socket, Address]:
    """Return a listening socket and its address, with the real port. Raises AddressInUse, McpAuthProxyError.

    ``chosen_by`` says in an error how to choose another address.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"{address} is taken by another program, maybe another mcp-auth-proxy. End that one, or choose "
                f"another address with {chosen_by}."
            ) from None
        raise McpAuthProxyError(f"Can't listen on {address}: {_bind_problem(error, chosen_by)}.") from None
    sock.setblocking(False)
    return sock, Address(address.host, sock.getsockname()[1])


def _bind_problem(error: OSError, chosen_by: str) -> str:
    """Return why an address can't be used, and what to do about it."""
    match error.errno:
        case errno.EADDRNOTAVAIL:
            return f"this machine does not have that address; choose another with {chosen_by}"
        case errno.EACCES:
            return f"ports below 1024 are for root; choose a higher one with {chosen_by}"
    return error.strerror or str(error)


def bound(sock: socket.socket) -> Address:
    """Return the address that a socket is bound to, its host as a number."""
    host, port, *_ = sock.getsockname()
    return Address(host, port)


def in_numbers(address: Address) -> Address:
    """Return an address with the number of its host, as ``bind`` would take it. Raises McpAuthProxyError."""
    sock, _ = bind(replace(address, port=0))
    with sock:
        return replace(bound(sock), port=address.port)


class Server(uvicorn.Server):
    """Run uvicorn, but drain first on SIGTERM. The listener stays open meanwhile, so that probes see 503."""

    def __init__(
        self,
        application: Application,
        *,
        health: socket.socket | None = None,
        before_close: Callable[[], None] | None = None,
    ) -> None:
        """``health`` is the second listening socket; ``before_close`` is called while the ports are still bound."""
        self._application = application
        self._health = health
        self._before_close = before_close
        self._drain: asyncio.Task[None] | None = None
        self._signals = 0
        self._acceptors: list[Acceptor] = []
        super().__init__(_config(application.router))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; a second signal ends the active requests, a third exits at once."""
        asyncio.get_running_loop().call_soon_threadsafe(self._on_signal, sig)

    def drain_and_exit(self) -> None:
        """Act as on a SIGTERM: drain first; end the active requests if called again."""
        self._on_signal(signal.SIGTERM)

    def _on_signal(self, sig: int) -> None:
        self._signals += 1
        if self._signals == 1:
            notify(STOPPING)
            again = "a second Ctrl-C" if sig == signal.SIGINT else "a second signal"
            self._drain = asyncio.create_task(self._drain_then_exit(again))
        elif self._signals == 2:
            self._application.end()
        else:
            self.should_exit = self.force_exit = True

    async def _drain_then_exit(self, again: str) -> None:
        def waiting(count: int) -> None:
            requests, them = ("1 request", "it") if count == 1 else (f"{count} requests", "them")
            logger.warning("waiting for %s, up to %d s; %s ends %s", requests, DRAIN_SECONDS, again, them)

        await self._application.drain(waiting)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, and to count them. ``sockets`` are listening."""
        for sock in sockets or []:
            self._acceptors.append(Acceptor(sock, self._application.connections, self._connection))
        if self._health is not None:
            limits = ConnectionLimits(HEALTH_RULES)
            self._acceptors.append(Acceptor(self._health, limits, self._health_connections()))
        self.servers = []
        self.started = True
        connections = self.server_state.connections
        self._stop_counting = metrics.inbound_connections.add_source(lambda: {(): len(connections)})
        notify(READY)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close every connection; abort those whose clients have not read everything within ``FLUSH_TIMEOUT``."""
        if self._before_close is not None:
            self._before_close()
        for acceptor in self._acceptors:
            acceptor.close()
        for acceptor in self._acceptors:
            await acceptor.wait_closed()
        abort = asyncio.get_running_loop().call_later(FLUSH_TIMEOUT, self._abort_connections)
        await super().shutdown(sockets)
        abort.cancel()
        self._stop_counting()

    def _connection(self, slot: ConnectionSlot) -> HttpServerConnection:
        return HttpServerConnection(self.config, self.server_state, {}, slot=slot)

    def _health_connections(self) -> Callable[[ConnectionSlot], HttpServerConnection]:
        application = self._application
        on_quit = self.drain_and_exit if application.settings.health_quit else None
        config = _config(HealthEndpoints(application.site.health_routes(), on_quit=on_quit))
        return lambda slot: HttpServerConnection(config, self.server_state, {}, slot=slot)

    def _abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _config(server: RequestServer) -> uvicorn.Config:
    return uvicorn.Config(
        cast(Any, server),  # our connections take a RequestServer, not an ASGI application
        interface="asgi3",
        http=HttpServerConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,
    )


@asynccontextmanager
async def listening(application: Application, sock: socket.socket) -> AsyncIterator[None]:
    """Serve until the block ends, while the command does other work; the command handles signals itself."""
    server = Server(application)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup(sockets=[sock])
    main_loop = asyncio.create_task(server.main_loop())
    try:
        yield
    finally:
        server.should_exit = True
        await main_loop
        await server.shutdown(sockets=[sock])
