"""Which processes serve over a store: each holds a ``flock`` on a file of its own beside it, which names its address.

The system drops the lock when its process ends, however that ends. So a file whose lock is held was written by a
process that lives, and the others are leftovers.
"""

import contextlib
import fcntl
import json
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.store import files

_SUFFIX = ".serving"
_MAX_BYTES = 4096
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A process that serves a store."""

    address: Address
    only: str = ""
    """What stands for the server that it was given instead of a configuration; else empty."""
    name: str = ""
    """The name of that server; else empty."""
    for_bridges: bool = False
    """Whether a bridge of ``stdio`` has started it."""
    keys: tuple[str, ...] = ()
    """The ids of the keys that it has, first the one that it seals with. Older versions do not say it."""


class ServingLock:
    """The file of this process, locked from ``hold`` to ``release``."""

    def __init__(
        self,
        store: Path,
        address: Address,
        *,
        only: str = "",
        name: str = "",
        for_bridges: bool = False,
        keys: Sequence[str] = (),
    ) -> None:
        """Lock a file that says that this process serves the store at ``address``; remove those of dead processes.

        If that fails, it is logged: the proxy serves all the same, but ``login`` does not believe it.
        """
        self._path = files.temporary_path(store).with_suffix(_SUFFIX)
        self._descriptor: int | None = None
        self._store = store
        self._served = Served(address, only, name, for_bridges, tuple(keys))
        try:
            _remove_leftovers(store)
            self._descriptor = _lock(self._path, _content(store, self._served))
        except OSError as error:
            logger.warning(
                "store: %s can't be made and locked (%s), so `login` can't tell that this proxy is running",
                self._path,
                error.strerror,
            )

    def set_keys(self, keys: Sequence[str]) -> None:
        """Say that this process has other keys now."""
        self._served = replace(self._served, keys=tuple(keys))
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                content = _content(self._store, self._served)
                # In one step, and no shorter than before: whoever reads it meanwhile finds one or the other.
                size = os.fstat(self._descriptor).st_size
                os.pwrite(self._descriptor, content.ljust(size), 0)

    def release(self) -> None:
        """Give up the lock and remove the file. Call it while the port is still bound: nobody else can have it then."""
        if self._descriptor is not None:
            # On a mount that has become read-only it stays: without its lock it says nothing.
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None


def served_addresses(store: Path) -> list[Address]:
    """Return the addresses of the processes that serve a store now."""
    return [each.address for each in served(store)]


def served(store: Path) -> list[Served]:
    """Return the processes that serve a store now."""
    processes = []
    for path in _files(store):
        try:
            with closing(_Candidate(path)) as candidate:
                process = candidate.process(store)
        except OSError:
            continue
        if process is not None:
            processes.append(process)
    return processes


class _Candidate:
    """A file that may be one of ours, opened to be judged: not a link, and of an owner who controls the store."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._descriptor)

    def process(self, store: Path) -> Served | None:
        """Return what a living process serves, None if nothing here can be believed. Raises OSError."""
        found, database = os.fstat(self._descriptor), store.stat()
        if not stat.S_ISREG(found.st_mode) or stat.S_IMODE(found.st_mode) & ~files.PRIVATE:
            return None
        if found.st_uid not in (os.geteuid(), 0, database.st_uid) or not self.is_locked():
            return None
        try:
            content = json.loads(os.read(self._descriptor, _MAX_BYTES))
            # In a folder that others can write, the file of another store may have been moved here.
            if content["store"] != [database.st_dev, database.st_ino]:
                return None
            address = Address(str(content["host"]), int(content["port"]))
            # Older versions write none of these.
            only, name = str(content.get("only", "")), str(content.get("name", ""))
            keys = tuple(str(key) for key in content.get("keys", ()))
            return Served(address, only, name, content.get("for_bridges") is True, keys)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def is_locked(self) -> bool:
        """Return whether another process holds the file. Shared locks of those who ask do not count."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _files(store: Path) -> Iterator[Path]:
    prefix = f".{store.name}."
    try:
        names = os.listdir(store.parent)
    except OSError:
        return
    yield from (store.parent / name for name in names if name.startswith(prefix) and name.endswith(_SUFFIX))


def _content(store: Path, served: Served) -> bytes:
    found, address = store.stat(), served.address
    text = {"store": [found.st_dev, found.st_ino], "host": address.host, "port": address.port, "pid": os.getpid()}
    more = {"only": served.only, "name": served.name, "for_bridges": served.for_bridges, "keys": served.keys}
    return json.dumps({**text, **more}).encode()


def _lock(path: Path, content: bytes) -> int:
    """Return the descriptor of a new, locked file, which gets its name last: unlocked, it would be a leftover."""
    draft = files.temporary_path(path)
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, files.PRIVATE)
    try:
        os.fchmod(descriptor, files.PRIVATE)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, content)
        draft.rename(path)
    except BaseException:  # also on Ctrl-C: nobody else closes the descriptor
        os.close(descriptor)
        draft.unlink(missing_ok=True)
        raise
    return descriptor


def _remove_leftovers(store: Path) -> None:
    for path in _files(store):
        try:
            with closing(_Candidate(path)) as candidate:
                if not candidate.is_locked():
                    path.unlink(missing_ok=True)
        except OSError as error:
            # Another user's file, or a link: it is believed by nobody.
            logger.debug("store: %s was not removed (%s)", path, error.strerror)
