"""An HTTP/1.1 connection to a server, carrying one request and its response at a time (RFC 9112).

The parser is llhttp without lenient flags. It refuses Content-Length together with Transfer-Encoding, repeated or
malformed Content-Length, obs-fold, bare CR and LF, and white space before a colon. This module also refuses what llhttp
accepts: transfer codings other than ``chunked``, any transfer coding in HTTP/1.0, versions other than 1.0 and 1.1,
invalid status codes, bytes before the status line, and heads and trailers that do not end.
"""

import asyncio
import contextlib
import select
import socket
import time
from typing import Final, Protocol, cast

import httptools

from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError, UpstreamTimeout
from mcp_auth_proxy.net.http_head import Fields, Headers
from mcp_auth_proxy.net.http_response import READ_AHEAD, Response

HEAD_LIMIT = 64 * 1024
"""Bytes of a response head, interim responses included."""

FIELD_LIMIT = 200
"""Fields of a response head."""

READ_SIZE = 64 * 1024
"""Bytes read at a time. Body chunks are cut from it with one copy; malloc serves up to 128 KiB without new pages."""

JOINED_BODY = 64 * 1024
"""Bytes of request body up to which copying head and body together is cheaper than passing the kernel two buffers."""

BODY_PIECE = 256 * 1024
"""Bytes of request body that are written in one turn of the event loop: to encrypt 16 MiB takes 60 ms."""

BUSY_POLL_THRESHOLD = 0.00015
"""Seconds. A response that comes sooner has arrived before a process that sleeps until then is awake again."""


# The states. Plain numbers, since members of an enumeration cost a look-up in each of ten comparisons per request.
_IDLE: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_DONE: Final = 3
"""The response is complete; the rest of the bytes that were read with it are still being parsed."""
_CLOSED: Final = 4


class StaleConnection(UpstreamProtocolError):
    """A reused connection closed before the response, most likely because it was idle for too long."""


class ResponseWaiter(Protocol):
    """The receiver of a response: an ``asyncio.Future``, or an object with these three of its methods."""

    def done(self) -> bool:
        """Return whether nobody waits any more."""

    def set_result(self, result: Response, /) -> None:
        """Receive the response. Called once its head has arrived and all bytes of that read were parsed."""

    def set_exception(self, exception: UpstreamError, /) -> None:
        """Receive the reason why there is no response."""


class PoolCallbacks(Protocol):
    """The owner of a connection."""

    name: str
    """The prefix of errors, ``host:port``; empty for none."""

    buffer: memoryview
    """``READ_SIZE`` bytes that all connections of an event loop read into: each read is parsed before the next."""

    def connection_released(self, connection: "HttpConnection") -> None:
        """Take back the connection: the response is complete, and it can carry another request."""

    def connection_stale(self, connection: "HttpConnection") -> None:
        """Note that the server closed the connection when it was used again."""

    def connection_closed(self, connection: "HttpConnection", *, idle: bool) -> None:
        """Forget the connection. Called once; ``idle``: the server closed it between two requests."""


class HttpConnection(asyncio.BufferedProtocol):
    """A connection to a server. Its methods are for the event loop, the parser and the owner."""

    __slots__ = (
        "_bodiless",
        "_chunked",
        "_consumed",
        "_content_length",
        "_deadline",
        "_fields",
        "_framing_bytes",
        "_head_left",
        "_head_started",
        "_headers",
        "_loop",
        "_new_response",
        "_new_response_waiter",
        "_parser",
        "_paused",
        "_piece_scheduled",
        "_poller",
        "_problem",
        "_progress",
        "_response",
        "_reusable",
        "_sent_at",
        "_socket",
        "_state",
        "_surplus",
        "_timeout",
        "_timer",
        "_timer_at",
        "_transport",
        "_unsent",
        "_until_close",
        "_waiter",
        "_write_paused",
        "head_latency",
        "idle_for",
        "idle_since",
        "idle_timeout",
        "opened_at",
        "owner",
        "uses",
    )

    _content_length: int | None
    _parser: httptools.HttpResponseParser
    _transport: asyncio.Transport

    def __init__(self, owner: PoolCallbacks, sock: socket.socket) -> None:
        self.owner = owner
        self.uses = 0
        self.idle_since = 0.0
        self.idle_for = 0.0
        """Seconds that it had been idle when it was last acquired."""
        self.idle_timeout = float("inf")
        """Seconds that the server says it keeps an idle connection."""
        self.head_latency = 1.0
        """Seconds from a request to the head of its response: a moving average, or the last one if that took longer
        than ``BUSY_POLL_THRESHOLD``."""
        self._sent_at = 0.0
        self._socket = sock
        self._poller: select.poll | None = None
        """Of the socket; made when the connection is first reused."""
        self._loop = asyncio.get_running_loop()
        self.opened_at = time.monotonic()
        self._state = _IDLE
        self._waiter: ResponseWaiter | None = None
        self._response: Response | None = None
        self._new_response: Response | None = None
        self._new_response_waiter: ResponseWaiter | None = None
        """The response whose head came with the current read, and the waiter that gets it once all bytes are parsed."""
        self._consumed: Response | None = None
        """The response whose body is pushed to a consumer."""
        self._deadline = 0.0
        self._timeout = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._headers: Headers = []
        self._fields = Fields([])
        """Those of the last response, checked. Most responses of a server have the same."""
        self._chunked = False
        self._problem = ""
        self._paused = False
        self._unsent: bytes | memoryview = b""
        """The part of the request's body that is still to be written."""
        self._piece_scheduled = False
        self._write_paused = False

    @property
    def closed(self) -> bool:
        return self._state == _CLOSED

    def is_open(self) -> bool:
        """Return whether the server still keeps the idle connection open, as far as the kernel knows now.

        The event loop may not have noticed yet that the server closed it. A connection with unread bytes can't be used
        either, since no request is open.
        """
        if self._state != _IDLE or self._transport.is_closing():
            return False
        # A poll without a wait: peeking costs twice as much, because nothing to read is an exception there.
        poller = self._poller
        if poller is None:
            self._poller = poller = select.poll()
            poller.register(self._socket, select.POLLIN)
        return not poller.poll(0)

    # Requests

    async def request(self, head: bytes, body: bytes, *, method: bytes, timeout: float) -> Response:
        """Send a request and return the response as soon as its head has arrived. Cancelling closes the connection.

        Raises as ``send`` does.
        """
        waiter: asyncio.Future[Response] = self._loop.create_future()
        self.send(waiter, head, body, bodiless=method == b"HEAD", timeout=timeout)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self.abort()
            elif waiter.exception() is None:
                # The response arrived in the same turn of the event loop.
                waiter.result().close()
            raise

    def send(self, waiter: ResponseWaiter, head: bytes, body: bytes, *, bodiless: bool, timeout: float) -> None:
        """Send a request and give ``waiter`` the response once its head has arrived.

        ``bodiless``: the method is HEAD (RFC 9110 §9.3.2). ``timeout`` is in seconds, until the head has arrived.
        The waiter fails with UpstreamProtocolError, StaleConnection or UpstreamTimeout.
        """
        self.uses += 1
        self._state = _HEAD
        self._bodiless = bodiless
        self._head_left = HEAD_LIMIT
        self._headers = []
        self._content_length = None
        self._until_close = True
        self._surplus = False
        self._head_started = False
        self._framing_bytes = 0
        self._waiter = waiter
        self._timeout = timeout
        self._deadline = deadline = self._loop.time() + timeout
        if self._timer is None or deadline < self._timer_at:
            self._set_timer()
        if len(body) > JOINED_BODY:
            self._unsent = memoryview(body)
            self._transport.write(head)
            self._write_piece()
        else:
            self._transport.write(head + body if body else head)
        self._sent_at = time.monotonic()

    def _write_piece(self) -> None:
        """Write the next piece of the body. Others have their turn before the one after it."""
        self._piece_scheduled = False
        if self._write_paused or not self._unsent:
            return
        piece, self._unsent = self._unsent[:BODY_PIECE], self._unsent[BODY_PIECE:]
        self._transport.write(piece)
        self._schedule_piece()

    def _schedule_piece(self) -> None:
        if self._unsent and not self._write_paused and not self._piece_scheduled:
            self._piece_scheduled = True
            self._loop.call_soon(self._write_piece)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._schedule_piece()

    # Closing

    def abort(self) -> None:
        """Close at once, also in the middle of a response."""
        if self._mark_closed():
            self._transport.abort()

    def close(self) -> None:
        """Close after what was written has been sent."""
        if self._mark_closed():
            self._transport.close()

    def fail(self, error: UpstreamError) -> None:
        """Close at once and pass the error to the waiter, or to the response after the bytes that have arrived."""
        waiter, response = self._waiter, self._response
        if self.owner.name:
            error.args = (f"{self.owner.name}: {error}",)
        self._waiter = self._response = None
        self.abort()
        if response is not None:
            response.finish(error)
        elif waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def _mark_closed(self, *, idle: bool = False) -> bool:
        """Leave the owner. Return False if the connection was closed already."""
        if self._state == _CLOSED:
            return False
        self._state = _CLOSED
        self._stop_timer()
        self._waiter = self._response = self._consumed = None
        self._unsent = b""
        self.owner.connection_closed(self, idle=idle)
        return True

    def _close_idle(self) -> None:
        if self._mark_closed(idle=True):
            self._transport.close()

    # The head's deadline

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._stop_timer()
        self._timer_at = self._deadline
        self._timer = self._loop.call_at(self._deadline, self._on_timer)

    def _on_timer(self) -> None:
        """Fail if no head has arrived in time. One timer covers many requests: a timer for each would cost more."""
        self._timer = None
        if self._state != _HEAD:
            return
        if self._loop.time() < self._deadline:
            self._set_timer()
        else:
            self.fail(UpstreamTimeout(f"no answer within {self._timeout:g} s."))

    # BodySource

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            if not self._transport.is_closing():
                self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def push_body_to(self, response: Response) -> None:
        self._consumed = response

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = self.owner.buffer[:nbytes]
        state = self._state
        if state == _CLOSED:
            return
        if state == _IDLE:
            # No request is open: these bytes must not become the response to the next request.
            self._close_idle()
            return
        consumed = self._consumed
        try:
            if state == _HEAD:
                self._feed_head(data)
            else:
                self._feed_body(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._state == _DONE:
                self._surplus = True
            else:
                self.fail(UpstreamProtocolError(f"the response is not valid HTTP: {self._problem or error}."))
        if self._state == _DONE:
            self._release()
        # Waiters and consumers are called last, so that they may use the connection, or the pool, at once.
        if self._new_response is not None:
            self._hand_over()
        elif consumed is not None:
            consumed.deliver()
        elif self._paused and self._response is not None:
            self._response.compact()

    def eof_received(self) -> None:
        if self._state == _BODY and self._until_close:
            consumed = self._consumed
            self._complete()
            self._surplus = True
            self._release()
            if consumed is not None:
                consumed.deliver()
        else:
            self._peer_closed()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state != _CLOSED:
            self._peer_closed(reset=isinstance(exc, ConnectionError))
        # The parser refers to methods of the connection: without this, only the garbage collector would free them.
        with contextlib.suppress(AttributeError):
            del self._parser

    def _peer_closed(self, *, reset: bool = False) -> None:
        if self._state == _IDLE:
            self._close_idle()
        elif self._state == _BODY:
            self.fail(UpstreamProtocolError("the connection closed in the middle of the response."))
        elif self._head_started:
            self.fail(UpstreamProtocolError("the connection closed in the middle of the response head."))
        elif self.uses > 1:
            self.owner.connection_stale(self)
            self.fail(StaleConnection("the connection closed without an answer.", reset=reset))
        else:
            self.fail(UpstreamProtocolError("the connection closed without an answer.", reset=reset))

    def _hand_over(self) -> None:
        waiter, response = self._new_response_waiter, self._new_response
        self._new_response_waiter = self._new_response = None
        if waiter is not None and response is not None and not waiter.done():
            waiter.set_result(response)

    def _feed_head(self, data: memoryview) -> None:
        if not self._head_started:
            self._head_started = True
            if data[0] != 0x48:
                # llhttp skips empty lines before "HTTP/" and knows further protocols.
                self._problem = "it does not begin with a status line"
                raise httptools.HttpParserError
        left = self._head_left
        if len(data) <= left:
            self._head_left = left - len(data)
            self._parser.feed_data(data)
            return
        # Cut at the limit, so that the result does not depend on how the network split the bytes.
        if left:
            self._head_left = 0
            self._parser.feed_data(data[:left])
        if self._state == _HEAD:
            self._problem = f"its head is over {HEAD_LIMIT} bytes"
            raise httptools.HttpParserError
        self._parser.feed_data(data[left:])

    def _feed_body(self, data: memoryview) -> None:
        self._progress = False
        self._parser.feed_data(data)
        if self._progress:
            self._framing_bytes = 0
        else:
            # Chunk extensions and trailers, which may be endless.
            self._framing_bytes += len(data)
            if self._framing_bytes > HEAD_LIMIT:
                self._problem = f"over {HEAD_LIMIT} bytes of framing without content"
                raise httptools.HttpParserError

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        if self._state == _DONE:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state != _HEAD:
            # A trailer, which may be discarded (RFC 9110 §6.5.1), or a field of what follows the response.
            return
        name = name.lower()
        if name == b"content-length":
            # llhttp has checked that it is a number, and the only one (RFC 9112 §6.3).
            self._content_length = int(value)
        else:
            self._headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._state != _HEAD:
            return
        status: int = self._parser.get_status_code()
        if status < 200 or status > 599:
            self._skip_interim(status)
            return
        version: str = self._parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise self._refusal(f"its version is HTTP/{version}")
        self._reusable = version == "1.1"
        if self._headers != self._fields.headers or not self._reusable:
            self._check_fields(version)
        length: int | None = self._content_length
        self._until_close = length is None and not self._chunked
        if status in {204, 304}:
            # These have no body whatever the fields say (RFC 9112 §6.3); our own server would wait for one.
            length = None
            self._until_close = False
        self._state = _BODY
        self._response = self._new_response = Response(self, status, self._fields, length)
        self._new_response_waiter = self._waiter
        self._waiter = None
        took = time.monotonic() - self._sent_at
        self.head_latency = took if took > BUSY_POLL_THRESHOLD else self.head_latency + (took - self.head_latency) / 8
        if self._bodiless:
            # The parser does not know the method and waits for a body: it can't be used again.
            self._reusable = False
            self._complete()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        response = self._response
        if response is not None and response.feed(body) > READ_AHEAD:
            self.pause()

    def on_message_complete(self) -> None:
        if self._state == _BODY:
            self._reusable = self._reusable and self._parser.should_keep_alive()
            self._complete()

    def _skip_interim(self, status: int) -> None:
        """Skip an interim response: the final one follows (RFC 9110 §15.2)."""
        if status == 101:
            raise self._refusal("it switches protocols (101), which was not asked for")
        if not 100 <= status < 200:
            raise self._refusal(f"its status is {status}")
        self._headers = []
        self._content_length = None

    def _check_fields(self, version: str) -> None:
        """Check fields that are not those of the response before, and keep them."""
        headers = self._headers
        if len(headers) + (self._content_length is not None) > FIELD_LIMIT:
            raise self._refusal(f"its head has over {FIELD_LIMIT} fields")
        codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
        if codings and codings != [b"chunked"]:
            raise self._refusal("its transfer coding is not just chunked")
        if codings and version == "1.0":
            # RFC 9112 §6.1: the framing of such a message is faulty.
            raise self._refusal("it has a transfer coding in HTTP/1.0")
        for name, value in headers:
            if name == b"keep-alive":
                self._read_keep_alive(value)
        self._chunked = bool(codings)
        self._fields = Fields(headers)

    def _read_keep_alive(self, value: bytes) -> None:
        """Read ``timeout`` of ``Keep-Alive`` (RFC 2068 §19.7.1.1), minus a second for requests on their way."""
        for part in value.split(b","):
            key, _, seconds = part.partition(b"=")
            if key.strip().lower() == b"timeout" and seconds.strip().isdigit() and len(seconds) < 10:
                self.idle_timeout = max(0.0, int(seconds) - 1.0)

    def _refusal(self, problem: str) -> httptools.HttpParserError:
        self._problem = problem
        return httptools.HttpParserError(problem)

    def _complete(self) -> None:
        response = self._response
        self._response = self._consumed = None
        self._state = _DONE
        if response is not None:
            response.finish(None)

    def _release(self) -> None:
        """Return the connection to its owner after a response, or close it if it can't be reused."""
        # If the response came before the whole request was sent, the rest of the request is here or in the transport.
        if self._surplus or not self._reusable or self._unsent or self._transport.get_write_buffer_size():
            self.close()
            return
        self.resume()
        self._state = _IDLE
        self.owner.connection_released(self)
