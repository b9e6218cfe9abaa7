"""The lines of standard input and output. Either may be any kind of file, so threads block on them."""

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

READ_SIZE = 64 * 1024

KEPT_OF_LONG = 64 * 1024
"""Bytes that are kept of a line that is too long: its method and id are most likely there."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line over the limit; ``start`` is what was kept of it."""

    start: bytes


class LineReader:
    """Yields the lines of a descriptor, without their ends. What is not taken yet is not read either."""

    def __init__(self, descriptor: int, *, limit: int) -> None:
        """``limit`` is the maximum length of a line in bytes."""
        self._descriptor = descriptor
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._taken = threading.Semaphore(0)
        self._chunk: asyncio.Future[bytes] = self._loop.create_future()

    async def __aiter__(self) -> AsyncIterator[bytes | TooLong]:
        threading.Thread(target=self._read, name="stdin", daemon=True).start()
        line, too_long = bytearray(), False
        while data := await self._next():
            first, *others = data.split(b"\n")
            for number, piece in enumerate([first, *others]):
                if number:
                    yield TooLong(bytes(line)) if too_long else bytes(line)
                    line.clear()
                    too_long = False
                too_long = too_long or len(line) + len(piece) > self._limit
                if too_long:
                    del line[KEPT_OF_LONG:]
                line += piece[: KEPT_OF_LONG - len(line)] if too_long else piece
        if line:
            yield TooLong(bytes(line)) if too_long else bytes(line)

    async def _next(self) -> bytes:
        """Return the next bytes, none at the end."""
        self._chunk = self._loop.create_future()
        self._taken.release()
        return await self._chunk

    def _read(self) -> None:
        data = b"-"
        while data:
            self._taken.acquire()
            try:
                data = os.read(self._descriptor, READ_SIZE)
            except OSError:
                # For example a terminal that is gone.
                data = b""
            if not call_from_thread(self._loop, self._received, data):
                return

    def _received(self, data: bytes) -> None:
        if not self._chunk.done():
            self._chunk.set_result(data)


class OutputClosed(Exception):
    """Nobody reads the output any more."""


class LineWriter:
    """Writes lines to a descriptor, each as a whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done once nobody reads the output any more."""
        threading.Thread(target=self._write_all, name="stdout", daemon=True).start()

    async def write(self, line: bytes) -> None:
        """Write a line; return once the client has taken it. A line is complete even if its writer is cancelled.

        Raises OutputClosed.
        """
        if self.closed.done():
            raise OutputClosed
        written: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((line + b"\n", written))
        await written

    def _write_all(self) -> None:
        while True:
            data, written = self._queue.get()
            view = memoryview(data)
            error: OSError | None = None
            try:
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError as found:
                error = found
            if not call_from_thread(self._loop, self._done, written, error):
                return

    def _done(self, written: asyncio.Future[None], error: OSError | None) -> None:
        if error is not None and not self.closed.done():
            self.closed.set_result(None)
        if written.done():
            return
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(OutputClosed())


def call_from_thread(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> bool:
    """Call back in the event loop; return False if that is closed."""
    try:
        loop.call_soon_threadsafe(callback, *arguments)
    except RuntimeError:
        return False
    return True
