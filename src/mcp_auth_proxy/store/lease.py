"""Owners of leases: which process holds one, and whether that process is certainly dead.

While a process may hold leases, it holds a ``flock`` on a file of its own, which the names of its owners name. The
system drops the lock when the process ends, however that ends, and tells so in every pid namespace and container that
sees the file. A pid tells it in one namespace only: two containers with one host name would take each other for dead.
"""

import fcntl
import hashlib
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mcp_auth_proxy.store import files

LONGEST = 24.0
"""Seconds after which another process may start a refresh that was never finished."""

ABANDONED = "*"
"""What follows an owner that has given up a refresh of which it is not known whether it was processed."""

BELIEVED_SECONDS = 300.0
"""Seconds for which a process of which nothing is known may come back with the result of a refresh."""

KEPT_SECONDS = 3600.0
"""Seconds for which the file of a dead process is kept after its last claim: until then a lease may name it."""

_SUFFIX = ".alive"
_MAX_NOTED = 1000
_OWNER = re.compile(r"(?P<machine>[0-9a-f]{8})\.(?P<process>[0-9a-f]{32})\.[0-9a-f]{16}")
logger = logging.getLogger(__name__)


class Owners:
    """The owners of leases on one store: those of this process, and what is known of the others.

    ``beside``: the path beside which each process has its file. Processes that can't see each other's files wait for
    the end of a lease.
    """

    def __init__(self, beside: Path) -> None:
        self.beside = beside
        self._process = secrets.token_hex(16)
        self._path = _path(beside, self._process)
        self._descriptor: int | None = None
        self._held: set[str] = set()
        self._has_forgotten = self._has_failed = False

    def new(self) -> str:
        """Return a new name for this process as the owner of leases."""
        return f"{_machine()}.{self._process}.{secrets.token_hex(8)}"

    def appear(self) -> None:
        """Make and lock the file of this process. Call it before a lease is claimed.

        If that fails, other processes wait for the end of the lease.
        """
        try:
            if not self._is_there():
                descriptor = _lock_new(self._path)
                self._close()
                self._descriptor = descriptor
            if self._descriptor is not None:
                os.utime(self._descriptor)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                logger.info(
                    "store: %s can't be made and locked (%s), so if this process dies, others notice it late",
                    self._path,
                    error.strerror,
                )

    def took(self, lease: str) -> None:
        """Note that this process holds a lease, of any name."""
        self._held.add(lease)
        if len(self._held) > _MAX_NOTED:
            self._has_forgotten = True
            self._held.clear()

    def gave_back(self, lease: str) -> None:
        """Note that this process does not hold a lease any more."""
        self._held.discard(lease)

    def close(self) -> None:
        """Unlock the file of this process, and remove it unless a lease is left behind that names it."""
        if self._descriptor is not None and not self._held and not self._has_forgotten:
            with suppress(OSError):
                self._path.unlink()
        self._close()

    def is_held(self, owner: str, begun_at: float, now: float, *, longest: float = LONGEST) -> bool:
        """Return whether what ``owner`` began at ``begun_at`` (Unix seconds) may still be running.

        After ``longest`` seconds it counts as never finished. A lease of a process that is certainly dead is free at
        once: servers accept the previous refresh token for a few seconds only, so its successor can't wait.
        """
        return not _is_over(begun_at, now, longest) and self._is_alive(owner, over=False) is not False

    def may_refresh(
        self, holder: str, begun_at: float | None, *, owner: str, now: float, needed: bool, settled: bool = True
    ) -> bool:
        """Return whether ``owner`` may begin a refresh that ``holder`` has begun; ``begun_at`` None: nobody has.

        A holder that is not certainly dead may come back with new tokens, and a server with reuse detection ends the
        grant if the old refresh token comes again. So after the lease it is only taken over if that is ``needed``: if
        the access token is dead. Nor before the store is ``settled``: after an outage a holder that lives is about to
        store what it has. One that is dead, or has given up, has nothing: nobody waits for it.
        """
        named = holder.removesuffix(ABANDONED)
        if begun_at is None or named == owner:
            return True
        over, abandoned = _is_over(begun_at, now, LONGEST), named != holder
        alive = self._is_alive(named, over=over)
        if alive is False or (abandoned and (needed or over)):
            return True
        forgotten = alive is None and _is_over(begun_at, now, BELIEVED_SECONDS)
        return settled and ((needed and over) or forgotten)

    def _is_alive(self, owner: str, *, over: bool) -> bool | None:
        """Return whether the process of an owner lives; None if that can't be told.

        It is dead if its file is there and nobody holds the lock. Of another machine, or of this one before it was
        started again, that is believed only after the lease (``over``): some file systems that two machines share do
        not tell one the locks of the other.
        """
        found = _OWNER.fullmatch(owner)
        if found is None:
            return None
        if found["process"] == self._process:
            return True
        locked = _is_locked(_path(self.beside, found["process"]))
        return locked if locked or over or found["machine"] == _machine() else None

    def clean_up(self) -> None:
        """Remove the files of dead processes that no lease names any more."""
        remove_files(self.beside, older_than=KEPT_SECONDS)

    def _is_there(self) -> bool:
        """Return whether the file that this process has locked is still at its path: somebody may have removed it."""
        if self._descriptor is None:
            return False
        try:
            found, ours = os.lstat(self._path), os.fstat(self._descriptor)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def remove_files(beside: Path, *, older_than: float = 0.0) -> None:
    """Remove the files of dead processes beside a path whose last claim was more than ``older_than`` seconds ago."""
    for path in _files(beside):
        # Another user's file, and one that another process has just removed, are left.
        with suppress(OSError):
            # abs(): the clock may have been set back.
            if abs(time.time() - os.lstat(path).st_mtime) >= older_than and _is_locked(path) is False:
                path.unlink()


def _is_over(begun_at: float, now: float, longest: float) -> bool:
    # abs(): after the clock was set back, a lease from the future must not last as long as the clock was off.
    # Not ">": what is no number, which only somebody else writes, must be over too.
    return not abs(now - begun_at) <= longest


def _machine() -> str:
    """Return what tells running kernels apart, whatever containers on them are called."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except (OSError, ValueError):
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _path(beside: Path, process: str) -> Path:
    return beside.with_name(f".{beside.name}.{process}{_SUFFIX}")


def _files(beside: Path) -> Iterator[Path]:
    prefix = f".{beside.name}."
    try:
        names = os.listdir(beside.parent)
    except OSError:
        return
    yield from (beside.parent / name for name in names if name.startswith(prefix) and name.endswith(_SUFFIX))


def _lock_new(path: Path) -> int:
    """Return the descriptor of a new, locked file, which gets its name last: unlocked, it would be a dead process's."""
    draft = files.temporary_path(path)
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, files.PRIVATE)
    try:
        os.fchmod(descriptor, files.PRIVATE)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(path)
    except BaseException:  # also on Ctrl-C: nobody else closes the descriptor
        os.close(descriptor)
        draft.unlink(missing_ok=True)
        raise
    return descriptor


def _is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock of a file; None if that can't be told, or if the file is not ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return None
        # Shared, so that two processes that ask at once do not take each other for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False
