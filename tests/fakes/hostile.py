"""Checks for tests of hostile servers: whether an address was contacted, and whether the client gets the reason."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fakes.mcp_client import McpResponse


@dataclass
class Honeypot:
    """A loopback port that records who connects."""

    port: int = 0
    visits: list[object] = field(default_factory=list)


@asynccontextmanager
async def honeypot() -> AsyncIterator[Honeypot]:
    found = Honeypot()

    def visited(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.visits.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(visited, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    async with server:
        yield found


def assert_refused(reply: McpResponse, *words: str) -> None:
    """Assert that it is an error with these words, not a challenge, and without a link."""
    assert reply.status in (200, 400, 403, 404, 502, 503, 504)
    assert "www-authenticate" not in reply.headers
    text = reply.error["message"]
    assert "notes" in text
    assert "/connect/" not in str(reply.message)
    for word in words:
        assert word in text, text
