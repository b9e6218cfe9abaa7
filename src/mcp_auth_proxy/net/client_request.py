"""The answer to one request: what an ASGI application makes of it, or what the fast path puts there at once.

Head and first bytes of the body go out in one write: two cost the proxy and its client a system call and a wake-up
more, which is a tenth of a small request.
"""

import asyncio
import http
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol
from urllib.parse import unquote

from uvicorn.protocols.http.flow_control import FlowControl

logger = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
App = Callable[..., Awaitable[None]]

WHEN_GONE = "mcp_auth_proxy.when_gone"
"""An extension of ASGI: takes what is to be called once if the client is lost before it has its answer."""

_BODILESS = frozenset({204, 304})
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}


class ClientConnection(Protocol):
    """The connection that a request came on."""

    transport: asyncio.Transport
    flow: FlowControl

    def start(self, reply: "ClientRequest", app: App) -> None:
        """Run the application for this answer."""

    def answered(self, reply: "ClientRequest") -> None:
        """The answer is complete; where it is not ``keep_alive`` it was the last one."""


class ClientRequest:
    """Knows the request's head, collects its body, and sends what the answer is made of.

    As ASGI has it, nothing is sent before the first part of the body, which may be empty: an application whose body
    is slow to come sends an empty part first.
    """

    __slots__ = (
        "_carrier",
        "_chunked",
        "_head",
        "_length",
        "_news",
        "complete",
        "disconnected",
        "expects_continue",
        "headers",
        "host",
        "http_version",
        "keep_alive",
        "method",
        "on_gone",
        "parts",
        "path",
        "query",
        "received",
        "size",
        "started",
    )

    def __init__(
        self,
        carrier: ClientConnection,
        *,
        method: bytes,
        http_version: str,
        path: bytes,
        query: bytes,
        headers: Headers,
        host: bytes,
        keep_alive: bool,
        expects_continue: bool,
    ) -> None:
        self._carrier = carrier
        self.method = method
        self.http_version = http_version
        self.path = path
        """As it was sent, without the query."""
        self.query = query
        self.headers = headers
        """In the order they came, names in lower case."""
        self.host = host
        """Empty where a web page may have sent the request: then the whole head is to be looked at."""
        self.keep_alive = keep_alive
        self.expects_continue = expects_continue
        self.parts: list[bytes] = []
        """What has come of the body and was not received yet."""
        self.size = 0
        """Bytes in ``parts``."""
        self.received = False
        """Whether the whole body has come."""
        self.disconnected = False
        self.started = False
        self.complete = False
        self.on_gone: Callable[[], None] | None = None
        """Told once when the client is lost."""
        self._head = b""
        self._chunked: bool | None = None
        self._length: int | None = 0
        """What is still to come of the body; None: it ends with the connection."""
        self._news: asyncio.Event | None = None

    # The connection's side

    def feed(self, data: bytes) -> None:
        """Take a part of the request's body."""
        self.parts.append(data)
        self.size += len(data)
        self._tell()

    def feed_end(self) -> None:
        """The request's body is complete."""
        self.received = True
        self._tell()

    def abandon(self) -> None:
        """Tell the application that its client is lost."""
        if not self.complete:
            self.disconnected = True
            on_gone, self.on_gone = self.on_gone, None
            if on_gone is not None:
                on_gone()
        self._tell()

    def _tell(self) -> None:
        if self._news is not None:
            self._news.set()

    # For the fast path

    @property
    def may_write(self) -> bool:
        """Whether the client takes what is sent to it."""
        return not self._carrier.flow.write_paused

    def body(self) -> bytes:
        """Return what is there of the request's body, and leave it there."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)

    def answer(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Answer in one piece; not for HEAD. An answer that can't be sent costs the client its connection."""
        if self.disconnected:
            return
        self.started = True
        try:
            self._head = self._head_of(status, headers, whole=len(body))
        except RuntimeError:
            logger.exception("an answer can't be sent")
            self._carrier.transport.close()
            return
        self._send_body(body, last=True)

    def run_app(self, app: App) -> None:
        """Leave the answer to an application after all."""
        self._carrier.start(self, app)

    # For ASGI applications

    def scope(self) -> dict[str, Any]:
        """Return what an application is told of the request (ASGI, HTTP connection scope)."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self.http_version,
            "scheme": "http",
            "method": self.method.decode("ascii"),
            "path": unquote(self.path.decode("ascii")),
            "raw_path": self.path,
            "query_string": self.query,
            "headers": self.headers,
            "extensions": {WHEN_GONE: self._when_gone},
        }

    def _when_gone(self, call: Callable[[], None]) -> None:
        self.on_gone = call
        if self.disconnected:
            call()

    async def run(self, app: App) -> None:
        """Have an application answer. What it leaves unfinished costs the client its connection."""
        self._news = asyncio.Event()
        if self.parts or self.received:
            self._news.set()
        try:
            await app(self.scope(), self.receive, self.send)
        except asyncio.CancelledError:
            self._carrier.transport.close()
            raise
        except Exception:  # of an application, so of any kind; the client is not left waiting for it
            logger.exception("a request ended with an internal error")
        finally:
            self.on_gone = None
        if self.complete or self.disconnected:
            return
        if self.started:
            self._carrier.transport.close()
            return
        self.keep_alive = False
        self._chunked = None
        self.answer(500, [(b"content-type", b"text/plain; charset=utf-8")], b"Internal Server Error")

    async def receive(self) -> dict[str, Any]:
        """Return what has come of the request's body, or that the client is gone; waits for one of them."""
        assert self._news is not None
        if self.expects_continue:
            self.expects_continue = False
            if not self._carrier.transport.is_closing():
                self._carrier.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.disconnected and not self.complete:
            self._carrier.flow.resume_reading()
            await self._news.wait()
            self._news.clear()
        if self.disconnected or self.complete:
            return {"type": "http.disconnect"}
        body = self.body()
        self.parts = []
        self.size = 0
        return {"type": "http.request", "body": body, "more_body": not self.received}

    async def send(self, message: Any) -> None:
        """Send a head or a part of the body; waits while the client is slow to take what was sent before.

        Raises RuntimeError on messages out of order, and on a body that is not as long as was announced.
        """
        if self._carrier.flow.write_paused and not self.disconnected:
            await self._carrier.flow.drain()
        if self.disconnected:
            return
        expected = "http.response.body" if self.started else "http.response.start"
        if self.complete or message["type"] != expected:
            raise RuntimeError(f"{message['type']} is out of order")
        if self.started:
            self._send_body(message.get("body", b""), last=not message.get("more_body", False))
        else:
            self.started = True
            self.expects_continue = False
            self._head = self._head_of(message["status"], message.get("headers", ()))

    # What is sent

    def _head_of(self, status: int, headers: Iterable[tuple[bytes, bytes]], whole: int | None = None) -> bytes:
        """Return the head with the empty line that ends it, and settle the framing of the body (RFC 9112 §6).

        ``whole``: the length of the body where all of it is known.
        """
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in headers:
            if name == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            if name == b"content-length":
                self._chunked = False
                self._length = int(value)
            lines.append(name + b": " + value + b"\r\n")
        if not self.received:
            # Many clients send all of their request before they read. Nobody waits for the rest of it here.
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.method == b"HEAD":
            self._chunked = False
            self._length = 0
        elif self._chunked is None and status not in _BODILESS:
            if whole is not None:
                self._length = whole
                lines.append(b"content-length: %d\r\n" % whole)
            elif self.http_version == "1.0":
                # It knows no chunks (RFC 9112 §6.1).
                self._chunked = False
                self._length = None
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        # One look at the whole costs less than one at each part.
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header field holds a line break or NUL")
        return head

    def _send_body(self, data: bytes, *, last: bool) -> None:
        if self._chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if last:
                data += b"0\r\n\r\n"
        elif self.method == b"HEAD":
            data = b""
        elif self._length is not None:
            self._length -= len(data)
            if self._length < 0 or (last and self._length):
                raise RuntimeError("the body is not as long as Content-Length says")
        if self._head:
            data = self._head + data
            self._head = b""
        if data:
            self._carrier.transport.write(data)
        if last:
            self.complete = True
            self.on_gone = None
            self._tell()
            self._carrier.answered(self)
