"""The HTTP/1.1 listener's protocol: one connection of a client, under uvicorn's server.

Parsed by llhttp, as uvicorn's own is, with the bounds and refusals that one leaves open. Measured in uvicorn 0.54:
heads of any size, clients that send a byte a second, absolute-form targets, and requests with two Hosts or none are all
let through.
"""

import asyncio
import contextlib
import http
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from mcp_auth_proxy.net.client_request import App, ClientRequest, Headers

MAX_HEAD = 64 * 1024
"""Bytes of request line and header fields."""

MAX_FIELDS = 200

MIN_BODY_RATE = 1024
"""Bytes a second that a body must come with."""

READ_AHEAD = 64 * 1024
"""Bytes of body not yet taken at which reading pauses."""

LINGER_QUIET = 1.0
"""Seconds without a byte after which a client that was told to go has had the time to read it."""

_NOT_FORWARDED = frozenset({b"CONNECT", b"TRACE"})
"""RFC 9110 §9.3.6: to a server, a tunnel would begin; §9.3.8: it would echo the request, and with it our token."""

_LOOKED_AT = frozenset(
    {b"content-length", b"expect", b"host", b"origin", b"sec-fetch-site", b"transfer-encoding", b"upgrade"}
)


class InboundProtocol(asyncio.Protocol):
    """One connection from a client.

    The application may have a method ``begin`` beside its ASGI side: it is offered each request whose body is here
    already, and returns whether it sees to the answer itself.
    """

    header_timeout = 8.0
    """Seconds in which a request head must be complete, and between looks at whether a body comes on."""

    lingering_timeout = 30.0
    """Seconds that a client has, at most, to send the rest of what is not read any more (see ``_lingering_close``)."""

    send_timeout = 300.0
    """Seconds in which a client takes something of what waits for it. The kernel takes megabytes first: of a client
    that reads, but slowly, nothing may be seen for minutes."""

    transport: asyncio.Transport
    flow: FlowControl

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._loop = _loop or asyncio.get_running_loop()
        self._app: App = config.loaded_app
        self._try_fast_path: Callable[[ClientRequest], bool] | None = getattr(config.loaded_app, "try_fast_path", None)
        self._connections = server_state.connections
        self._tasks = server_state.tasks
        self._parser = httptools.HttpRequestParser(self)
        # Answers to requests that were pipelined behind one with "Connection: close" are left to us.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        # The request that is being read
        self._in_message = False
        self._in_head = True
        self._url = b""
        self._headers: Headers = []
        self._host = b""
        self._hosts = 0
        self._from_page = False
        self._expects_continue = False
        self._read_bytes = 0
        self._head_bytes = 0
        self._next_head_started = False
        """Part of the head came with the message before, and was not counted."""
        self._body_bytes = 0
        self._trailer_bytes = 0
        self._framing = b""
        self._coding = b""
        self._upgrades = False
        self._progress = False
        self._framing_bytes = 0
        self._refusal = 400
        self._receiving: ClientRequest | None = None
        """The answer to the request whose body is being received."""
        self._starting: ClientRequest | None = None
        """One that nobody sees to yet."""
        self._split_url = b""
        self._path = self._query = b""
        """Of ``_split_url``: a client uses few."""
        # The answers that are due, in the order of their requests
        self._unfinished: deque[ClientRequest] = deque()
        self._pipelined = b""
        self._read_ahead = 0
        """Bytes read while the answer to an earlier request was due."""
        self._deferred_status = 0
        self._leaving = False
        self._still_sending = False
        # The time that a client is given
        self._slow_timer: asyncio.TimerHandle | None = None
        self._keep_alive = config.timeout_keep_alive
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._stall_timer: asyncio.TimerHandle | None = None

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.flow = FlowControl(self.transport)
        self._connections.add(cast(Any, self))
        self._slow_timer = self._loop.call_later(self.header_timeout, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(cast(Any, self))
        self._stop_timer()
        for timer in (self._idle_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        for reply in self._unfinished:
            reply.abandon()
        self._unfinished.clear()
        self._starting = self._receiving = None
        self.flow.resume_writing()
        # The parser holds callbacks of this connection: without this, only the garbage collector would part them.
        del self._parser

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._watch_for_a_stall()

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        if self._stall_timer is not None and not self.transport.is_closing():
            self._stall_timer.cancel()
            self._stall_timer = None

    def eof_received(self) -> None:
        """A client that closes its side has gone: half-closed connections are not kept (as uvicorn has it)."""

    def shutdown(self) -> None:
        """Close once what is under way is answered; called by uvicorn's server."""
        if self._unfinished:
            self._unfinished[-1].keep_alive = False
        else:
            self._close()

    def data_received(self, data: bytes) -> None:
        if self._leaving or self._deferred_status:
            self._still_sending = True
            return
        if self._pipelined or (self._unfinished and not self._in_message):
            # Its turn comes when the request before has its answer; more than this is not read meanwhile. What comes
            # while earlier bytes still wait for their turn must not overtake them: a body would become a request.
            self._pipelined += data
            if len(self._pipelined) > MAX_HEAD:
                # Reading goes on, for nothing: paused, it would not see that the client has gone away.
                self._pipelined = b""
                self._deferred_status = 503
            return
        if self._unfinished and self._unfinished[0] is not self._receiving:
            self._read_ahead += len(data)
            if self._read_ahead > MAX_HEAD:
                self._refuse(503)
                return
        self._read_bytes = len(data)
        in_body = self._in_message and not self._in_head
        if self._in_head:
            self._head_bytes += len(data)
        self._progress = False
        try:
            self._feed(data)
        except httptools.HttpParserError:
            if self._starting is not None and self._starting is not self._receiving:
                self._start_first(self._starting)
            self._refuse(self._refusal)
            return
        if self._starting is not None:
            self._start_first(self._starting)
        if self.transport.is_closing():
            return
        if self._in_message and self._in_head and self._head_bytes > MAX_HEAD:
            self._refuse(431)
            return
        if in_body and self._in_head:
            # Where one message ends, the head of the next may have begun.
            self._next_head_started = True
        elif in_body and self._in_message:
            # Chunk extensions and trailers, of which there is no end to be seen.
            self._framing_bytes = 0 if self._progress else self._framing_bytes + len(data)
            if self._framing_bytes > MAX_HEAD:
                self._refuse(400)
                return
        if self._slow_timer is None and (self._in_message or not self._unfinished):
            self._slow_timer = self._loop.call_later(self.header_timeout, self._check_progress)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser takes what follows for another protocol, but none is offered (RFC 9110 §7.8): it is the
                # body.
                self._parser = httptools.HttpRequestParser(_AfterUpgrade(self))
                self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % self._framing)
                data = data[upgrade.args[0] :]
            else:
                return

    # The parser's side

    def on_message_begin(self) -> None:
        self._in_message = self._in_head = True
        self._url = b""
        self._headers = []
        self._hosts = 0
        self._from_page = self._expects_continue = self._upgrades = False
        self._refusal = 400
        self._body_bytes = self._trailer_bytes = self._framing_bytes = 0
        self._framing = self._coding = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

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
                self._host = value
            elif name == b"content-length":
                self._framing = b"content-length: " + value + b"\r\n"
            elif name == b"upgrade":
                # Upgrades are not offered: the request is answered as if it had not asked (RFC 9110 §7.8).
                return
            elif name == b"expect":
                self._expects_continue = value.lower() == b"100-continue"
            elif name == b"transfer-encoding":
                self._framing = b"transfer-encoding: " + value + b"\r\n"
                self._coding += value.lower()
            else:
                self._from_page = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        headers = self._headers
        url = self._url
        if len(headers) > MAX_FIELDS or (
            (self._next_head_started or max(self._head_bytes, self._read_bytes) > MAX_HEAD)
            and len(url) + _size_of(headers) > MAX_HEAD
        ):
            self._refusal = 431
            raise ValueError("request header fields too large")
        self._in_head = self._next_head_started = False
        self._head_bytes = 0
        # RFC 9112 §3.2: exactly one Host.
        if self._hosts != 1:
            raise ValueError("bad request")
        if url != self._split_url:
            self._split(url)
        method: bytes = self._parser.get_method()
        version: str = self._parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise ValueError("RFC 9112 §2.3: another major version has another syntax")
        if self._coding and version == "1.0":
            raise ValueError("RFC 9112 §6.1: the framing of such a message is faulty")
        if method in _NOT_FORWARDED or self._coding not in (b"", b"chunked"):
            self._refusal = 501
            raise ValueError("not implemented")
        self._upgrades = self._parser.should_upgrade()
        self._stop_timer()
        self._receiving = reply = ClientRequest(
            self,
            method=method,
            http_version=version,
            path=self._path,
            query=self._query,
            headers=headers,
            host=b"" if self._from_page else self._host,
            keep_alive=version == "1.1" and self._parser.should_keep_alive(),
            expects_continue=self._expects_continue and version == "1.1",
        )
        if not self._unfinished:
            self._starting = reply
        # else: the answers to pipelined requests are made one after the other
        self._unfinished.append(reply)

    def _split(self, url: bytes) -> None:
        # RFC 9112 §3.2.1: origin-form, the only one an origin server is asked with.
        if not url.startswith(b"/") or b"#" in url:
            raise ValueError("bad request")
        parts = httptools.parse_url(url)
        self._path, self._query = parts.path, parts.query or b""
        self._split_url = url

    def on_body(self, body: bytes) -> None:
        self._progress = True
        self._body_bytes += len(body)
        reply = self._receiving
        if reply is None:
            return
        reply.feed(body)
        if reply.size > READ_AHEAD:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        if self._upgrades:
            # The message goes on behind what the parser takes for its end.
            self._upgrades = False
            return
        self._in_message = False
        self._in_head = True
        self._stop_timer()
        if self._receiving is not None:
            self._receiving.feed_end()
            self._receiving = None

    # The answers

    def _start_first(self, reply: ClientRequest) -> None:
        self._starting = None
        if self._try_fast_path is None or not reply.received or not self._try_fast_path(reply):
            self.start(reply, self._app)

    def start(self, reply: ClientRequest, app: App) -> None:
        """Run an application for an answer."""
        task = self._loop.create_task(reply.run(app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def answered(self, reply: ClientRequest) -> None:
        """Go on to the next request: one that is here already, or whatever is to come."""
        self._unfinished.popleft()
        if len(self._unfinished) < 2:
            self._read_ahead = 0
        if not reply.keep_alive:
            if reply.received:
                self._close()
            else:
                self._lingering_close()
            return
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self._unfinished:
            self._start_first(self._unfinished[0])
        elif self._deferred_status:
            self._refuse(self._deferred_status)
        elif self._pipelined:
            self._loop.call_soon(self._take_turn)
        else:
            self._idle_since = self._loop.time()
            if self._idle_timer is None:
                self._idle_timer = self._loop.call_later(self._keep_alive, self._check_idle)

    def _take_turn(self) -> None:
        data, self._pipelined = self._pipelined, b""
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.data_received(data)

    def _check_idle(self) -> None:
        """Close a connection that has been idle for long. One timer serves many answers: one for each costs more."""
        self._idle_timer = None
        if self._unfinished or self.transport.is_closing():
            return
        left = self._keep_alive if self._in_message else self._idle_since + self._keep_alive - self._loop.time()
        if left > 0:
            self._idle_timer = self._loop.call_later(left, self._check_idle)
        else:
            self._close()

    # Refusals

    def _check_progress(self) -> None:
        """Close on a client that sends nothing, a head that does not end, or a body that trickles."""
        self._slow_timer = None
        if self.transport.is_closing():
            return
        fast = not self._in_head and self._body_bytes >= MIN_BODY_RATE * self.header_timeout
        if self._in_message and (fast or self.flow.read_paused):
            self._body_bytes = 0
            self._slow_timer = self._loop.call_later(self.header_timeout, self._check_progress)
            return
        if self._in_message:
            self._refuse(408)
        else:
            self.transport.close()

    def _refuse(self, status: int) -> None:
        """Answer in plain text and close; requests that came before on the connection get their answers first."""
        own = self._receiving
        if own is not None and own in self._unfinished and own is not self._unfinished[0]:
            self._unfinished.pop()
        if self._unfinished and self._unfinished[0] is not own:
            self._deferred_status = self._deferred_status or status
            return
        started = own is not None and own.started
        for reply in self._unfinished:
            reply.abandon()
        if started:
            self.transport.close()
            return
        phrase = http.HTTPStatus(status).phrase.encode()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
        self.transport.write(head % (status, phrase, len(phrase), phrase))
        self._lingering_close()

    def _lingering_close(self) -> None:
        """Close so that the last answer arrives: with bytes unread, close() would reset it away (RFC 9112 §9.6).

        What the client still sends is read and forgotten, until it pauses: many look for an answer only after that.
        """
        self._leaving = True
        self._stop_timer()
        self.flow.resume_reading()
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
        self._still_sending = True
        self._linger(self._loop.time() + self.lingering_timeout)

    def _linger(self, until: float) -> None:
        if self._still_sending and self._loop.time() < until:
            self._still_sending = False
            self._slow_timer = self._loop.call_later(LINGER_QUIET, self._linger, until)
        else:
            self._close()

    def _close(self) -> None:
        """Close once what was written is sent, but do not wait for ever for a client that takes nothing."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._watch_for_a_stall()

    def _watch_for_a_stall(self) -> None:
        if self._stall_timer is None:
            self._unsent = self.transport.get_write_buffer_size()
            self._stall_timer = self._loop.call_later(self.send_timeout, self._check_stall)

    def _check_stall(self) -> None:
        """Be gone from a client that has taken nothing for long: what waits for it holds an upstream connection too."""
        self._stall_timer = None
        if self.transport.get_write_buffer_size() < self._unsent:
            self._watch_for_a_stall()
        else:
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None


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
