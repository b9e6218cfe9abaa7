"""The files of a store, and the URIs that SQLite opens it by."""

from pathlib import Path
from typing import Literal


def wal_files(path: Path) -> tuple[Path, Path]:
    """Return the two files that SQLite keeps next to a store in use: the write-ahead log and its index."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def connection_uri(path: Path, mode: Literal["ro", "rw"]) -> str:
    """Return the URI that opens an existing store."""
    return f"{path.as_uri()}?mode={mode}"


def read_only_uri(path: Path) -> tuple[str, bool]:
    """Return the URI that opens a store without leaving a trace, and whether it ignores a write-ahead log.

    Without a log the database file alone is complete, and ``immutable`` keeps SQLite from creating one. If there is a
    log it must be read too: the file alone may be in the middle of a checkpoint.
    """
    immutable = not wal_files(path)[0].exists()
    return connection_uri(path, "ro") + ("&immutable=1" if immutable else ""), immutable
