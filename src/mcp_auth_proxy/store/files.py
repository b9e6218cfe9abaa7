"""Files that nobody else may read, and that appear whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path

PRIVATE = 0o600
_OTHERS = 0o077


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it where they are missing, each 0700. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    # Another process may be making it too.
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def create(path: Path, content: bytes = b"") -> None:
    """Makes a new file, 0600 whatever the umask, and writes it through. Raises FileExistsError, OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), PRIVATE)
    with os.fdopen(descriptor, "wb") as file:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), PRIVATE)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def temporary_path(path: Path) -> Path:
    """A name in the same folder that nobody else has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")


def link_into_place(draft: Path, path: Path) -> bool:
    """Gives a finished draft its name; False, and nothing is replaced, when something has that name. Raises OSError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        draft.unlink()
        return False
    except OSError:
        # Some file systems have no hard links; there, of two processes that start at once, the later one wins.
        draft.rename(path)
    else:
        draft.unlink()
    _sync_folder(path.parent)
    return True


def restrict_mode(path: Path) -> None:
    """Takes the access of group and others away, where there is any. Raises OSError when we may not."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if os.name == "posix" and mode & _OTHERS:
            path.chmod(PRIVATE)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
