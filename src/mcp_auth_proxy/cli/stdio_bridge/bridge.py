"""The bridge: reads the client's lines, and runs an exchange for each of them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, Coroutine
from typing import Any

from mcp_auth_proxy.cli.stdio_bridge.channel import Channel
from mcp_auth_proxy.cli.stdio_bridge.exchange import LISTEN, Context, Exchange
from mcp_auth_proxy.cli.stdio_bridge.lines import LineWriter, OutputClosed, TooLong
from mcp_auth_proxy.cli.stdio_bridge.messages import (
    ClientMessage,
    MalformedLine,
    error_line,
    key_of,
    read_line,
)
from mcp_auth_proxy.cli.stdio_bridge.sessions import Sessions
from mcp_auth_proxy.cli.stdio_bridge.tools import Tools
from mcp_auth_proxy.errors import McpAuthProxyError, excerpt
from mcp_auth_proxy.rpc.messages import INVALID_REQUEST, RequestBody

logger = logging.getLogger(__name__)

MAX_ACTIVE = 1000
"""Messages of the client that are on their way at once. Its next line is read after one of them."""

DRAIN_SECONDS = 60.0
"""Seconds that active requests have after the end of the input."""

CANCEL_TIMEOUT = 2.0
"""Seconds to tell the server that a request is cancelled, before it is closed anyway."""

NOTIFY_TIMEOUT = 30.0

_CANCELLED = "notifications/cancelled"
_INITIALIZED = "notifications/initialized"


class Bridge:
    """Carries messages between a client's lines and a server. Belongs to one event loop."""

    def __init__(self, channel: Channel, output: LineWriter, *, limit: int) -> None:
        """``limit`` is the longest line in bytes, for the error about longer ones."""
        self._channel = channel
        self._output = output
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        """Everything in the background."""
        self._active: set[asyncio.Task[None]] = set()
        """What must end before the bridge does."""
        self._exchanges: dict[str, tuple[Exchange, asyncio.Task[None]]] = {}
        """The exchange of each request that waits for its answer."""
        self._slots = asyncio.Semaphore(MAX_ACTIVE)
        self._sessions = Sessions(channel, output, self._spawn)
        self._context = Context(channel, output, self._sessions, Tools(channel))
        self._barrier: asyncio.Task[None] | None = None
        """What other messages of a session must not overtake: ``initialize`` and what follows it."""
        self._order = asyncio.Lock()
        """Held by the notification that is being sent: they must not overtake each other."""

    async def run(self, lines: AsyncIterable[bytes | TooLong]) -> None:
        """Carry messages until the input ends and the requests in it are answered. Raises OutputClosed."""
        async for line in lines:
            await self._take(line)
        for exchange, task in self._exchanges.values():
            if exchange.message.method == LISTEN:
                task.cancel()
        if self._active:
            await asyncio.wait(self._active, timeout=DRAIN_SECONDS)

    async def aclose(self) -> None:
        """Cancel what is active, and end the session at the server."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._sessions.close()

    async def _take(self, line: bytes | TooLong) -> None:
        if isinstance(line, TooLong):
            await self._refuse_long(line)
            return
        line = line.strip()
        if not line:
            return
        try:
            message = read_line(line)
        except MalformedLine as error:
            await self._output.write(error_line(None, error.code, error.text))
            return
        if message.method == _CANCELLED:
            self._cancel(message)
        elif message.requests:
            await self._start_exchange(message)
        else:
            await self._slots.acquire()
            task = self._start(self._notify(message, self._barrier))
            if message.method == _INITIALIZED:
                self._barrier = task

    async def _refuse_long(self, line: TooLong) -> None:
        text = f"Invalid request: the line is longer than {self._limit} bytes; limits.body allows more."
        requests = RequestBody.of_start(line.start).requests
        logger.warning("a line of the client was dropped: it is longer than %d bytes", self._limit)
        await self._output.write(error_line(requests[0].id if requests else None, INVALID_REQUEST, text))

    # Requests

    async def _start_exchange(self, message: ClientMessage) -> None:
        await self._slots.acquire()
        exchange = Exchange(self._context, message)
        task = self._start(self._exchange(exchange, None if message.version else self._barrier))
        if message.method == "initialize":
            self._barrier = task
        for request in message.requests:
            self._exchanges[request.key] = exchange, task

    async def _exchange(self, exchange: Exchange, barrier: asyncio.Task[None] | None) -> None:
        try:
            await _passed(barrier)
            await exchange.run()
        finally:
            for request in exchange.message.requests:
                if self._exchanges.get(request.key, (None,))[0] is exchange:
                    del self._exchanges[request.key]

    # Notifications, and the client's answers to the server

    async def _notify(self, message: ClientMessage, barrier: asyncio.Task[None] | None) -> None:
        await _passed(barrier)
        if message.method:
            async with self._order:
                await self._post(message)
        else:
            await self._post(message)
        if message.method == _INITIALIZED:
            self._sessions.initialized(message)

    async def _post(self, message: ClientMessage) -> None:
        """Send a line that has no answer. A failure is logged: there is no other way to tell."""
        session = self._sessions.current
        fields = self._context.tools.fields(message) if message.version else session.fields
        try:
            async with asyncio.timeout(NOTIFY_TIMEOUT):
                response = await self._channel.send(b"POST", fields, message.content)
        except (McpAuthProxyError, TimeoutError) as error:
            reason = str(error) or f"no response within {NOTIFY_TIMEOUT:g} s"
            logger.warning("%s could not be sent: %s", excerpt(message.method) or "an answer", reason)
            return
        if response.status >= 400:
            name = excerpt(message.method) or "an answer"
            logger.warning("%s was refused with the status %d", name, response.status)
        response.close()

    def _cancel(self, message: ClientMessage) -> None:
        """Close the request that the client cancels. In a session, the server is told as well.

        MCP 2026-07-28 has no such notification over HTTP: there, closing is cancelling. Older revisions say that
        closing is not. ``initialize`` can't be cancelled.
        """
        params = message.params or {}
        exchange, task = self._exchanges.get(key_of(params.get("requestId")), (None, None))
        if exchange is not None and exchange.message.version:
            if task is not None:
                task.cancel()
        elif not message.version and self._sessions.current.initialize is not None:
            closes = exchange is not None and not exchange.message.is_batch and exchange.message.method != "initialize"
            self._start_unbounded(self._forward_cancellation(message, task if closes else None))

    async def _forward_cancellation(self, message: ClientMessage, cancelled: asyncio.Task[None] | None) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_TIMEOUT):
                    await self._post(message)
        finally:
            if cancelled is not None:
                cancelled.cancel()

    # Tasks

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that has a slot, and must end before the bridge does."""
        task = self._start_unbounded(work)
        task.add_done_callback(lambda _: self._slots.release())
        return task

    def _start_unbounded(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._spawn(work)
        self._active.add(task)
        task.add_done_callback(self._active.discard)
        return task

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            # The output's end ends the bridge; whoever runs it sees that by itself.
            with contextlib.suppress(OutputClosed):
                await work

        task = asyncio.get_running_loop().create_task(guarded())
        # A task that is cancelled before it begins never runs its coroutine.
        task.add_done_callback(lambda _: work.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _passed(barrier: asyncio.Task[None] | None) -> None:
    """Wait until a message that must be sent first was, or could not be."""
    if barrier is not None and not barrier.done():
        await asyncio.wait({barrier})
