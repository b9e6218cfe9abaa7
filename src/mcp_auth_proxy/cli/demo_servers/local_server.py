"""Run an ASGI application on 127.0.0.1 in the current event loop, for the demo and the tests."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Literal

from starlette.types import ASGIApp
from uvicorn import Config
from uvicorn.server import ServerState

FINISH_SECONDS = 1.0
"""Time for applications to finish after their connections were closed."""


class LocalServer:
    """One listening application. ``origin`` is its URL without a path, ``http://127.0.0.1:PORT``.

    Unlike ``uvicorn.Server`` it handles no signals and does not poll, so many can run in one event loop, stop within
    milliseconds, and be taken down and up again on the same port.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, *, lifespan: Literal["on", "off"]) -> None:
        self._config = Config(app, log_config=None, access_log=False, lifespan=lifespan, ws="none", server_header=False)
        self._config.load()
        self._lifespan = self._config.lifespan_class(self._config)
        self._state = ServerState()
        self._socket = listener
        self._server: asyncio.Server | None = None
        self.port: int = listener.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start the application and listen. Raises RuntimeError if its lifespan fails."""
        await self._lifespan.startup()
        if self._lifespan.should_exit:
            raise RuntimeError("the application did not start")
        # uvicorn updates this once a second; a constant date is good enough here.
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        await self.up()

    async def up(self) -> None:
        """Listen (again), on the same port."""
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(self._protocol, sock=self._socket, backlog=4096)

    async def down(self) -> None:
        """Stop listening and drop all connections. New ones are refused; the port stays reserved."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._socket = await _bind(self.port)
        await self.drop_connections()

    async def stop(self) -> None:
        """Drop all connections and stop the application."""
        await self.down()
        self._socket.close()
        await self._lifespan.shutdown()

    async def drop_connections(self) -> None:
        """Abort all connections, and wait until they and their application tasks have ended."""
        dropped = set(self._state.connections)
        for connection in dropped:
            connection.transport.abort()
        tasks = set(self._state.tasks)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=FINISH_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        # uvicorn has no callback for this, but they are gone after the next iterations of the loop.
        while dropped & self._state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0)

    def abort(self, client: tuple[str, int]) -> None:
        """Reset the connection of the peer with this address (``scope["client"]``), whatever it is doing."""
        for connection in list(self._state.connections):
            if getattr(connection, "client", None) == client:
                linger = connection.transport.get_extra_info("socket")
                # With an SO_LINGER of 0, close() sends RST, like a crashed peer.
                linger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                connection.transport.abort()

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._state.connections)

    def _protocol(self) -> asyncio.Protocol:
        return self._config.http_protocol_class(  # type: ignore[call-arg]  # typed as its base class
            config=self._config, server_state=self._state, app_state=self._lifespan.state
        )


@asynccontextmanager
async def serve(
    make_app: Callable[[str], ASGIApp], *, port: int = 0, lifespan: Literal["on", "off"] = "off"
) -> AsyncIterator[LocalServer]:
    """Run the application that ``make_app(origin)`` returns until the block ends; ``port`` 0 takes a free one.

    The socket is bound before the application is created, because issuer and resource contain the port.
    """
    listener = await _bind(port)
    origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = LocalServer(make_app(origin), listener, lifespan=lifespan)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


async def _bind(port: int) -> socket.socket:
    """Return a bound socket that does not listen yet: connections to it are refused."""
    for left in reversed(range(20)):
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(("127.0.0.1", port))
        except OSError:
            bound.close()
            if not left:
                raise
            # uvloop closes the previous listener in the next iterations of the loop.
            await asyncio.sleep(0)
        else:
            return bound
    raise AssertionError("unreachable")
