"""One connection of a client, under uvicorn's server: pipelining, timeouts, flow control and refusals.

``request_parser`` parses the bytes; the application sees a ``ClientRequest``.
"""

import asyncio
import http
import select
from collections import deque
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from mcp_auth_proxy.errors import RequestRejected
from mcp_auth_proxy.net.client_request import ClientRequest, RequestServer, Serve
from mcp_auth_proxy.net.client_timeouts import KeepAliveTimer, LingeringClose, SendTimer
from mcp_auth_proxy.net.connection_limits import IDLE, SLOW, STALLED, UNFINISHED, ConnectionSlot, Rank
from mcp_auth_proxy.net.request_parser import MAX_HEAD, RequestHead, RequestParser

MIN_BODY_RATE = 1024
"""Minimum rate of a request body, in bytes per second."""

READ_AHEAD = 64 * 1024
"""Bytes of unread body at which the connection stops reading."""

MAX_PIPELINED = MAX_HEAD
"""Bytes of further requests that are read while an earlier one is not answered."""

MAX_PARSED = MAX_PIPELINED + 32 * 1024
"""Bytes that are parsed at a time. A read may hold 10,000 requests: from the second piece on they count as pipelined. A
request of the fast path fits."""

_POLLRDHUP: int = getattr(select, "POLLRDHUP", 0)
"""The client has closed its side; only Linux tells."""

_TOO_MANY = "too many bytes of further requests before an answer"

_REFUSAL = b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"


class HttpServerConnection(asyncio.Protocol):
    """A client's connection. ``config.app`` is a RequestServer; uvicorn passes the other arguments."""

    header_timeout = 8.0
    """Seconds within which a head must be complete, and between two checks of the rate of a body."""

    body_timeout = 120.0
    """Seconds from the beginning of a body within which it must be complete, whatever its rate."""

    body_patience = 10.0
    """The same if the limit on connections is reached, and others wait for a place."""

    lingering_timeout = 30.0
    """Maximum seconds for which a client may send what is no longer read (see LingeringClose)."""

    send_timeout = 300.0
    """Seconds within which a client must read some of its pending data. The kernel buffers megabytes first, so a slow
    client may seem to read nothing for minutes."""

    send_patience = 30.0
    """The same if the limit on connections is reached, and others wait for a place."""

    transport: asyncio.Transport
    write_paused: bool
    peer: str
    _send_timer: SendTimer

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        slot: ConnectionSlot | None = None,
    ) -> None:
        """``slot``: the place of the connection, if their number is limited."""
        self._loop = _loop or asyncio.get_running_loop()
        self._slot = slot
        self.peer = slot.peer if slot is not None else ""
        self._server = cast(RequestServer, config.app)
        self._connections = server_state.connections
        self._tasks = server_state.tasks
        self._parser = RequestParser(self)
        self._receiving: ClientRequest | None = None
        """The request whose body is being received."""
        self._unserved: ClientRequest | None = None
        """The first request in line, until it is served."""
        self._unfinished: deque[ClientRequest] = deque()
        """The requests that are not answered, in their order. Only the first is served."""
        self._pipelined = b""
        """Bytes that are parsed once the first request is answered."""
        self._read_ahead = 0
        """Bytes parsed that belong to requests after the first."""
        self._deferred_status = 0
        """The status of a refusal that has to wait until the requests before it are answered."""
        self._body_bytes = 0
        """Bytes of body since the header timer was started."""
        self._body_since = 0.0
        """When the rest of the body was first waited for; 0 if there is nothing to wait for."""
        self._header_timer: asyncio.TimerHandle | None = None
        self._keep_alive_timer = KeepAliveTimer(self._loop, config.timeout_keep_alive, self._close_if_idle)
        self._lingering: LingeringClose | None = None
        self._read_paused = False
        self.write_paused = False

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._send_timer = SendTimer(self._loop, self.transport, self.send_timeout)
        self._connections.add(cast(Any, self))
        self._keep_alive_timer.idle_since = self._loop.time()
        self._start_header_timer()
        if self._slot is not None:
            self._slot.connection = self

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(cast(Any, self))
        if self._slot is not None:
            self._slot.release()
        self._stop_header_timer()
        self._keep_alive_timer.close()
        self._send_timer.stop()
        if self._lingering is not None:
            self._lingering.stop()
            self._lingering = None
        for request in self._unfinished:
            request.disconnect()
        self._unfinished.clear()
        self._unserved = self._receiving = None
        self._pipelined = b""
        self._parser.close()

    def pause_writing(self) -> None:
        self.write_paused = True
        self._send_timer.start()

    def resume_writing(self) -> None:
        self.write_paused = False
        if not self.transport.is_closing():
            self._send_timer.stop()
        if self._unfinished:
            self._unfinished[0].resume_writing()

    def eof_received(self) -> None:
        """Close: a client that closes its side is gone. Half-closed connections are not kept, as in uvicorn."""

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._lingering.data_received()
            return
        if len(data) > MAX_PARSED:
            for start in range(0, len(data), MAX_PARSED):
                self.data_received(data[start : start + MAX_PARSED])
            return
        if (self._unfinished or self._pipelined) and not self._may_parse(data):
            return
        parser = self._parser
        try:
            parser.feed(data)
        except RequestRejected as error:
            if self._unserved is not self._receiving:
                self._serve_first()
            self._refuse(error.status, str(error))
            return
        if self._unserved is not None:
            self._serve_first()
        if self._header_timer is None and not parser.idle:
            self._start_header_timer()

    def _may_parse(self, data: bytes) -> bool:
        """Return whether to parse these bytes now, although a request before them is not answered.

        Other bytes wait in ``_pipelined``, and are dropped if there are too many.
        """
        if self._deferred_status:
            return False
        if self._pipelined or not (self._parser.in_head or self._parser.in_body):
            # Bytes that come while earlier ones wait must not overtake them: a body would be read as a request.
            self._pipelined += data
            if len(self._pipelined) > MAX_PIPELINED:
                self._pipelined = b""
                self._refuse(503, _TOO_MANY)
            return False
        if self._unfinished[0] is not self._receiving:
            self._read_ahead += len(data)
            if self._read_ahead > MAX_PIPELINED:
                self._refuse(503, _TOO_MANY)
                return False
        return True

    # Called by the parser

    def on_request(self, head: RequestHead) -> None:
        self._stop_header_timer()
        self._body_bytes = 0
        self._body_since = 0.0
        self._receiving = request = ClientRequest(self, head)
        if not self._unfinished:
            self._unserved = request
        self._unfinished.append(request)

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        request = self._receiving
        # Further requests are bounded by MAX_PIPELINED: a connection that is paused does not notice that its client
        # is gone.
        if request is not None and request.receive_body(data) > READ_AHEAD and request is self._unfinished[0]:
            self._pause_reading()

    def on_request_end(self) -> None:
        self._stop_header_timer()
        if self._receiving is not None:
            self._receiving.receive_end()
            self._receiving = None

    # Called by requests

    def resume_reading(self) -> None:
        if self._read_paused:
            self._read_paused = False
            self.transport.resume_reading()

    def client(self, request: ClientRequest) -> str:
        """Return whose request it is, for a log."""
        return self._slot.client(request.headers) if self._slot is not None else "unknown"

    def run(self, request: ClientRequest, serve: Serve) -> None:
        """Run ``serve`` for this request in a task."""
        task = self._loop.create_task(request.run_to_end(serve))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def response_complete(self, request: ClientRequest) -> None:
        """Continue with the next request if it is here already, else wait for one."""
        self._unfinished.popleft()
        if len(self._unfinished) < 2:
            self._read_ahead = 0
        if not request.keep_alive:
            if request.received:
                self._close()
            else:
                self._close_lingering()
            return
        if self.transport.is_closing():
            return
        self.resume_reading()
        if self._unfinished:
            # Not called directly: a response within try_fast_path would recurse, once for each pipelined request.
            self._unserved = self._unfinished[0]
            self._loop.call_soon(self._serve_first)
        elif self._deferred_status:
            self._refuse(self._deferred_status)
        elif self._pipelined:
            self._loop.call_soon(self._parse_pipelined)
        else:
            self._keep_alive_timer.restart()

    def _serve_first(self) -> None:
        request, self._unserved = self._unserved, None
        if request is None or self.transport.is_closing():
            return
        if not request.received or not self._server.try_fast_path(request):
            self.run(request, self._server.serve)

    def _parse_pipelined(self) -> None:
        data, self._pipelined = self._pipelined, b""
        if not self.transport.is_closing():
            self.resume_reading()
            self.data_received(data)

    def _pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    # Timeouts and refusals

    def _start_header_timer(self) -> None:
        if self.transport.is_closing():
            return
        if self._parser.in_body and not self._body_since:
            self._body_since = self._loop.time()
        self._header_timer = self._loop.call_later(self.header_timeout, self._check_progress)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _check_progress(self) -> None:
        """Close if the client sends nothing, a head that does not end, or a body that is slow or takes too long."""
        self._header_timer = None
        if self.transport.is_closing():
            return
        parser = self._parser
        if not parser.in_head and not parser.in_body:
            self.transport.close()
            return
        steady = parser.in_body and self._body_bytes >= MIN_BODY_RATE * self.header_timeout
        late = parser.in_body and self._loop.time() - self._body_since >= self.body_timeout
        if (steady or self._read_paused) and not late:
            self._body_bytes = 0
            self._start_header_timer()
            return
        if self._slot is not None:
            self._slot.warn_slow()
        self._refuse(408)

    def _refuse(self, status: int, reason: str = "") -> None:
        """Answer in plain text and close. The requests before the refused one are answered first.

        ``reason`` is for the log; empty if the refusal was logged before.
        """
        if self.transport.is_closing() or self._lingering is not None:
            return
        if self._slot is not None and reason:
            self._slot.warn_refused(status, reason)
        refused = self._receiving
        if refused is not None and len(self._unfinished) > 1:
            self._unfinished.pop()
            refused = self._receiving = None
        if self._unfinished and self._unfinished[0] is not refused:
            self._deferred_status = self._deferred_status or status
            return
        self._unserved = None
        for request in self._unfinished:
            request.disconnect()
        if refused is not None and refused.started:
            self.transport.close()
            return
        self._write_refusal(status)
        self._close_lingering()

    def _write_refusal(self, status: int) -> None:
        phrase = http.HTTPStatus(status).phrase.encode()
        self.transport.write(_REFUSAL % (status, phrase, len(phrase), phrase))

    # The limit on connections

    def rank(self) -> Rank | None:
        """Return how readily the connection can be missed: best if idle, then if a head is incomplete.

        A request whose body has not arrived for ``body_patience`` seconds is not running yet, so it can be missed too;
        last comes one whose client has read none of the response for ``send_patience`` seconds.
        """
        if not self._unfinished:
            idle = self._parser.idle and not (self._pipelined or self._lingering)
            idle = idle and not self.transport.get_write_buffer_size()
            return (IDLE if idle else UNFINISHED, self._keep_alive_timer.idle_since)
        now, stalled_since = self._loop.time(), self._send_timer.since
        if self._body_since and now - self._body_since >= self.body_patience:
            request = self._unfinished[0]
            if request is self._receiving and not request.started:
                return (SLOW, self._body_since)
        if stalled_since is not None and now - stalled_since >= self.send_patience:
            return (STALLED, stalled_since)
        return None

    def has_unread(self) -> bool:
        """Return whether a client that is still there has sent something that was not read yet, a request maybe."""
        poller = select.poll()
        poller.register(self.transport.get_extra_info("socket"), select.POLLIN | _POLLRDHUP)
        events = poller.poll(0)
        return bool(events) and not events[0][1] & (select.POLLHUP | select.POLLERR | _POLLRDHUP)

    def make_room(self) -> None:
        """Close at once, without waiting for the client to read."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        if self._lingering is None and not self._parser.idle:
            self._write_refusal(408)
        self.transport.close()

    # The end of the connection

    def shutdown(self) -> None:
        """Close once the requests are answered; called by uvicorn's server."""
        if self._unfinished:
            self._unfinished[-1].keep_alive = False
        else:
            self._close()

    def _close_if_idle(self) -> None:
        """Close unless a request is here or arriving: then its response or the header timer decides."""
        if not self._unfinished and not self._parser.in_head and not self._parser.in_body:
            self._close()

    def _close_lingering(self) -> None:
        self._stop_header_timer()
        self.resume_reading()
        self._lingering = LingeringClose(self._loop, self.transport, self.lingering_timeout, self._close)

    def _close(self) -> None:
        """Close once what was written is sent; wait at most ``send_timeout`` for a client that does not read."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._send_timer.start()
