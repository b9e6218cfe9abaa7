"""Turns the errors of SQLite that operation can cause into errors that say what to do."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.observability import metrics

_LOCKED = "The store {path} is locked by another process: wait for that process or end it, then try again."
_READ_ONLY = "The store {path} can't be written: make the file and its folder writable for this user."
_REMEDIES = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_PROTOCOL: _LOCKED,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_FULL: "The disk of the store {path} is full: free some space.",
    sqlite3.SQLITE_IOERR: "Reading or writing the store {path} failed ({name}): look at the disk and its free space.",
    sqlite3.SQLITE_CANTOPEN: "The store {path} can't be opened: look at the permissions of the file and its folder.",
    sqlite3.SQLITE_NOMEM: "There is not enough memory to use the store {path}.",
    sqlite3.SQLITE_CORRUPT: "The store {path} is damaged: put a backup in its place.",
    sqlite3.SQLITE_NOTADB: "The store {path} is damaged: put a backup in its place.",
}
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite found the file to be broken or no database."""
    return _primary(error) in _DAMAGED


def unavailable(path: Path, error: sqlite3.Error) -> StoreUnavailable | None:
    """What to raise for an error that the surroundings caused; None for one of our own making."""
    remedy = _REMEDIES.get(_primary(error))
    return StoreUnavailable(remedy.format(path=path, name=error.sqlite_errorname)) if remedy else None


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raises StoreUnavailable for what the surroundings cause; other errors of SQLite pass as they are."""
    try:
        yield
    except sqlite3.Error as error:
        passing = unavailable(path, error)
        if passing is None:
            raise
        metrics.store_failures.labels("unavailable").inc()
        raise passing from None


def _primary(error: sqlite3.Error) -> int:
    # Errors of the Python module itself have no code.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
