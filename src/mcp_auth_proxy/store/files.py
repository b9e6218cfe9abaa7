"""Files that only their owner can read, and that appear complete or not at all."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

PRIVATE = 0o600
_GROUP_AND_OTHERS = 0o077
_WRITE_OF_OTHERS = 0o022


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, each 0700. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    # Another process may create it at the same time.
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def create(path: Path, content: bytes = b"") -> None:
    """Create a file, 0600 whatever the umask is, and sync it to disk. Raises FileExistsError, OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), PRIVATE)
    with os.fdopen(descriptor, "wb") as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), PRIVATE)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def temporary_path(path: Path) -> Path:
    """Return an unused name in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")


def link_into_place(draft: Path, path: Path) -> bool:
    """Give a finished draft its name. Return False, and replace nothing, if that name is taken. Raises OSError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        draft.unlink()
        return False
    except OSError:
        # Some file systems have no hard links; if two processes start at once there, the later one wins.
        draft.rename(path)
    else:
        draft.unlink()
    _sync_folder(path.parent)
    return True


def replace(draft: Path, path: Path) -> None:
    """Give a finished draft its name, in place of the file that may have it. Raises OSError."""
    draft.replace(path)
    _sync_folder(path.parent)


def restrict_mode(path: Path) -> None:
    """Remove the access of group and others, if the file exists. Raises OSError if we are not allowed to."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if os.name == "posix" and mode & _GROUP_AND_OTHERS:
            path.chmod(PRIVATE)


def exposure(found: os.stat_result, *, reading: bool = True) -> str | None:
    """Return in words why others than this user and root can write a file, or also read it; None if they can't."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & (_GROUP_AND_OTHERS if reading else _WRITE_OF_OTHERS):
        verb = "read or written" if reading else "written"
        return f"can be {verb} by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def sync(path: Path) -> None:
    """Sync the content of a file that was written by someone else to disk. Raises OSError."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
