"""Send the response to one client request: the upstream's, or one of the proxy's own."""

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from mcp_auth_proxy.errors import Overloaded, UpstreamProtocolError
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.cold_answers import is_acknowledgment
from mcp_auth_proxy.proxy.decoding import decoded
from mcp_auth_proxy.proxy.headers import NO_STORE, UNBUFFERED
from mcp_auth_proxy.proxy.quota import SMALL, STOPPED, RequestMemory
from mcp_auth_proxy.rpc import answers, events
from mcp_auth_proxy.rpc.encoding import MAX_PARSED, encode
from mcp_auth_proxy.rpc.messages import Message, RequestBody

FLUSH_TIMEOUT = 1.0
"""Seconds that a client has to read what was sent before, if its request is ended early."""

_FIRST_EVENT = re.compile(rb"(?:(?!data:)[^\r\n]*(?:\r\n|\r|\n))*data:(?s:.*?)(?:\r\n\r\n|\n\n|\r\r)")
"""Everything up to the end of the first event that has data."""

_EVENTS_HEAD = [
    (b"content-type", events.CONTENT_TYPE),
    NO_STORE,
    UNBUFFERED,
]


class Responder:
    """Send the response. Its head may be sent early, as an event stream, to show that a held request is alive."""

    __slots__ = ("_memory", "_relays_events", "_request", "server", "started", "streaming", "trace_id")

    def __init__(self, request: ClientRequest, *, server: str, memory: RequestMemory, trace_id: str = "") -> None:
        self._request = request
        self._memory = memory
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

        Raises UpstreamProtocolError if the response breaks off, and Overloaded if it can't wait for a slow client.
        """
        # Head and body are sent together if both are here; a body that has not arrived does not delay the head.
        part = await response.read() if response.ready else b""
        self.started = "relay"
        self._release(body)
        await self._request.start(response.status, headers)
        while not response.complete:
            await self._write(part)
            part = await response.read()
        await self._write(part, last=True)

    async def relay_as_events(
        self, response: Response, *, is_events: bool, body: RequestBody, acknowledged: bool = False
    ) -> None:
        """Relay a response in the event stream that was started. Raises UpstreamProtocolError and Overloaded.

        ``acknowledged``: a subscription has been acknowledged already, so the server's acknowledgment is dropped.
        """
        body.parse()  # an error of the proxy's own may still have to name its requests
        self._release(body)
        if response.status == 200 and is_events:
            self._relays_events = True
            pieces = decoded(response)
            async for data in _without_acknowledgment(pieces) if acknowledged else pieces:
                await self._write(data)
            await self._write(b"", last=True)
            return
        whole = bytearray()
        pieces = decoded(response)
        async for data in pieces:
            if not self._memory.take(len(data)):
                raise Overloaded("limits.memory")
            whole += data
            if len(whole) > MAX_PARSED:
                if not _is_json(response):
                    raise UpstreamProtocolError("its answer is too long to be put in an event stream that was started.")
                break
        document = RequestBody(bytes(whole))
        del whole
        if document.too_costly and _is_json(response):
            self._relays_events = True
            await self._write(events.MESSAGE_START + events.one_line(document.content))
            document.release()
            self._memory.release()
            async for data in pieces:
                await self._write(events.one_line(data))
            await self._write(events.MESSAGE_END, last=True)
        elif document.messages and document.messages[0].id is not None and response.status < 500:
            await self._write(events.message_event(document.content), last=True)
        elif response.status in (202, 204) or self._request.method == b"GET":
            await self._write(b"", last=True)
        else:
            text = f"Server {self.server} answered HTTP {response.status}."
            await self.fail(body, 502, text, answers.UPSTREAM_FAILED)

    def _release(self, body: RequestBody) -> None:
        """Drop the request's body, which will not be sent again."""
        body.release()
        self._memory.release()

    async def _write(self, data: bytes, *, last: bool = False) -> None:
        """Send a part of the response's body; waits while the client is slow to read. Raises Overloaded."""
        while len(data) > STOPPED:
            await self._write_piece(data[:STOPPED], last=False)
            data = data[STOPPED:]
        await self._write_piece(data, last=last)

    async def _write_piece(self, data: bytes, *, last: bool) -> None:
        if self._request.may_write:
            await self._request.write(data, last=last)
            return
        if not self._memory.take(STOPPED):
            raise Overloaded("limits.memory")
        try:
            await self._request.write(data, last=last)
        finally:
            self._memory.give_back(STOPPED)

    # Answers of the proxy's own

    async def answer(self, status: int, document: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer with JSON, or with one event if an event stream was started."""
        # The client may be slow to read the answer to a batch: then it waits here, where it counts.
        if len(document) > SMALL and not self._memory.take(len(document)):
            text = str(Overloaded("limits.memory"))
            status, headers = 503, [(b"retry-after", b"5")]
            document = encode(answers.failure(None, text, code=answers.UPSTREAM_FAILED, server=self.server))
        if self.started == "events":
            listens = self._request.method == b"GET"
            await self._write_own(b"" if listens else events.message_event(document))
            return
        self.started = "relay"
        head = [*answers.JSON_HEADERS, *headers]
        if len(document) <= SMALL:
            self._request.respond(status, head, document)
            return
        self._request.start_nowait(status, [*head, (b"content-length", b"%d" % len(document))])
        await self._write_own(document)

    async def _write_own(self, data: bytes) -> None:
        """Send the last part of an answer of the proxy's own."""
        while len(data) > STOPPED:
            await self._request.write(data[:STOPPED])
            data = data[STOPPED:]
        await self._request.write(data, last=True)

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
        await self.send_events(events.comment(text))

    async def send_event(self, document: bytes) -> None:
        """Send a message in an event stream of the proxy's own, and start it if needed."""
        await self.send_events(events.message_event(document))

    async def send_events(self, data: bytes) -> None:
        """Send encoded events in an event stream of the proxy's own, and start it if needed."""
        if not self.started:
            self.started = "events"
            self.streaming = True
            await self._request.start(200, _EVENTS_HEAD)
        await self._request.write(data)

    async def finish_early(self, body: RequestBody, text: str, *, refused: bool = False) -> None:
        """End the response: with an error while it is the proxy's own, else with a final chunk if possible.

        The client then sees a regular end, not a broken response. ``refused``: its caller may no longer call.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                if not self.relaying:
                    code, after = (answers.CALLER_REFUSED, None) if refused else (answers.UPSTREAM_FAILED, 5.0)
                    await self.fail(body, 401 if refused else 503, text, code, retry_after=after)
                elif self.streaming and not self._request.complete:
                    await self._request.write(b"", last=True)


async def _without_acknowledgment(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield an event stream without its first message, if that acknowledges a subscription."""
    start = b""
    async for data in pieces:
        start += data
        found = _FIRST_EVENT.match(start)
        if found is not None:
            if not is_acknowledgment(found[0]):
                yield found[0]
            yield start[found.end() :]
            break
        if len(start) > SMALL:
            yield start
            break
    else:
        yield start
    async for data in pieces:
        yield data


def _is_json(response: Response) -> bool:
    """Return whether a response says that it is a JSON document, and no error."""
    return response.status == 200 and any(
        name == b"content-type" and value.lower().startswith(b"application/json") for name, value in response.headers
    )
