"""Comments in event streams whose server is silent, so that nothing on the way to the client takes them for dead."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.headers import is_event_stream, is_plain
from mcp_auth_proxy.rpc import events

MAX_AT_ONCE = 100
"""Comments sent in one turn of the event loop, which all clients share."""

_PING = events.comment(b"ping")

_BOUNDARIES = (b"\n\n", b"\r\r", b"\n\r\n", b"\r\r\n", b"\n\r")
"""How an event ends: two line ends, each of them CRLF, LF or CR (WHATWG HTML §9.2.6)."""

_HALF_BOUNDARY = b"\r\n\r"
"""The next byte is most likely the LF of a CRLF."""


def may_be_pinged(response: Response) -> bool:
    """Return whether comments may be put between the bytes of a response: in a plain event stream without a length."""
    fields = response.fields
    return response.status == 200 and response.content_length is None and is_event_stream(fields) and is_plain(fields)


class Pings:
    """The open event streams, the longest silent one first. Belongs to one event loop.

    One timer serves all streams: what is sent costs a stream its place in the line, and nothing else.
    """

    def __init__(self, interval: float) -> None:
        """``interval`` is the silence in seconds after which a comment is sent; 0 for no comments."""
        self._loop = asyncio.get_running_loop()
        self._streams: OrderedDict[ClientRequest, _Stream] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._interval = interval

    def configure(self, interval: float) -> None:
        """Change the interval. If it was 0, this is for streams that begin from now on."""
        self._interval = interval
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._schedule()

    def watch(self, request: ClientRequest) -> None:
        """Send comments to the client of a request, whose response is an event stream. Idempotent."""
        if self._interval and request not in self._streams:
            self._streams[request] = stream = _Stream(self._streams, request, self._loop.time)
            request.on_write = stream.wrote
            self._schedule()

    def insert(self, request: ClientRequest, event: bytes) -> None:
        """Send an event of the proxy's own in the event stream that answers a request, as soon as one may stand there.

        Nothing is sent if the stream turns out to be none.
        """
        stream = self._streams.get(request)
        if stream is None:
            self._streams[request] = stream = _Stream(self._streams, request, self._loop.time)
            request.on_write = stream.wrote
            self._schedule()
        stream.insert(event)

    def forget(self, request: ClientRequest) -> None:
        """Send no more comments to the client of a request. Idempotent."""
        if self._streams.pop(request, None) is not None:
            request.on_write = None

    def _schedule(self) -> None:
        if self._timer is None and self._interval and self._streams:
            first = next(iter(self._streams.values()))
            self._timer = self._loop.call_at(first.silent_since + self._interval, self._check)

    def _check(self) -> None:
        self._timer = None
        latest = self._loop.time() - self._interval
        for _ in range(min(MAX_AT_ONCE, len(self._streams))):
            first = next(iter(self._streams.values()))
            if first.silent_since > latest:
                break
            first.ping()
        self._schedule()


class _Stream:
    """One event stream, and how what was sent of it ends."""

    __slots__ = ("_clock", "_inserted", "_request", "_streams", "_tail", "silent_since")

    def __init__(
        self,
        streams: "OrderedDict[ClientRequest, _Stream]",
        request: ClientRequest,
        clock: Callable[[], float],
    ) -> None:
        self._streams = streams
        self._request = request
        self._clock = clock
        self._inserted = b""
        """Events of the proxy's own that wait for the end of an event."""
        self._tail = b"\n\n"
        """The last three bytes that were sent. A stream begins as if an event had ended."""
        self.silent_since = clock()

    def wrote(self, data: bytes) -> None:
        """Note what is sent."""
        self._tail = data[-3:] if len(data) > 2 else (self._tail + data)[-3:]
        self.silent_since = self._clock()
        self._streams.move_to_end(self._request)
        if self._inserted:
            # Not here: this is called while something is being sent.
            asyncio.get_running_loop().call_soon(self._flush)

    def insert(self, event: bytes) -> None:
        """Send an event now, or as soon as it would not be within another one."""
        self._inserted += event
        self._flush()

    def _flush(self) -> None:
        if self._inserted and self._request in self._streams and self._is_between_events():
            event, self._inserted = self._inserted, b""
            self._request.write_nowait(event)

    def _is_between_events(self) -> bool:
        request = self._request
        between = self._tail.endswith(_BOUNDARIES) and self._tail != _HALF_BOUNDARY
        return between and request.started and not request.complete and request.may_write

    def ping(self) -> None:
        """Send a comment, unless it would be within an event, or would wait for a client that does not read."""
        if self._is_between_events():
            self._request.write_nowait(self._inserted or _PING)
            self._inserted = b""
        else:
            # Whatever it is, it may be over after another interval.
            self.wrote(b"")
