"""Server-sent events: what changes on the dashboard while it is open."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mcp_auth_proxy.errors import ClientDisconnected

TICK = 0.5
"""Seconds between looks at what has changed, and at whether the session still holds."""

COMMENT_TICKS = 30
"""Ticks after which a silent stream gets a comment: it shows that it is alive."""

MAX_STREAMS = 128
"""Streams of everybody at once."""

MAX_STREAMS_OF_ONE = 32
"""Streams of one principal at once."""

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
}

Events = Callable[[asyncio.Future[None]], AsyncGenerator[str, None]]
"""Yields the text of each event, until the future is done at the latest."""


class Streams:
    """The streams that are open, by principal."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def has_room(self, principal: str) -> bool:
        """Return whether a principal may open another one."""
        return self._open.total() < MAX_STREAMS and self._open[principal] < MAX_STREAMS_OF_ONE

    @contextmanager
    def opened(self, principal: str) -> Iterator[None]:
        """Count a stream until the block ends."""
        self._open[principal] += 1
        try:
            yield
        finally:
            self._open[principal] -= 1
            if not self._open[principal]:
                del self._open[principal]


class EventStream(Response):
    """A response that lasts until its events end, or until the browser has gone."""

    def __init__(self, events: Events, streams: Streams, principal: str) -> None:
        super().__init__(headers=HEADERS)
        self._events = events
        self._streams = streams
        self._principal = principal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_until_gone(receive))
        fields = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        try:
            with self._streams.opened(self._principal), suppress(ClientDisconnected):
                await send({"type": "http.response.start", "status": 200, "headers": fields})
                async with aclosing(self._events(gone)) as events:
                    async for text in events:
                        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
                if not gone.done():
                    await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def tick(gone: asyncio.Future[None]) -> bool:
    """Wait for the next look; return whether the browser is still there."""
    await asyncio.wait({gone}, timeout=TICK)
    return not gone.done()
