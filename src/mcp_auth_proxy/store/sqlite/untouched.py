"""Read a store without leaving a trace: no file appears beside it, and none is written, not even those of SQLite.

Which way is right depends on the files that are there:

- no write-ahead log: the database file alone is complete. ``immutable`` keeps SQLite from making a log.
- a log and its index: a process may be using the store. SQLite takes its locks on the index, which it opens read-only.
- a log without an index that can be used, as after a crash or in a copy: SQLite would make one, so it gets a copy of
  both files in a temporary folder.

Without locks, a process that starts meanwhile is noticed by what it does to the files, and they are read again.
"""

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from mcp_auth_proxy.errors import StoreError, StoreUnavailable
from mcp_auth_proxy.store import files
from mcp_auth_proxy.store.sqlite.errors import primary_code, read_text
from mcp_auth_proxy.store.sqlite.paths import connection_uri, wal_files

T = TypeVar("T")
_Stamp = tuple[int, int, int] | None

ATTEMPTS = 20
_NO_INDEX = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL)
"""How SQLite says that there is no index that can be used read-only: it is missing, or its locks were never free."""

INDEX_LOCK = threading.Lock()
"""Held while the index is opened, and as long as it is open read-only.

All connections of a process share how the first one has opened the index: beside one that may only read it, another
could not write.
"""


def read(path: Path, use: Callable[[sqlite3.Connection], T], *, timeout: float) -> T:
    """Call ``use`` with a connection to a store, more than once if the store is written meanwhile; return its result.

    ``timeout``: seconds to wait for a lock. Raises sqlite3.Error, OSError, StoreUnavailable and what ``use`` raises.
    """
    for _ in range(ATTEMPTS):
        before = _stamps(path)
        try:
            result, locked = _read(path, use, timeout)
        except (sqlite3.DatabaseError, StoreError, OSError):
            if _stamps(path) == before:
                raise
            continue
        if locked or _stamps(path) == before:
            return result
    raise StoreUnavailable(f"The store {path} was written all the time while it was read. Try again.")


def _read(path: Path, use: Callable[[sqlite3.Connection], T], timeout: float) -> tuple[T, bool]:
    """Return the result of ``use``, and whether no process could write what it read meanwhile."""
    if not _has_log(path):
        return _use(f"{connection_uri(path, 'ro')}&immutable=1", use, timeout), False
    try:
        with INDEX_LOCK:
            return _use(f"{connection_uri(path, 'ro')}&readonly_shm=1", use, timeout), True
    except sqlite3.OperationalError as error:
        if primary_code(error) not in _NO_INDEX:
            raise
    with _copied(path) as copy:
        return _use(connection_uri(copy, "rw"), use, timeout), False


def _use(uri: str, use: Callable[[sqlite3.Connection], T], timeout: float) -> T:
    with closing(sqlite3.connect(uri, uri=True, timeout=timeout)) as connection:
        connection.text_factory = read_text
        return use(connection)


@contextmanager
def _copied(path: Path) -> Iterator[Path]:
    """Copy a store and its log into a temporary folder that only this user can read."""
    with TemporaryDirectory(prefix="mcp-auth-proxy-store-") as folder:
        copy = Path(folder) / "store.db"
        for source, target in ((path, copy), (wal_files(path)[0], wal_files(copy)[0])):
            files.create(target)
            shutil.copyfile(source, target)
        yield copy


def _has_log(path: Path) -> bool:
    stamp = _stamp(wal_files(path)[0])
    return stamp is not None and (stamp[1] > 0 or wal_files(path)[1].exists())


def _stamps(path: Path) -> tuple[_Stamp, _Stamp]:
    return _stamp(path), _stamp(wal_files(path)[0])


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
