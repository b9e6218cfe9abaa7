"""Accept the connections of clients, as many as the limits allow, and answer the others at once.

The event loop's own server accepts all that wait before the first of them can be refused, so a burst would take the
descriptors that the proxy needs for its own work.
"""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable

from mcp_auth_proxy.net.connection_limits import ConnectionLimits, ConnectionSlot
from mcp_auth_proxy.net.dial import keep_alive
from mcp_auth_proxy.observability.peer_log import PeerLog

logger = logging.getLogger(__name__)

BATCH = 16
"""Connections that are accepted in one turn of the event loop."""

PAUSE = 0.2
"""Seconds without accepting after an error, such as a lack of descriptors: it would come again at once."""

MAX_REFUSED = 16
"""Refused connections that are kept for a moment, so that the client reads its answer (RFC 9112 §9.6)."""

LINGER = 1.0
"""Seconds for which they are kept."""

READ_SIZE = 64 * 1024
"""Bytes of a refused request that are read: closing with unread ones would reset the connection."""

_TEXT = b"Too many connections are open."
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 5\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(_TEXT), _TEXT)
)


class Acceptor:
    """Accept on one listening socket until ``close``. The socket does not block, and its owner closes it."""

    def __init__(
        self,
        sock: socket.socket,
        limits: ConnectionLimits,
        protocol_factory: Callable[[ConnectionSlot], asyncio.Protocol],
    ) -> None:
        self._sock = sock
        self._limits = limits
        self._protocol_factory = protocol_factory
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[None]] = set()
        self._refused: deque[tuple[float, socket.socket]] = deque()
        """Until when they are kept; the oldest first."""
        self._reaper: asyncio.TimerHandle | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._error_log = PeerLog()
        # Accepted connections inherit both. The client of a silent stream may vanish without a word.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        self._listen()

    def close(self) -> None:
        """Stop accepting."""
        self._loop.remove_reader(self._sock.fileno())
        for timer in (self._reaper, self._resume):
            if timer is not None:
                timer.cancel()
        while self._refused:
            self._close_refused()

    async def wait_closed(self) -> None:
        """Wait until each accepted connection has its protocol."""
        if self._starting:
            await asyncio.wait(self._starting)

    def _listen(self) -> None:
        self._resume = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._pause(error)
                return
            sock.setblocking(False)
            slot = self._limits.admit(address[0])
            if slot is None:
                self._refuse(sock)
                continue
            task = self._loop.create_task(self._start(sock, slot))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, sock: socket.socket, slot: ConnectionSlot) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._protocol_factory(slot), sock)
        except OSError:  # the client is gone already
            slot.release()
            sock.close()

    def _pause(self, error: OSError) -> None:
        """Leave new connections to the kernel for a moment."""
        if self._error_log.may_warn(""):
            logger.warning("new connections of clients have to wait: %s", error.strerror)
        self._limits.make_room()
        self._loop.remove_reader(self._sock.fileno())
        self._resume = self._loop.call_later(PAUSE, self._listen)

    # Refused connections

    def _refuse(self, sock: socket.socket) -> None:
        """Answer, and close the sending side. What the client sends is read when the connection is closed."""
        with contextlib.suppress(OSError):
            sock.send(_REFUSAL)
            sock.shutdown(socket.SHUT_WR)
        self._refused.append((self._loop.time() + LINGER, sock))
        if len(self._refused) > MAX_REFUSED:
            self._close_refused()
        if self._reaper is None:
            self._reaper = self._loop.call_later(LINGER, self._reap)

    def _close_refused(self) -> None:
        """Close the oldest one."""
        _, sock = self._refused.popleft()
        with contextlib.suppress(OSError):
            sock.recv(READ_SIZE)
        sock.close()

    def _reap(self) -> None:
        now = self._loop.time()
        while self._refused and self._refused[0][0] <= now:
            self._close_refused()
        left = self._refused[0][0] - now if self._refused else None
        self._reaper = None if left is None else self._loop.call_later(left, self._reap)
