"""The HTTP/1.1 listener: uvicorn's protocol with the bounds and refusals that it leaves open.

Measured in uvicorn 0.54: heads of any size, clients that send a byte a second, absolute-form targets, and requests
with two Hosts or none are all let through.
"""

import asyncio
import contextlib
import http
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024
"""Bytes of request line and header fields."""

MAX_FIELDS = 200

SLOW_AFTER = 8.0
"""Seconds in which a request head must be complete, and between looks at whether a body comes on."""

MIN_BODY_RATE = 1024
"""Bytes a second that a body must come with."""


class InboundProtocol(HttpToolsProtocol):
    """One connection from a client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_message = False
        self._in_head = True
        self._head_bytes = 0
        self._body_bytes = 0
        self._refusal = 400
        self._slow_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._slow_timer = self.loop.call_later(SLOW_AFTER, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_message and self._in_head and self._head_bytes > MAX_HEAD:
            self._refuse(431)
        elif self._in_message and self._slow_timer is None:
            self._slow_timer = self.loop.call_later(SLOW_AFTER, self._check_progress)

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._refusal = 400
        self._body_bytes = 0
        self._fields = 0
        self._field_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._field_bytes += len(name) + len(value) + 4
        if self._fields > MAX_FIELDS or self._field_bytes > MAX_HEAD:
            self._refusal = 431
            raise ValueError("request header fields too large")
        if self._in_head:
            # Trailers may not be taken for header fields (RFC 9110 §6.5.1): uvicorn would add them.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        hosts = sum(1 for name, _ in self.headers if name == b"host")
        # RFC 9112 §3.2: exactly one Host; §3.2.1: origin-form, the only one an origin server is asked with.
        if hosts != 1 or not self.url.startswith(b"/") or len(self.url) > MAX_HEAD:
            raise ValueError("bad request")
        if self._get_upgrade() is not None:
            # Upgrades are not offered: the request is answered as if it had not asked (RFC 9110 §7.8).
            self.headers[:] = [(n, v) for n, v in self.headers if n != b"upgrade"]
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._in_head = True
        self._stop_timer()
        super().on_message_complete()

    # Refusals

    def _check_progress(self) -> None:
        """Close on a client that sends nothing, a head that does not end, or a body that trickles."""
        self._slow_timer = None
        if self.transport.is_closing():
            return
        fast = not self._in_head and self._body_bytes >= MIN_BODY_RATE * SLOW_AFTER
        if self._in_message and (fast or self.flow.read_paused):
            self._body_bytes = 0
            self._slow_timer = self.loop.call_later(SLOW_AFTER, self._check_progress)
            return
        if self._in_message:
            self._refuse(408)
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _refuse(self, status: int) -> None:
        """Answer in plain text and close, unless an answer to an earlier request is still being written."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            phrase = http.HTTPStatus(status).phrase.encode()
            head = b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            self.transport.write(head % (status, phrase, len(phrase), phrase))
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None

    def eof_received(self) -> None:
        # A client that has sent half a request and closes its side gets no answer from a hanging parser.
        with contextlib.suppress(AttributeError):
            super().eof_received()
