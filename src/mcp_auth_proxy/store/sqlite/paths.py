"""The files of a store, the URIs that SQLite opens it by, and what keeps them from being written."""

import os
from pathlib import Path
from typing import Literal


def wal_files(path: Path) -> tuple[Path, Path]:
    """Return the two files that SQLite keeps next to a store in use: the write-ahead log and its index."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def connection_uri(path: Path, mode: Literal["ro", "rw"]) -> str:
    """Return the URI that opens an existing store."""
    return f"{path.as_uri()}?mode={mode}"


def write_obstacle(path: Path) -> str | None:
    """Return why a store can't be written, with the remedy: a mount or a permission; None if neither is the reason.

    A store that does not exist yet counts as the nearest folder that does.
    """
    places = [place for place in (path, *wal_files(path), path.parent) if place.exists()] or [_nearest(path)]
    return next((text for text in map(_on_mount, places) if text), None) or next(
        (text for place in places if (text := _without_permission(path, place))), None
    )


def mount_obstacle(path: Path) -> str | None:
    """Return why a file or folder can't be written if its file system is mounted read-only, else None."""
    return _on_mount(_nearest(path))


def _nearest(path: Path) -> Path:
    return next((place for place in (path, *path.parents) if place.exists()), path)


def _on_mount(place: Path) -> str | None:
    try:
        read_only = os.statvfs(place).f_flag & os.ST_RDONLY
    except (OSError, AttributeError):  # there is no statvfs on Windows
        return None
    if not read_only:
        return None
    return (
        f"The file system of {place} is mounted read-only, and the store there has to be written. Mount it writable, "
        "or set store.url to a file on another one. `mcp-auth-proxy status` only reads the store, and works."
    )


def _without_permission(path: Path, place: Path) -> str | None:
    if os.access(place, os.W_OK):
        return None
    user = f" (uid {os.geteuid()})" if os.name == "posix" else ""
    return (
        f"The store {path} can't be written: this user{user} may not write {place}. Make the store, its -wal and -shm "
        "files and its folder writable for this user."
    )
