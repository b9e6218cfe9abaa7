"""Give freed memory back to the system: glibc keeps it, so what one flood took would stay with the process."""

import asyncio
import contextlib
import ctypes
import platform
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mcp_auth_proxy.observability import process

INTERVAL = 2.0
"""Seconds between two looks at the memory of the process."""

GROWTH = 8 * 1024 * 1024
"""Bytes over those at the start from which it is worth the milliseconds that it takes."""

_M_MMAP_THRESHOLD = -3
"""mallopt(3)"""

_MMAP_THRESHOLD = 128 * 1024
"""Bytes from which a block is mapped on its own: the value that glibc starts with."""


@asynccontextmanager
async def returning_memory() -> AsyncIterator[None]:
    """Let the system have freed memory back until the block ends; with another C library, do nothing."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    # glibc raises the threshold with each large block that is freed. Request bodies then lie on its heap.
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    task = asyncio.create_task(_trim(libc))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _trim(libc: ctypes.CDLL) -> None:
    """Return the free pages between the smaller blocks, too (malloc_trim(3)): those of heads and of small bodies."""
    enough = _resident() + GROWTH
    while True:
        await asyncio.sleep(INTERVAL)
        if _resident() > enough:
            await asyncio.to_thread(libc.malloc_trim, 0)


def _resident() -> float:
    return process.resident_memory().get((), 0.0)
