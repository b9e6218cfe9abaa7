"""A response from an upstream: its head, and its body as it arrives."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError
from mcp_auth_proxy.net.http_head import Fields, Headers

READ_AHEAD = 64 * 1024
"""Bytes of unread body at which the connection stops reading."""


class BodySource(Protocol):
    """The connection that a response arrives on."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read again after ``pause``, or after too much of the body was left unread."""

    def abort(self) -> None:
        """Close at once."""

    def fail(self, error: UpstreamError) -> None:
        """Close at once and end the response with this error."""

    def push_body_to(self, response: "Response") -> None:
        """Call ``deliver`` of the response after each read."""


class Response:
    """The head of a response, and its body as it arrives.

    The body is read in one of three ways: at once with ``take()`` if it is ``whole``, awaited with ``read()``, or
    pushed into callbacks with ``consume()``. The caller must ``close()`` the response in the end.
    """

    __slots__ = (
        "_buffered",
        "_chunks",
        "_connection",
        "_ended",
        "_error",
        "_on_data",
        "_on_end",
        "_timer",
        "_waiter",
        "content_length",
        "fields",
        "status",
    )

    def __init__(self, connection: BodySource, status: int, fields: Fields, content_length: int | None = None) -> None:
        self.status = status
        self.fields = fields
        """The header fields without Content-Length, in the order they came, names in lower case."""
        self.content_length = content_length
        self._connection: BodySource | None = connection
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._ended = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_data: Callable[[bytes], None] | None = None
        self._on_end: Callable[[UpstreamError | None], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def headers(self) -> Headers:
        """All header fields, with Content-Length at the end."""
        if self.content_length is None:
            return self.fields.headers
        return [*self.fields.headers, (b"content-length", b"%d" % self.content_length)]

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived and has been taken."""
        return self._ended and not self._chunks and self._error is None

    @property
    def ready(self) -> bool:
        """Whether ``read()`` returns, or raises, at once."""
        return self._ended or bool(self._chunks)

    @property
    def whole(self) -> bool:
        """Whether all of the body has arrived: one ``read()`` or ``take()`` returns what is left of it."""
        return self._ended and self._error is None

    @property
    def broken(self) -> bool:
        """Whether the body broke off, and all that arrived of it before has been taken."""
        return self._error is not None and not self._chunks

    def take(self) -> bytes:
        """Return the part of the body that has arrived and was not taken yet."""
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        return data

    async def read(self) -> bytes:
        """Return the part of the body that has arrived, waiting only if there is none; ``b""`` at its end.

        Raises UpstreamProtocolError if the body broke off, once all that arrived before has been returned.
        Cancelling closes the connection. Only one task may read.
        """
        if not self._chunks and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.close()
                raise
            finally:
                self._waiter = None
        chunks = self._chunks
        if not chunks:
            if self._error is not None:
                raise self._error
            return b""
        data = self.take()
        if self._buffered > READ_AHEAD and self._connection is not None:
            self._connection.resume()
        self._buffered = 0
        return data

    def consume(self, on_data: Callable[[bytes], None], on_end: Callable[[UpstreamError | None], None]) -> None:
        """Push the body into callbacks, from now on and instead of ``read()``.

        ``on_data`` is called at once with what has arrived, then once for each read of the connection; in it, ``whole``
        tells whether this was the last of the body. ``on_end`` is called exactly once, with the error if the body
        broke off. Both may be called before this returns. After ``close()`` neither is called.
        """
        self._on_data = on_data
        self._on_end = on_end
        connection = self._connection
        if connection is not None:
            connection.push_body_to(self)
            connection.resume()
        self.deliver()

    def pause(self) -> None:
        """Stop reading from the connection, so that ``on_data`` is not called until ``resume()``."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Read from the connection again."""
        if self._connection is not None:
            self._connection.resume()

    def expire_after(self, seconds: float) -> None:
        """Break the response off unless all of it has arrived within this time. Not for event streams."""
        if not self._ended and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def close(self) -> None:
        """Abandon the response; if it is not complete, its connection is closed too. Idempotent."""
        connection = self._connection
        self._chunks.clear()
        self._on_data = self._on_end = None
        if connection is not None:
            self.finish(UpstreamProtocolError("The response was abandoned."))
            connection.abort()

    # For the connection

    def feed(self, data: bytes) -> int:
        """Add bytes to the body; return how many have not been taken."""
        self._chunks.append(data)
        self._buffered += len(data)
        if self._waiter is not None:
            self._wake()
        return self._buffered

    def compact(self) -> None:
        """Join what was not taken yet: 64 KiB in chunks of one byte would take twenty times as much memory."""
        if len(self._chunks) > 1:
            self._chunks = [b"".join(self._chunks)]

    def finish(self, error: UpstreamError | None) -> None:
        """End the body and detach the response from its connection.

        A consumer gets an error here, and the regular end in ``deliver``.
        """
        self._connection = None
        self._ended = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiter is not None:
            self._wake()
        if error is not None and self._on_end is not None:
            self.deliver()

    def deliver(self) -> None:
        """Pass the bytes that have arrived since the last call to the consumer."""
        if self._chunks and self._on_data is not None:
            self._buffered = 0
            self._on_data(self.take())
        if self._ended and self._on_end is not None:
            on_end = self._on_end
            self._on_data = self._on_end = None
            on_end(self._error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self, seconds: float) -> None:
        if self._connection is not None:
            self._connection.fail(UpstreamProtocolError(f"the response was not complete after {seconds:g} s."))
