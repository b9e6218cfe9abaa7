"""Send the response to one client request: the upstream's, or one of the proxy's own."""

import asyncio
import contextlib
import math
from collections.abc import Sequence
from typing import Literal

from mcp_auth_proxy.errors import UpstreamProtocolError
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.decoding import decoded
from mcp_auth_proxy.rpc import answers, events
from mcp_auth_proxy.rpc.messages import Message, RequestBody

FLUSH_TIMEOUT = 1.0
"""Seconds that a client has to read what was sent before, if its request is ended early."""

_EVENTS_HEAD = [
    (b"content-type", events.CONTENT_TYPE),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Responder:
    """Send the response. Its head may be sent early, as an event stream, to show that a held request is alive."""

    __slots__ = ("_body_limit", "_relays_events", "_request", "server", "started", "streaming", "trace_id")

    def __init__(self, request: ClientRequest, *, server: str, body_limit: int, trace_id: str = "") -> None:
        self._request = request
        self._body_limit = body_limit
        self.trace_id = trace_id
        self.server = server
        self.started: Literal["", "relay", "events"] = ""
        """What has been started: nothing, an ordinary response, or an event stream of the proxy's own."""
        self._relays_events = False
        """The event stream has events of the upstream: the proxy must not add its own any more."""
        self.streaming = False
        """The response was started without a length, so it can end early with a final chunk."""

    @property
    def relaying(self) -> bool:
        """Whether the response holds what the upstream sent: nothing may be put into it any more."""
        return self.started == "relay" or self._relays_events

    # What the upstream answered

    async def relay(self, response: Response, headers: Sequence[tuple[bytes, bytes]], body: RequestBody) -> None:
        """Relay a response as it arrives, its bytes unchanged, and release the request's body.

        Raises UpstreamProtocolError if the response breaks off.
        """
        # Head and body are sent together if both are here; a body that has not arrived does not delay the head.
        part = await response.read() if response.ready else b""
        self.started = "relay"
        body.release()
        request = self._request
        await request.start(response.status, headers)
        while not response.complete:
            await request.write(part)
            part = await response.read()
        await request.write(part, last=True)

    async def relay_as_events(self, response: Response, *, is_events: bool, body: RequestBody) -> None:
        """Relay a response in the event stream that was started. Raises UpstreamProtocolError."""
        if response.status == 200 and is_events:
            self._relays_events = True
            async for data in decoded(response):
                await self._write_events(data)
            await self._write_events(b"", last=True)
            return
        whole = bytearray()
        async for data in decoded(response):
            whole += data
            if len(whole) > self._body_limit:
                raise UpstreamProtocolError("its answer is too long to be put in an event stream that was started.")
        document = bytes(whole)
        messages = RequestBody(document).messages
        if messages and messages[0].id is not None and response.status < 500:
            await self._write_events(events.message_event(document), last=True)
        elif response.status in (202, 204) or self._request.method == b"GET":
            await self._write_events(b"", last=True)
        else:
            text = f"Server {self.server} answered HTTP {response.status}."
            await self.fail(body, 502, text, answers.UPSTREAM_FAILED)

    # Answers of the proxy's own

    async def answer(self, status: int, document: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer with JSON, or with one event if an event stream was started."""
        if self.started == "events":
            listens = self._request.method == b"GET"
            await self._write_events(b"" if listens else events.message_event(document), last=True)
            return
        self.started = "relay"
        head = [*answers.JSON_HEADERS, *headers]
        self._request.respond(status, head, document)

    async def fail(
        self,
        body: RequestBody,
        status: int,
        text: str,
        code: int,
        *,
        retry_after: float | None = None,
        link: str | None = None,
    ) -> None:
        """Answer every request of the body with a JSON-RPC error. ``retry_after`` is in seconds.

        It is in the error too: an event stream that was started has no header any more.
        """
        text = answers.reason(text)
        seconds = None if retry_after is None else max(1, math.ceil(retry_after))

        def failure(message: Message | None) -> dict[str, object]:
            return answers.failure(
                message,
                text,
                code=code,
                server=self.server,
                link=link,
                retry_after=seconds,
                trace_id=self.trace_id,
            )

        headers = [] if seconds is None else [(b"retry-after", b"%d" % seconds)]
        await self.answer(status, answers.answer_all(body, failure, lambda: failure(None)), headers)

    async def keep_alive(self, text: bytes) -> None:
        """Send a comment in an event stream of the proxy's own; the first comment starts the stream."""
        await self._write_events(events.comment(text))

    async def finish_early(self, body: RequestBody, text: str) -> None:
        """End the response: with an error while it is the proxy's own, else with a final chunk if possible.

        The client then sees a regular end, not a broken response.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                if not self.relaying:
                    await self.fail(body, 503, text, answers.UPSTREAM_FAILED, retry_after=5.0)
                elif self.streaming and not self._request.complete:
                    await self._request.write(b"", last=True)

    async def _write_events(self, data: bytes, *, last: bool = False) -> None:
        if not self.started:
            self.started = "events"
            self.streaming = True
            await self._request.start(200, _EVENTS_HEAD)
        await self._request.write(data, last=last)
