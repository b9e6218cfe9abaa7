"""A response of an upstream: its head, and its body as it comes."""

import asyncio
from typing import Protocol

from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError

READ_AHEAD = 64 * 1024
"""Bytes of body not yet taken at which reading pauses."""


class BodySource(Protocol):
    """The connection that a response comes from."""

    def resume(self) -> None:
        """Read on after a pause."""

    def abort(self) -> None:
        """Close at once."""

    def fail(self, error: UpstreamError) -> None:
        """Close at once, and end the response with this error."""


class Response:
    """The head of a response, and its body as it comes. Always ``close()`` it in the end."""

    __slots__ = ("_buffered", "_chunks", "_connection", "_ended", "_error", "_timer", "_waiter", "headers", "status")

    def __init__(self, connection: BodySource, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.headers = headers
        """In the order they came, names in lower case."""
        self._connection: BodySource | None = connection
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._ended = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def complete(self) -> bool:
        """Whether the whole body has come, and has been taken by ``read()``."""
        return self._ended and not self._chunks and self._error is None

    @property
    def ready(self) -> bool:
        """Whether ``read()`` returns, or raises, at once."""
        return self._ended or bool(self._chunks)

    @property
    def whole(self) -> bool:
        """Whether all of the body is here, so that one ``read()`` or ``take()`` has it."""
        return self._ended and self._error is None

    def take(self) -> bytes:
        """Return what is here of the body."""
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        return data

    async def read(self) -> bytes:
        """Return what has come of the body, at once where something has; ``b""`` at its end.

        Raises UpstreamBroken where the body broke off, after all that came before has been returned. Cancelling
        closes the connection. One task reads at a time.
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

    def expire_after(self, seconds: float) -> None:
        """Break the response off unless all of it has come within this time. Not for event streams."""
        if not self._ended and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def close(self) -> None:
        """Abandon the response: an exchange that is not complete ends with its connection. Idempotent."""
        connection = self._connection
        self._chunks.clear()
        if connection is not None:
            self.finish(UpstreamProtocolError("The response was abandoned."))
            connection.abort()

    def feed(self, data: bytes) -> int:
        """Take body bytes from the connection; return how many are waiting to be read."""
        self._chunks.append(data)
        self._buffered += len(data)
        self._wake()
        return self._buffered

    def finish(self, error: UpstreamError | None) -> None:
        """Take the end of the body from the connection, which from now on has nothing to do with the response."""
        self._connection = None
        self._ended = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self, seconds: float) -> None:
        if self._connection is not None:
            self._connection.fail(UpstreamProtocolError(f"the response was not complete after {seconds:g} s."))
