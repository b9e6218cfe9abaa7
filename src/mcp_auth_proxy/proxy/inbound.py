"""The HTTP/1.1 listener: uvicorn's protocol with the bounds and refusals that it leaves open.

Measured in uvicorn 0.54: heads of any size, clients that send a byte a second, absolute-form targets, and requests
with two Hosts or none are all let through.
"""

import asyncio
import contextlib
import http
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mcp_auth_proxy.proxy.reply import Reply

MAX_HEAD = 64 * 1024
"""Bytes of request line and header fields."""

MAX_FIELDS = 200

MIN_BODY_RATE = 1024
"""Bytes a second that a body must come with."""

LINGER = 1.0
"""Seconds for which a refused client may go on sending, unread, so that it can read why."""

_LOOKED_AT = frozenset({b"content-length", b"expect", b"host", b"transfer-encoding", b"upgrade"})


class InboundProtocol(HttpToolsProtocol):
    """One connection from a client."""

    cycle: Reply | None  # type: ignore[assignment]  # uvicorn's own annotation leaves out that there may be none yet

    slow_after = 8.0
    """Seconds in which a request head must be complete, and between looks at whether a body comes on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_message = False
        self._in_head = True
        self._read_bytes = 0
        self._head_bytes = 0
        self._body_bytes = 0
        self._trailer_bytes = 0
        self._hosts = 0
        self._framing = b""
        self._coding = b""
        self._upgrades = False
        self._progress = False
        self._framing_bytes = 0
        self._refusal = 400
        self._slow_timer: asyncio.TimerHandle | None = None
        self._receiving: Reply | None = None
        """The answer to the request whose body is being received."""
        self._unfinished: list[Reply] = []
        self._held_back = b""
        self._deferred = 0
        self._leaving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._slow_timer = self.loop.call_later(self.slow_after, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        # uvicorn tells the last request of the connection alone; the upstream of the first would stay open.
        for reply in self._unfinished:
            reply.abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving or self._deferred:
            return
        if self._held_back or (self._unfinished and not self._in_message):
            # Its turn comes when the request before has its answer; more than this is not read meanwhile. What comes
            # while earlier bytes still wait for their turn must not overtake them: a body would become a request.
            self._held_back += data
            if len(self._held_back) > MAX_HEAD:
                # Reading goes on, for nothing: paused, it would not see that the client has gone away.
                self._held_back = b""
                self._deferred = 503
            return
        self._read_bytes = len(data)
        in_body = self._in_message and not self._in_head
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._progress = False
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(self._refusal)
            return
        if self.transport.is_closing():
            return
        if self._in_message and self._in_head and self._head_bytes > MAX_HEAD:
            self._refuse(431)
            return
        if in_body and self._in_message and not self._in_head:
            # Chunk extensions and trailers, of which there is no end to be seen.
            self._framing_bytes = 0 if self._progress else self._framing_bytes + len(data)
            if self._framing_bytes > MAX_HEAD:
                self._refuse(400)
                return
        if self._slow_timer is None and (self._in_message or not self._unfinished):
            self._slow_timer = self.loop.call_later(self.slow_after, self._check_progress)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes what follows for another protocol, but none is offered (RFC 9110 §7.8): it is the body.
            self.parser = httptools.HttpRequestParser(_AfterUpgrade(self))
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % self._framing)
            self._feed(data[upgrade.args[0] :])

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._refusal = 400
        self._body_bytes = self._trailer_bytes = self._framing_bytes = self._hosts = 0
        self._framing = self._coding = b""
        self._upgrades = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            # Trailers may not be taken for header fields (RFC 9110 §6.5.1): uvicorn would add them.
            self._trailer_bytes += len(name) + len(value) + 4
            if self._trailer_bytes > MAX_HEAD:
                raise ValueError("trailers without end")
            return
        name = name.lower()
        if name in _LOOKED_AT:
            if name == b"host":
                self._hosts += 1
            elif name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            elif name == b"upgrade":
                # Upgrades are not offered: the request is answered as if it had not asked (RFC 9110 §7.8).
                return
            else:
                self._framing = name + b": " + value + b"\r\n"
                if name == b"transfer-encoding":
                    self._coding += value.lower()
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """As uvicorn does, with a Reply for its cycle."""
        headers = self.headers
        if len(headers) > MAX_FIELDS or (
            max(self._head_bytes, self._read_bytes) > MAX_HEAD and len(self.url) + _size_of(headers) > MAX_HEAD
        ):
            self._refusal = 431
            raise ValueError("request header fields too large")
        self._in_head = False
        self._head_bytes = 0
        url = self.url
        # RFC 9112 §3.2: exactly one Host; §3.2.1: origin-form, the only one an origin server is asked with.
        if self._hosts != 1 or not url.startswith(b"/") or b"#" in url:
            raise ValueError("bad request")
        method = self.parser.get_method()
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise ValueError("RFC 9112 §2.3: another major version has another syntax")
        if self._coding and version == "1.0":
            raise ValueError("RFC 9112 §6.1: the framing of such a message is faulty")
        if method == b"TRACE" or self._coding not in (b"", b"chunked"):
            # RFC 9110 §9.3.8: an upstream would echo the request, and with it our token.
            self._refusal = 501
            raise ValueError("not implemented")
        self._upgrades = self.parser.should_upgrade()
        parts = httptools.parse_url(url)
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope["method"] = method.decode("ascii")
        scope["http_version"] = version
        scope["raw_path"] = parts.path
        scope["path"] = unquote(parts.path.decode("ascii"))
        scope["query_string"] = parts.query or b""
        self._stop_timer()
        self.cycle = self._receiving = reply = Reply(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._unfinished.append(reply)
        if len(self._unfinished) == 1:
            self._start_asgi_task(reply, self.app)
        else:
            # The answers to pipelined requests are made one after the other.
            self.pipeline.appendleft((reply, self.app))

    def on_body(self, body: bytes) -> None:
        self._progress = True
        self._body_bytes += len(body)
        reply = self.cycle
        if len(self._unfinished) > 1 and reply is not None and len(reply.body) + len(body) > MAX_HEAD:
            self._refusal = 503
            raise ValueError("too much is sent ahead of the answer")
        if reply is not None and reply.response_complete:
            # Nobody wants this part any more; a short rest is taken, so that the connection can be used again.
            reply.unwanted += len(body)
            if reply.unwanted > MAX_HEAD:
                raise ValueError("the request was answered long ago")
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades:
            # The message goes on behind what the parser takes for its end.
            self._upgrades = False
            return
        self._in_message = False
        self._in_head = True
        self._receiving = None
        self._stop_timer()
        super().on_message_complete()

    # Refusals

    def _check_progress(self) -> None:
        """Close on a client that sends nothing, a head that does not end, or a body that trickles."""
        self._slow_timer = None
        if self.transport.is_closing():
            return
        fast = not self._in_head and self._body_bytes >= MIN_BODY_RATE * self.slow_after
        if self._in_message and (fast or self.flow.read_paused):
            self._body_bytes = 0
            self._slow_timer = self.loop.call_later(self.slow_after, self._check_progress)
            return
        if self._in_message:
            self._refuse(408)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        self._unfinished.pop(0)
        super().on_response_complete()
        if self._unfinished or self.transport.is_closing():
            return
        if self._deferred:
            self._refuse(self._deferred)
        elif self._held_back:
            self.loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        data, self._held_back = self._held_back, b""
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(data)

    def _refuse(self, status: int) -> None:
        """Answer in plain text and close; requests that came before on the connection get their answers first."""
        own = self._receiving
        if own is not None and own in self._unfinished and own is not self._unfinished[0]:
            self._unfinished.pop()
            self.pipeline.popleft()
        if self._unfinished and self._unfinished[0] is not own:
            self._deferred = status
            return
        started = own is not None and own.response_started
        for reply in self._unfinished:
            reply.abandon()
        if started:
            self.transport.close()
            return
        phrase = http.HTTPStatus(status).phrase.encode()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
        self.transport.write(head % (status, phrase, len(phrase), phrase))
        self._leave()

    def _leave(self) -> None:
        """Close so that the last answer arrives: with bytes unread, close() would reset it away (RFC 9112 §9.6)."""
        self._leaving = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
        self._slow_timer = self.loop.call_later(LINGER, self.transport.close)

    def _stop_timer(self) -> None:
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None

    def eof_received(self) -> None:
        # A client that has sent half a request and closes its side gets no answer from a hanging parser.
        with contextlib.suppress(AttributeError):
            super().eof_received()


class _AfterUpgrade:
    """Callbacks for a parser that goes on with a message in the place of another: the head was told already."""

    def __init__(self, protocol: InboundProtocol) -> None:
        self._protocol = protocol
        self._told = False
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_message_begin(self) -> None:
        if self._told:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._told:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._told:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._told:
            self._protocol.on_headers_complete()
        self._told = True


def _size_of(headers: list[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)
