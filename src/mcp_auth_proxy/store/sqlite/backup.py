"""Copies of the store from before a migration: ``<store>.schema-N.bak``, where N is the schema of the copy.

A copy is complete (what is in the write-ahead log is part of it), 0600, and sealed with the same keys. No copy is ever
replaced: it may be the only way back. If one of the same schema exists, from an earlier migration after which the user
went back, the next one is named ``<store>.schema-N.2.bak`` and so on; if its content is the same, as after a migration
that failed, no second one is made.
"""

import contextlib
import filecmp
import itertools
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import files
from mcp_auth_proxy.store.sqlite.paths import connection_uri


def make_backup(path: Path, schema: int) -> Path:
    """Copy a store of the given schema, and return the path of the copy. The caller must keep others from writing.

    Raises StoreUnavailable if the copy can't be made; nothing is left of it then.
    """
    draft = files.temporary_path(path)
    try:
        _copy(path, draft)
        return _keep(draft, path, schema)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreUnavailable(
            f"The store {path} must be migrated from schema {schema}, but could not first be copied to "
            f"{next(_backup_paths(path, schema))} ({reason}). It was left as it is. Check the permissions of its "
            "folder and the free space on the disk, then try again."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def find_backup(path: Path, newest_schema: int) -> Path | None:
    """Return the copy of a store that has the newest schema up to ``newest_schema``; None if there is none."""
    for schema in range(newest_schema, 0, -1):
        found = list(itertools.takewhile(Path.is_file, _backup_paths(path, schema)))
        if found:
            return found[-1]
    return None


def _copy(path: Path, draft: Path) -> None:
    # SQLite writes into an empty file that exists, and so the copy is private from its first byte.
    files.create(draft)
    with contextlib.closing(sqlite3.connect(connection_uri(path, "ro"), uri=True)) as connection:
        connection.execute("VACUUM INTO :draft", {"draft": str(draft)})
    files.sync(draft)


def _keep(draft: Path, path: Path, schema: int) -> Path:
    backup = next(it for it in _backup_paths(path, schema) if not os.path.lexists(it) or _is_same(draft, it))
    # Checked first, because link_into_place replaces a file if the file system has no hard links.
    if not os.path.lexists(backup):
        files.link_into_place(draft, backup)
    return backup


def _is_same(draft: Path, backup: Path) -> bool:
    return backup.is_file() and filecmp.cmp(draft, backup, shallow=False)


def _backup_paths(path: Path, schema: int) -> Iterator[Path]:
    """Yield the names that a copy may have, in the order in which they are used."""
    yield path.with_name(f"{path.name}.schema-{schema}.bak")
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}.schema-{schema}.{number}.bak")
