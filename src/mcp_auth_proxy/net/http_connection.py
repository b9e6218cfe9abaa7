"""One HTTP/1.1 exchange at a time on one connection to an upstream, and what comes back of it (RFC 9112).

The parser is llhttp without lenient flags. It refuses Content-Length beside Transfer-Encoding, repeated or malformed
Content-Length, obs-fold, bare CR and LF, and white space before a colon; what it lets pass of what design §4.8
forbids is refused here: other transfer codings than ``chunked``, transfer codings in HTTP/1.0, versions other than
1.0 and 1.1, status codes that are none, bytes before the status line, and heads and trailers without end.
"""

import asyncio
import contextlib
import socket
import time
from typing import Final, Protocol, cast

import httptools

from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError, UpstreamTimeout
from mcp_auth_proxy.net.http_response import READ_AHEAD, Response

__all__ = ["Connection", "ConnectionStale", "PoolCallbacks", "Response"]

HEAD_LIMIT = 64 * 1024
"""Bytes until the head of the response must be complete, interim responses included."""

FIELD_LIMIT = 200

READ_SIZE = 64 * 1024
"""Bytes read at a time. Body chunks are cut from it with one copy; under 128 KiB malloc has them without new pages."""

JOINED_BODY = 64 * 1024
"""Bytes of request body up to which copying it behind the head is cheaper than a second buffer for the kernel."""

_FRAMING = frozenset({b"content-length", b"transfer-encoding", b"keep-alive"})


BUSY_POLL_THRESHOLD = 0.00015
"""Seconds: an answer that comes sooner is here before a process that went to sleep for it is awake again."""

_IDLE: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_DONE: Final = 3
"""The response is complete; what else came with it is still being looked at."""
_CLOSED: Final = 4
# Plain numbers: a member of an enumeration costs a look-up at each of ten comparisons per request.


class ConnectionStale(UpstreamProtocolError):
    """A kept connection closed before one byte of the response came: most likely it was idle for too long."""


class ResponseWaiter(Protocol):
    """Who waits for a response: an ``asyncio.Future``, or what is called in the place of one."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: Response, /) -> None:
        """The head has come, and what came with it has been read."""

    def set_exception(self, exception: UpstreamError, /) -> None:
        """There will be none."""


class PoolCallbacks(Protocol):
    """Where a connection belongs."""

    name: str
    """The upstream, as errors name it: ``host:port``."""

    buffer: memoryview
    """What all connections of one event loop read into: every read is used up before the next."""

    def released(self, connection: "Connection") -> None:
        """The exchange is complete and the connection may carry another."""

    def stale(self, connection: "Connection") -> None:
        """The upstream closed the connection when it was used again."""

    def connection_closed(self, connection: "Connection", *, idle: bool) -> None:
        """The connection is closed. Called once; ``idle`` where the upstream closed it between exchanges."""


class Connection(asyncio.BufferedProtocol):
    """A connection to an upstream, as a pool keeps it."""

    __slots__ = (
        "_answer",
        "_arrived",
        "_arrived_for",
        "_begun",
        "_bodiless",
        "_consumer",
        "_deadline",
        "_extra",
        "_fault",
        "_head_left",
        "_headers",
        "_length",
        "_loop",
        "_parser",
        "_paused",
        "_progress",
        "_response",
        "_reusable",
        "_seen",
        "_socket",
        "_state",
        "_timeout",
        "_timer",
        "_timer_at",
        "_transport",
        "_unproductive",
        "_until_close",
        "head_latency",
        "idle_for",
        "idle_since",
        "idle_timeout",
        "owner",
        "uses",
    )

    _parser: httptools.HttpResponseParser
    _transport: asyncio.Transport

    def __init__(self, owner: PoolCallbacks, sock: socket.socket) -> None:
        self.owner = owner
        self.uses = 0
        self.idle_since = 0.0
        self.idle_for = 0.0
        """Seconds that it had been idle when it was last taken."""
        self.idle_timeout = float("inf")
        """Seconds that the upstream says it keeps the connection."""
        self.head_latency = 1.0
        """Seconds from a request to the head of its response, on average of late; the last where that was not brief."""
        self._begun = 0.0
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._state = _IDLE
        self._answer: ResponseWaiter | None = None
        self._consumer: Response | None = None
        self._response: Response | None = None
        self._arrived: Response | None = None
        self._arrived_for: ResponseWaiter | None = None
        """Who is given what has arrived, as soon as this read is used up."""
        self._deadline = 0.0
        self._timeout = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._headers: list[tuple[bytes, bytes]] = []
        self._fault = ""
        self._paused = False

    # The pool's side

    @property
    def closed(self) -> bool:
        return self._state == _CLOSED

    def is_open(self) -> bool:
        """Whether the upstream still keeps the idle connection, as far as the kernel knows this instant.

        The event loop may not have come to read the end of a connection that has been closed. Bytes that wait
        while nothing was asked for are no good either.
        """
        if self._state != _IDLE or self._transport.is_closing():
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def exchange(self, request: bytes, body: bytes, *, bodiless: bool, timeout: float) -> asyncio.Future[Response]:
        """Send a request; return what becomes the response once its head has come (see ``begin``)."""
        answer: asyncio.Future[Response] = self._loop.create_future()
        self.begin(answer, request, body, bodiless=bodiless, timeout=timeout)
        return answer

    def begin(self, answer: ResponseWaiter, request: bytes, body: bytes, *, bodiless: bool, timeout: float) -> None:
        """Send a request; ``answer`` is given the response once its head has come.

        ``bodiless``: the method is HEAD (RFC 9110 §9.3.2). ``timeout`` in seconds until the head must have come.
        The answer fails with UpstreamBroken, ConnectionStale or UpstreamTimeout.
        """
        self.uses += 1
        self._state = _HEAD
        self._bodiless = bodiless
        self._head_left = HEAD_LIMIT
        self._headers = []
        self._length = b""
        self._until_close = True
        self._extra = False
        self._seen = False
        self._consumer = None
        self._unproductive = 0
        self._answer = answer
        self._timeout = timeout
        self._deadline = deadline = self._loop.time() + timeout
        if self._timer is None or deadline < self._timer_at:
            self._set_timer()
        if len(body) > JOINED_BODY:
            self._transport.writelines((request, body))
        else:
            self._transport.write(request + body if body else request)
        self._begun = time.monotonic()

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        if self._leave():
            self._transport.abort()

    def close(self) -> None:
        """Close in order."""
        if self._leave():
            self._transport.close()

    def fail(self, error: UpstreamError) -> None:
        """Close at once and tell whoever waits for the response; bytes that came before stay readable."""
        answer, response = self._answer, self._response
        error.args = (f"{self.owner.name}: {error}",)
        self._answer = self._response = None
        self.abort()
        if response is not None:
            response.finish(error)
        elif answer is not None and not answer.done():
            answer.set_exception(error)

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            if not self._transport.is_closing():
                self._transport.pause_reading()

    def push_body_to(self, response: Response) -> None:
        self._consumer = response

    def resume(self) -> None:
        """Read on after a pause."""
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def _leave(self, *, idle: bool = False) -> bool:
        """Stop being a connection; False where it was none any more."""
        if self._state == _CLOSED:
            return False
        self._state = _CLOSED
        self._stop_timer()
        self._answer = self._response = None
        self.owner.connection_closed(self, idle=idle)
        return True

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        self._stop_timer()
        self._timer_at = self._deadline
        self._timer = self._loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        """Fail where no head has come in time. One timer serves many exchanges: one for each costs more."""
        self._timer = None
        if self._state != _HEAD:
            return
        if self._loop.time() < self._deadline:
            self._set_timer()
        else:
            self.fail(UpstreamTimeout(f"no answer within {self._timeout:g} s."))

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
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
            # Nothing was asked for: whatever this is, it must not become the answer to the next request.
            self._close_idle()
            return
        try:
            if state == _HEAD:
                self._feed_head(data)
            else:
                self._feed_body(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._state == _DONE:
                self._extra = True
            else:
                self.fail(UpstreamProtocolError(f"the response is not valid HTTP: {self._fault or error}."))
        if self._state == _DONE:
            self._release()
        if self._consumer is not None:
            self._consumer.deliver()
        elif self._arrived is not None:
            self._hand_over()

    def _hand_over(self) -> None:
        answer, arrived = self._arrived_for, self._arrived
        self._arrived_for = self._arrived = None
        if answer is not None and arrived is not None and not answer.done():
            answer.set_result(arrived)

    def eof_received(self) -> None:
        if self._state == _BODY and self._until_close:
            self._complete()
            self._extra = True
            self._release()
        else:
            self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state != _CLOSED:
            self._lost()
        # The parser holds callbacks of the connection: without this, only the garbage collector would part them.
        with contextlib.suppress(AttributeError):
            del self._parser

    def _lost(self) -> None:
        if self._state == _IDLE:
            self._close_idle()
        elif self._state == _BODY:
            self.fail(UpstreamProtocolError("the connection closed in the middle of the response."))
        elif self._seen:
            self.fail(UpstreamProtocolError("the connection closed in the middle of the response head."))
        elif self.uses > 1:
            self.owner.stale(self)
            self.fail(ConnectionStale("the connection closed without an answer."))
        else:
            self.fail(UpstreamProtocolError("the connection closed without an answer."))

    def _close_idle(self) -> None:
        if self._leave(idle=True):
            self._transport.close()

    def _feed_head(self, data: memoryview) -> None:
        if not self._seen:
            self._seen = True
            if data[0] != 0x48:
                # llhttp skips empty lines before "HTTP/", and knows further protocols.
                self._fault = "it does not begin with a status line"
                raise httptools.HttpParserError
        left = self._head_left
        if len(data) <= left:
            self._head_left = left - len(data)
            self._parser.feed_data(data)
            return
        # Cut at the limit, so that the verdict does not depend on how the bytes were split on their way.
        if left:
            self._head_left = 0
            self._parser.feed_data(data[:left])
        if self._state == _HEAD:
            self._fault = f"its head is over {HEAD_LIMIT} bytes"
            raise httptools.HttpParserError
        self._parser.feed_data(data[left:])

    def _feed_body(self, data: memoryview) -> None:
        self._progress = False
        self._parser.feed_data(data)
        if self._progress:
            self._unproductive = 0
        else:
            # Chunk extensions and trailers, of which there is no end to be seen.
            self._unproductive += len(data)
            if self._unproductive > HEAD_LIMIT:
                self._fault = f"over {HEAD_LIMIT} bytes of framing without content"
                raise httptools.HttpParserError

    # The parser's side

    def on_message_begin(self) -> None:
        if self._state == _DONE:
            self._extra = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state != _HEAD:
            # A trailer (RFC 9110 §6.5.1: may be discarded), or what follows the response.
            return
        headers = self._headers
        if len(headers) >= FIELD_LIMIT:
            raise self._refusal(f"its head has over {FIELD_LIMIT} fields")
        name = name.lower()
        value = value.rstrip(b" \t")
        if name in _FRAMING:
            if name == b"keep-alive":
                self._note_life(value)
            elif name == b"content-length":
                self._length = value
                self._until_close = False
            elif value.lower() != b"chunked" or not self._until_close:
                raise self._refusal("its transfer coding is not just chunked")
            else:
                self._until_close = False
        headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._state != _HEAD:
            return
        status: int = self._parser.get_status_code()
        if status < 200 or status > 599:
            self._skip_interim(status)
            return
        version: str = self._parser.get_http_version()
        headers = self._headers
        if version != "1.1":
            self._check_version(version)
        self._reusable = version == "1.1"
        if status in {204, 304}:
            # RFC 9112 §6.3: without a body, whatever the fields say; a server of ours would wait for one.
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            self._until_close = False
        self._headers = []
        self._state = _BODY
        self._response = self._arrived = Response(self, status, headers)
        self._arrived_for = self._answer
        self._answer = None
        took = time.monotonic() - self._begun
        self.head_latency = took if took > BUSY_POLL_THRESHOLD else self.head_latency + (took - self.head_latency) / 8
        if self._bodiless:
            # The parser knows nothing of methods and waits for a body: it can't be used again.
            self._reusable = False
            self._complete()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        response = self._response
        if response is not None and response.feed(body) > READ_AHEAD and not self._paused:
            self._paused = True
            if not self._transport.is_closing():
                self._transport.pause_reading()

    def on_message_complete(self) -> None:
        if self._state == _BODY:
            self._reusable = self._reusable and self._parser.should_keep_alive()
            self._complete()

    def _skip_interim(self, status: int) -> None:
        """Forget an interim response (RFC 9110 §15.2): the final one follows."""
        if status == 101:
            raise self._refusal("it switches protocols (101), which was not asked for")
        if not 100 <= status < 200:
            raise self._refusal(f"its status is {status}")
        self._headers = []
        self._length = b""
        self._until_close = True

    def _check_version(self, version: str) -> None:
        if version != "1.0":
            raise self._refusal(f"its version is HTTP/{version}")
        if not self._until_close and not self._length:
            # RFC 9112 §6.1: the framing of such a message is faulty.
            raise self._refusal("it has a transfer coding in HTTP/1.0")

    def _note_life(self, value: bytes) -> None:
        """Read ``timeout`` of ``Keep-Alive`` (RFC 2068 §19.7.1.1); a second is left for requests on their way."""
        for part in value.split(b","):
            key, _, seconds = part.partition(b"=")
            if key.strip().lower() == b"timeout" and seconds.strip().isdigit() and len(seconds) < 10:
                self.idle_timeout = max(0.0, int(seconds) - 1.0)

    def _refusal(self, fault: str) -> httptools.HttpParserError:
        self._fault = fault
        return httptools.HttpParserError(fault)

    def _complete(self) -> None:
        response = self._response
        self._response = None
        self._state = _DONE
        if response is not None:
            response.finish(None)

    def _release(self) -> None:
        """After a complete exchange: back to the pool, or closed."""
        # An answer that came before the whole request was sent leaves the rest of it on the connection.
        if self._extra or not self._reusable or self._transport.get_write_buffer_size():
            self.close()
            return
        self.resume()
        self._state = _IDLE
        self.owner.released(self)
