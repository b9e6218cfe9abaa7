"""Turn SQLite errors that the environment causes into errors that say what to do."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcp_auth_proxy.errors import StoreUnavailable, excerpt
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.store.sqlite.paths import write_obstacle

_LOCKED = "The store {path} is locked by another process ({name}). Wait for that process or end it, then try again."
_READ_ONLY = "The store {path} can't be written. Make the file and its folder writable for this user."
_NOT_WRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
_DAMAGED = "The store {path} is damaged. Put a backup in its place."
_MESSAGES = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_PROTOCOL: _LOCKED,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_FULL: "The disk of the store {path} is full. Free some space.",
    sqlite3.SQLITE_IOERR: "Could not read or write the store {path} ({name}). Check the disk and its free space.",
    sqlite3.SQLITE_CANTOPEN: "Could not open the store {path}. Check the permissions of the file and its folder.",
    sqlite3.SQLITE_INTERRUPT: "The store {path} did not answer in time. Put a backup in its place if this lasts.",
    sqlite3.SQLITE_NOMEM: "There is not enough memory to use the store {path}.",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}
_FOREIGN_TABLES = (
    "The store {path} can't be used: its tables are not as mcp-auth-proxy has made them ({reason}). Put a backup in "
    "its place."
)
_TABLES = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether SQLite found that the file is damaged or not a database."""
    return primary_code(error) in _DAMAGE


def unavailable(path: Path, error: sqlite3.Error) -> StoreUnavailable | None:
    """Return what to raise for an error that the environment caused; None if the cause is a bug."""
    code = primary_code(error)
    # SQLite tells neither a mount from a permission nor, if it can't make its files, what keeps it from that.
    if code in _NOT_WRITABLE and (obstacle := write_obstacle(path)) is not None:
        return StoreUnavailable(obstacle)
    message = _MESSAGES.get(code)
    return StoreUnavailable(message.format(path=path, name=error.sqlite_errorname)) if message else None


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise StoreUnavailable for SQLite errors that the environment causes; let other errors pass.

    The environment includes who writes to the store without us: a column or a table is gone, or a trigger objects.
    """
    try:
        yield
    except sqlite3.Error as error:
        translation = unavailable(path, error)
        if primary_code(error) in _TABLES:
            translation = StoreUnavailable(_FOREIGN_TABLES.format(path=path, reason=excerpt(str(error))))
        if translation is None:
            raise
        metrics.store_failures.labels("unavailable").inc()
        raise translation from None


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's code of an error, without what its extended codes add."""
    # Errors that the Python module raises itself have no code.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def read_text(raw: bytes) -> str:
    """Read a text of the database that may not be UTF-8: an error would keep all rows of a query from being read."""
    return raw.decode("utf-8", "surrogateescape")
