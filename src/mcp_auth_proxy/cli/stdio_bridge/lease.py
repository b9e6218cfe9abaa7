"""How bridges share a proxy that one of them has started.

Each bridge holds a shared lock on a file beside the store; the proxy ends once it can lock that file for itself alone.
The system drops the locks of a process that ends, however it ends. A second file is locked by the bridge that starts
a proxy, so that a number of bridges which begin at once start one.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.store import files
from mcp_auth_proxy.store.local_files import make_local_folder

POLL = 0.05
"""Seconds between two attempts to lock a file."""

LOCK_TIMEOUT = 45.0
"""Seconds that a bridge waits for a proxy that is ending: it lets active requests finish."""

CHECK = 0.5
"""Seconds between two looks of the proxy whether there is a bridge."""

LINGER = 3
"""Looks without a bridge after which the proxy ends: clients restart their programs."""

_MARK = 12
"""Characters of a server's mark in the name of a file."""


class Lease:
    """A lock on one of the files. Use it in one process only."""

    def __init__(self, store: StoreSettings, only: str, kind: str) -> None:
        """``only`` is the mark of the server if there is no configuration. Raises McpAuthProxyError."""
        path = store.path.resolve()
        name = "." + ".".join(filter(None, [path.name, only[:_MARK], kind]))
        self._path = path.with_name(name)
        try:
            make_local_folder(store)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, files.PRIVATE)
        except OSError as error:
            raise McpAuthProxyError(f"{self._path} can't be opened ({error.strerror}).") from None

    def try_lock(self, *, alone: bool) -> bool:
        """Lock the file, shared or for this process alone; return False if others are in the way."""
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise McpAuthProxyError(f"{self._path} can't be locked ({error.strerror}).") from None
        return True

    def unlock(self) -> None:
        """Give the lock back."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the lock back for good."""
        os.close(self._descriptor)


def of_bridges(store: StoreSettings, only: str) -> Lease:
    """Return the lease that all bridges share."""
    return Lease(store, only, "bridges")


def of_start(store: StoreSettings, only: str) -> Lease:
    """Return the lease of whoever starts a proxy."""
    return Lease(store, only, "starting")


async def lock(lease: Lease, *, alone: bool) -> None:
    """Lock a file as soon as others have unlocked it. Raises McpAuthProxyError."""
    try:
        async with asyncio.timeout(LOCK_TIMEOUT):
            while True:
                if lease.try_lock(alone=alone):
                    return
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise McpAuthProxyError("Another process starts or ends a proxy, and does not come to an end.") from None


@asynccontextmanager
async def ending_without_bridges(
    store: StoreSettings, only: str, *, needed: Callable[[], bool], stop: Callable[[], None]
) -> AsyncIterator[None]:
    """Call ``stop`` once there is no bridge any more, and ``needed`` is not true either. For the proxy.

    The file is then locked until this process has ended: a new bridge waits, and starts the next proxy.
    """
    lease = of_bridges(store, only)

    async def watch() -> None:
        looks = 0
        while looks < LINGER:
            await asyncio.sleep(CHECK)
            if not lease.try_lock(alone=True):
                looks = 0
            elif needed():
                looks = 0
                lease.unlock()
            elif (looks := looks + 1) < LINGER:
                lease.unlock()
        stop()

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
