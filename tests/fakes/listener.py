"""The listener in this event loop, with whatever a test puts behind it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from mcp_auth_proxy.net.client_request import RequestServer
from mcp_auth_proxy.net.http_server import HttpServerConnection


@asynccontextmanager
async def listener(
    requests: RequestServer, connection: type[HttpServerConnection] = HttpServerConnection, *, keep_alive: int = 75
) -> AsyncIterator[int]:
    """Serve on 127.0.0.1 until the block ends; yield the port. ``keep_alive`` is in seconds."""
    config = uvicorn.Config(cast(Any, requests), log_config=None, timeout_keep_alive=keep_alive)
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(lambda: connection(config, state, {}), "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for accepted in list(state.connections):
            accepted.transport.abort()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=5)
        await asyncio.wait_for(server.wait_closed(), 5)
