"""A client's request: its head, its body as it arrives, and the response to it.

The head of a response and the first bytes of its body are sent in one write: a second write costs the proxy and the
client a system call and a wake-up each, which is a tenth of a small request.
"""

import asyncio
import contextlib
import http
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from mcp_auth_proxy.errors import BodyTooLarge, ClientDisconnected, Overloaded
from mcp_auth_proxy.net.http_head import Fields, Headers, encode_fields
from mcp_auth_proxy.net.request_parser import RequestHead

logger = logging.getLogger(__name__)

START = 4096
"""Bytes of a body that is too large, which are kept for the answer to it."""

START_PATIENCE = 0.2
"""Seconds for which they are waited for: many clients send head and body one after the other."""

_NO_BODY = frozenset({204, 304})
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}

Serve = Callable[["ClientRequest"], Awaitable[None]]


class RequestServer(Protocol):
    """The application behind the listener: it answers requests."""

    def try_fast_path(self, request: "ClientRequest") -> bool:
        """Answer a request, whose body is complete, without a task; return False to leave it to ``serve``."""

    async def serve(self, request: "ClientRequest") -> None:
        """Answer a request, in a task of its own."""


class ClientConnection(Protocol):
    """The connection that a request came on."""

    transport: asyncio.Transport
    write_paused: bool
    peer: str
    """The address at the other end; empty if it is not known."""

    def resume_reading(self) -> None:
        """Continue reading: there is space for more of the request's body."""

    def client(self, request: "ClientRequest") -> str:
        """Return whose request it is, for a log."""

    def run(self, request: "ClientRequest", serve: Serve) -> None:
        """Run ``serve`` for this request in a task."""

    def response_complete(self, request: "ClientRequest") -> None:
        """Continue with the next request, or close if the request is not ``keep_alive``."""


class ClientRequest:
    """One request and the response to it.

    The response is sent either by ``respond``, or by ``start`` and then ``write`` until ``last``. ``start`` alone sends
    nothing: if the body is slow to arrive, ``write(b"")`` sends the head. Both have a form that waits while the client
    is slow to read, and one that does not (``…_nowait``).

    Calls out of order, a body that is not as long as Content-Length says, and header fields with a line break or NUL
    raise RuntimeError. Header names are in lower case, both of the request and of the response. Once the client is
    gone, everything that is sent is dropped without an error.
    """

    __slots__ = (
        "_changed",
        "_chunked",
        "_connection",
        "_head",
        "_length",
        "_parts",
        "_size",
        "added_fields",
        "complete",
        "content_length",
        "disconnected",
        "expects_continue",
        "fields",
        "headers",
        "host",
        "http_version",
        "keep_alive",
        "method",
        "on_disconnect",
        "on_writable",
        "on_write",
        "path",
        "query",
        "received",
        "sent",
        "started",
        "status",
    )

    method: bytes
    path: bytes
    """As it was sent, without the query."""
    query: bytes
    headers: Headers
    """In the order they came, names in lower case, without Content-Length."""
    host: bytes
    """Empty if a web page may have sent the request: the whole head has to be checked then (see RequestHead)."""
    http_version: str
    keep_alive: bool
    """May be set to False: the connection closes after this response."""
    expects_continue: bool
    content_length: int | None
    fields: Fields
    """``headers``, in an object that the connection's requests share while they stay the same."""

    def __init__(self, connection: ClientConnection, head: RequestHead) -> None:
        self._connection = connection
        (
            self.method,
            self.path,
            self.query,
            self.headers,
            self.host,
            self.http_version,
            self.keep_alive,
            self.expects_continue,
            self.content_length,
            self.fields,
        ) = head
        self.received = False
        """Whether the whole body has arrived."""
        self.started = False
        self.status = 0
        """Of the response; 0 until it is started."""
        self.sent = 0
        """Bytes of the response's body that were sent, without their framing."""
        self.complete = False
        self.disconnected = False
        self.on_disconnect: Callable[[], None] | None = None
        """Called once if the client disconnects before it has its response."""
        self.on_writable: Callable[[], None] | None = None
        """Called once when ``may_write`` becomes true again."""
        self.on_write: Callable[[bytes], None] | None = None
        """Called with each part of the body that ``write`` sends, without its framing."""
        self.added_fields = b""
        """Encoded fields that every response to this request has, whoever answers it."""
        self._parts: list[bytes] = []
        """The parts of the body that have arrived and were not read yet."""
        self._size = 0
        """Bytes in ``_parts``."""
        self._head = b""
        """The head of the response, until it is sent."""
        self._chunked = False
        self._length: int | None = None
        """Bytes of the response's body that are still to be written; None if it ends with the connection."""
        self._changed: asyncio.Event | None = None
        """Set whenever something changes that a coroutine may wait for; created when one does."""

    # The body of the request

    def peek_body(self) -> bytes:
        """Return the part of the body that has arrived, without consuming it."""
        parts = self._parts
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release_body(self) -> None:
        """Drop what is here of the body: nobody will read it."""
        self._parts = []
        self._size = 0

    async def body(self, limit: int, take: Callable[[int], bool]) -> bytes:
        """Return the whole body, at most ``limit`` bytes; call this once.

        With a Content-Length over the limit only the start is read. ``take`` counts the bytes of each part, and returns
        False if there is no memory for them. Raises BodyTooLarge, Overloaded, ClientDisconnected.
        """
        if not self.received and self.content_length is not None and self.content_length > limit:
            raise BodyTooLarge(limit, start=await self._read_start())
        body = b""
        # Not a list of parts: a client that sends single bytes would make it fifty times as large as the body.
        parts = bytearray()
        while part := await self.read():
            if len(body) + len(parts) + len(part) > limit:
                raise BodyTooLarge(limit, start=b"".join((body[:START], parts[:START], part[:START]))[:START])
            if not take(len(part)):
                raise Overloaded("limits.memory")
            if body or parts:
                parts += body
                parts += part
                body = b""
            else:
                body = part
        return bytes(parts) if parts else body

    async def _read_start(self) -> bytes:
        """Return the start of a body that is not read; ``b""`` if the client sends none of it without being asked."""
        if self.expects_continue and not self._parts:
            return b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_PATIENCE):
                return (await self.read())[:START]
        return b""

    async def read(self) -> bytes:
        """Return the next part of the body, ``b""`` at its end. Raises ClientDisconnected."""
        while not self._parts and not self.received and not self.disconnected:
            self._send_continue()
            self._connection.resume_reading()
            await self._wait()
        if self.disconnected:
            raise ClientDisconnected("The client closed the connection before its request was complete.")
        data = self.peek_body()
        self._parts = []
        self._size = 0
        return data

    def _send_continue(self) -> None:
        """Ask for the body if the client waits to be asked (RFC 9110 §10.1.1)."""
        if self.expects_continue:
            self.expects_continue = False
            if not self.started and not self._connection.transport.is_closing():
                self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # The client

    @property
    def client(self) -> str:
        """Whose request it is, for a log: an address."""
        return self._connection.client(self)

    @property
    def peer(self) -> str:
        """The address that the connection comes from, which may be that of a web server in front; or empty."""
        return self._connection.peer

    @property
    def may_write(self) -> bool:
        """Whether the client keeps up with reading what it is sent."""
        return not self._connection.write_paused

    def when_disconnected(self, callback: Callable[[], None]) -> None:
        """Set ``on_disconnect``; call it at once if the client is gone already."""
        if self.disconnected:
            callback()
        else:
            self.on_disconnect = callback

    async def wait_closed(self) -> None:
        """Wait until the response is complete or the client is gone."""
        while not self.complete and not self.disconnected:
            await self._wait()

    async def _wait(self) -> None:
        # Each waiter checks its own condition before and after, so one event, which any of them clears, is enough.
        if self._changed is None:
            self._changed = asyncio.Event()
        self._changed.clear()
        await self._changed.wait()

    # The response

    def run(self, serve: Serve) -> None:
        """Leave the response to a coroutine, in a task of its own."""
        self._connection.run(self, serve)

    async def run_to_end(self, serve: Serve) -> None:
        """Await ``serve``. If it leaves the response unfinished, close the connection; if not started, answer 500."""
        try:
            await serve(self)
        except asyncio.CancelledError:
            self._connection.transport.close()
            raise
        except Exception:  # a bug in a handler must not leave the client waiting forever
            logger.exception("a request ended with an internal error")
        finally:
            self.on_disconnect = self.on_writable = None
        if self.complete or self.disconnected:
            return
        if self.started:
            self._connection.transport.close()
            return
        self.keep_alive = False
        self.respond(500, [(b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error")

    def respond(self, status: int, headers: Iterable[tuple[bytes, bytes]] | bytes, body: bytes) -> None:
        """Send a whole response without waiting; Content-Length is added if ``headers`` has none.

        ``headers`` may be encoded already (``encode_fields``), without Connection and the fields of the framing.

        Does not raise, since it is called by callbacks of other connections: a response that can't be sent is logged
        and costs the client its connection.
        """
        if self.disconnected:
            return
        try:
            self._start(status, headers, len(body))
            data = self._frame(body, last=True)
        except RuntimeError:
            logger.exception("a response can't be sent")
            self._connection.transport.close()
            return
        self._send(data, last=True)

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]] | bytes) -> None:
        """Set the head of the response; it is sent with the first bytes of the body."""
        self.start_nowait(status, headers)

    def start_nowait(self, status: int, headers: Iterable[tuple[bytes, bytes]] | bytes) -> None:
        """Set the head of the response; it is sent with the first bytes of the body."""
        if not self.disconnected:
            self._start(status, headers, None)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Send a part of the body; waits first while the client is slow to read what was sent before."""
        while self._connection.write_paused and not self.disconnected:
            await self._wait()
        self.write_nowait(data, last=last)

    def write_nowait(self, data: bytes, *, last: bool = False) -> None:
        """Send a part of the body."""
        if self.disconnected:
            return
        if not self.started or self.complete:
            raise RuntimeError("a body is written before the head of the response, or after its end")
        self._send(self._frame(data, last=last), last=last)
        if self.on_write is not None:
            self.on_write(data)

    def abort(self) -> None:
        """Close the connection in the middle of a response, so that the client notices that it is incomplete."""
        self.on_disconnect = self.on_writable = None
        self._connection.transport.close()

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]] | bytes, whole: int | None) -> None:
        """Encode the head and choose how the body is framed (RFC 9112 §6).

        ``whole`` is the length of the body if all of it is known.
        """
        if self.started:
            raise RuntimeError("the response has been started already")
        self.started = True
        self.status = status
        self.expects_continue = False
        fields, length = (headers, None) if isinstance(headers, bytes) else self._encode(headers)
        if not self.received:
            # Many clients send all of their request before they read. The connection does not wait for the rest.
            self.keep_alive = False
        framing = b""
        if length is None and status not in _NO_BODY:
            if whole is not None:
                length = whole
                framing = b"content-length: %d\r\n" % whole
            elif self.http_version != "1.0" and self.method != b"HEAD":  # 1.0 has no chunks (RFC 9112 §6.1)
                self._chunked = True
                framing = b"transfer-encoding: chunked\r\n"
        self._length = 0 if status in _NO_BODY else length
        first = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        close = b"" if self.keep_alive else b"connection: close\r\n"
        self._head = b"".join((first, fields, self.added_fields, close, framing, b"\r\n"))

    def _encode(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, int | None]:
        """Return the encoded fields, and Content-Length if it is among them."""
        length = None
        sent: Headers = []
        for name, value in headers:
            if name == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            if name == b"content-length":
                length = int(value)
            sent.append((name, value))
        try:
            return encode_fields(sent), length
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    def _frame(self, data: bytes, *, last: bool) -> bytes:
        """Return the bytes that carry a part of the body."""
        if self.method == b"HEAD":
            return b""
        self.sent += len(data)
        if self._chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            return data + b"0\r\n\r\n" if last else data
        if self._length is not None:
            self._length -= len(data)
            if self._length < 0 or (last and self._length):
                raise RuntimeError("the body is not as long as Content-Length says")
        return data

    def _send(self, data: bytes, *, last: bool) -> None:
        if self._head:
            data = self._head + data
            self._head = b""
        if data:
            self._connection.transport.write(data)
        if last:
            self.complete = True
            self.on_disconnect = self.on_writable = None
            if self._changed is not None:
                self._changed.set()
            self._connection.response_complete(self)

    # For the connection

    def receive_body(self, data: bytes) -> int:
        """Add a part of the body; return how many bytes wait to be read."""
        self._parts.append(data)
        self._size += len(data)
        if self._changed is not None:
            self._changed.set()
        return self._size

    def receive_end(self) -> None:
        """Note that the body is complete."""
        self.received = True
        if self._changed is not None:
            self._changed.set()

    def resume_writing(self) -> None:
        """Wake the coroutines and the callback that wait for the client to read."""
        on_writable, self.on_writable = self.on_writable, None
        if on_writable is not None:
            on_writable()
        if self._changed is not None:
            self._changed.set()

    def disconnect(self) -> None:
        """Note that the client is gone, and call ``on_disconnect``."""
        if not self.complete:
            self.disconnected = True
            self.on_writable = None
            on_disconnect, self.on_disconnect = self.on_disconnect, None
            if on_disconnect is not None:
                on_disconnect()
        if self._changed is not None:
            self._changed.set()
