"""``serve --for-bridges``: how a proxy that a bridge has started differs from one that a user has."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from mcp_auth_proxy.app import Application
from mcp_auth_proxy.cli.listener import Server, bind
from mcp_auth_proxy.cli.stdio_bridge.lease import ending_without_bridges
from mcp_auth_proxy.config.settings import Address, Settings
from mcp_auth_proxy.errors import AddressInUse

logger = logging.getLogger(__name__)

BIND_TIMEOUT = 5.0
"""Seconds for the proxy that was there before to end."""

MORE_PORTS = 10
"""Ports after the usual one that are tried if nothing is configured: a redirect URI that stays the same is best."""


async def bind_for_bridges(settings: Settings, *, configured: bool) -> tuple[socket.socket, Address]:
    """Return a listening socket and its address. Raises AddressInUse, McpAuthProxyError.

    ``configured``: the address stands in a file, so no other will do.
    """
    listen = settings.listen
    if not configured and listen.port:
        for port in range(listen.port, listen.port + MORE_PORTS):
            try:
                return bind(replace(listen, port=port))
            except AddressInUse:
                logger.debug("port %d is taken", port)
        return bind(replace(listen, port=0))
    deadline = asyncio.get_running_loop().time() + BIND_TIMEOUT
    while True:
        try:
            return bind(listen)
        except AddressInUse:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.1)


@asynccontextmanager
async def serving_bridges(application: Application, server: Server, *, only: str) -> AsyncIterator[None]:
    """Drain and end once there are no bridges, and no user is on the way back from an authorization server."""
    logger.info("the proxy for stdio listens at %s", application.public_url)
    needed = application.broker
    async with ending_without_bridges(
        application.settings.store, only, needed=lambda: needed.waits_for_user, stop=server.drain_and_exit
    ):
        yield
