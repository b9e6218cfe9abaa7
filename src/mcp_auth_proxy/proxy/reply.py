"""One answer to a client: uvicorn's cycle, but the head goes out together with the first bytes of the body.

Two writes cost the proxy and its client a system call and a wake-up more, which is a tenth of a small request.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

_BODILESS = frozenset({204, 304})


class Reply(RequestResponseCycle):
    """Takes the messages of an ASGI application.

    As ASGI has it, nothing is sent before the first part of the body, which may be empty: an application whose body
    is slow to come sends an empty part first.
    """

    _head: bytes = b""

    unwanted: int = 0
    """Bytes of request body that came after the answer was complete."""

    def abandon(self) -> None:
        """Tell the application that its client is lost."""
        if not self.response_complete:
            self.disconnected = True
        self.message_event.set()

    async def send(self, message: Any) -> None:
        """Send a head or a part of the body; waits while the client is slow to take what was sent before.

        Raises RuntimeError on messages out of order, and on a body that is not as long as was announced.
        """
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        expected = "http.response.body" if self.response_started else "http.response.start"
        if self.response_complete or message["type"] != expected:
            raise RuntimeError(f"{message['type']} is out of order")
        if self.response_started:
            self._send_body(message.get("body", b""), last=not message.get("more_body", False))
        else:
            self.response_started = True
            self.waiting_for_100_continue = False
            self._head = self._head_of(message["status"], [*self.default_headers, *message.get("headers", ())])

    def _head_of(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Return the head with the empty line that ends it, and settle the framing of the body (RFC 9112 §6)."""
        lines = [STATUS_LINE[status]]
        for name, value in headers:
            if name == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            if name == b"content-length":
                self.chunked_encoding = False
                self.expected_content_length = int(value)
            lines.append(name + b": " + value + b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        if self.scope["method"] == "HEAD":
            self.chunked_encoding = False
            self.expected_content_length = 0
        elif self.chunked_encoding is None and status not in _BODILESS:
            self.chunked_encoding = True
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        head = b"".join(lines)
        # One look at the whole costs less than one at each part.
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header field holds a line break or NUL")
        return head

    def _send_body(self, data: bytes, *, last: bool) -> None:
        if self.chunked_encoding:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if last:
                data += b"0\r\n\r\n"
        elif self.scope["method"] == "HEAD":
            data = b""
        else:
            self.expected_content_length -= len(data)
            if self.expected_content_length < 0 or (last and self.expected_content_length):
                raise RuntimeError("the body is not as long as Content-Length says")
        if self._head:
            data = self._head + data
            self._head = b""
        if data:
            self.transport.write(data)
        if last:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()
