"""Timers that close a client's connection: it is idle, it does not read, or it still sends after its answer."""

import asyncio
import contextlib
from collections.abc import Callable

LINGER_QUIET = 1.0
"""Seconds without a byte from the client after which it is assumed to have read its last response."""


class KeepAliveTimer:
    """Call back when a connection has been idle for ``timeout`` seconds.

    One timer of the event loop covers many responses: setting and cancelling one for each costs more.
    """

    __slots__ = ("_callback", "_loop", "_timeout", "_timer", "idle_since")

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float, callback: Callable[[], None]) -> None:
        """``callback`` has to check whether the connection is idle."""
        self._loop = loop
        self._timeout = timeout
        self._callback = callback
        self.idle_since = 0.0
        """When the last response was complete, or the connection was made, by the clock of the event loop."""
        self._timer: asyncio.TimerHandle | None = None

    def restart(self) -> None:
        """Count from now."""
        self.idle_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._check)

    def close(self) -> None:
        """Stop for good, and release the owner of the callback: it refers to this timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        del self._callback

    def _check(self) -> None:
        self._timer = None
        left = self.idle_since + self._timeout - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self._callback()


class SendTimer:
    """Abort a connection whose client has read nothing of its pending data for ``timeout`` seconds.

    Otherwise such a client would keep a connection to an upstream busy too.
    """

    __slots__ = ("_loop", "_timeout", "_timer", "_transport", "_unsent", "since")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, timeout: float) -> None:
        self._loop = loop
        self._transport = transport
        self._timeout = timeout
        self._unsent = 0
        self.since: float | None = None
        """Since when the client does not keep up; None if it does."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            if self.since is None:
                self.since = self._loop.time()
            self._unsent = self._transport.get_write_buffer_size()
            self._timer = self._loop.call_later(self._timeout, self._check)

    def stop(self) -> None:
        self.since = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size() < self._unsent:
            self.start()
        else:
            self._transport.abort()


class LingeringClose:
    """Close a connection so that the last response arrives.

    Closing with unread bytes of the client resets the connection, which may destroy the response before the client has
    read it (RFC 9112 §9.6). So what the client still sends is read and dropped until it pauses, for at most ``timeout``
    seconds. Many clients read the response only after they have sent everything.
    """

    __slots__ = ("_close", "_deadline", "_loop", "_still_sending", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        timeout: float,
        close: Callable[[], None],
    ) -> None:
        """Close the sending side at once; call ``close`` in the end."""
        self._loop = loop
        self._close = close
        self._deadline = loop.time() + timeout
        self._still_sending = True
        with contextlib.suppress(OSError, RuntimeError):
            transport.write_eof()
        self._timer = loop.call_later(LINGER_QUIET, self._check)

    def data_received(self) -> None:
        self._still_sending = True

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        if self._still_sending and self._loop.time() < self._deadline:
            self._still_sending = False
            self._timer = self._loop.call_later(LINGER_QUIET, self._check)
        else:
            self._close()
