"""Files by which processes on one machine and one store find each other: beside the store, ``StoreSettings.path``.

A PostgreSQL store has no file. Then ``path`` is a name in a folder of this user, and an empty file of that name stands
for the store. The folder may be in ``/tmp``, where others could have made it first: such a folder is not used.
"""

import errno
import os
import stat
from pathlib import Path

from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.store import files

_NOT_OURS = "it is not a folder of this user alone"


def local_path(settings: StoreSettings) -> Path:
    """Return the path beside which this process may leave files. It exists if the store does. Raises OSError."""
    path = make_local_folder(settings)
    if settings.postgresql is not None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, files.PRIVATE)
        os.close(descriptor)
    return path


def make_local_folder(settings: StoreSettings) -> Path:
    """Make the folder of these files if it is missing, and return the path beside which they are. Raises OSError."""
    path = settings.path.resolve()
    files.make_folder(path.parent)
    if not _is_trusted(settings, path):
        raise PermissionError(errno.EPERM, _NOT_OURS, str(path.parent))
    return path


def existing_local_path(settings: StoreSettings) -> Path | None:
    """Return the path beside which files of others are; None if there can't be any. Nothing is made."""
    path = settings.path.resolve()
    try:
        return path if path.exists() and _is_trusted(settings, path) else None
    except OSError:
        return None


def _is_trusted(settings: StoreSettings, path: Path) -> bool:
    if settings.postgresql is None:
        return True
    found = path.parent.lstat()
    return stat.S_ISDIR(found.st_mode) and files.exposure(found) is None
