"""The checks of keys (``store.key_checks``) in an SQLite file, and whether its rows open."""

import contextlib
import sqlite3
from pathlib import Path

from mcp_auth_proxy.errors import KeyRejected
from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.key_checks import ADD, KEY_ROWS, by_key, check_rows
from mcp_auth_proxy.store.sealed_tables import SEALED_COLUMNS, is_sealed_with, key_params, seal_keys


def read_all(connection: sqlite3.Connection) -> dict[str, bytes]:
    """Return the checks, by the id of their key."""
    return by_key(connection.execute("SELECT name, value FROM meta").fetchall())


def add(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Add the checks of the cipher's keys that are missing."""
    for row in check_rows(cipher):
        connection.execute(ADD, row)


def replace_all(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Replace all checks, also those of keys that the cipher does not have, by new ones."""
    connection.execute(
        "DELETE FROM meta WHERE substr(name, 1, :length) = :rows", {"length": len(KEY_ROWS), "rows": KEY_ROWS}
    )
    add(connection, cipher)


def check_rows_open(connection: sqlite3.Connection, path: Path, cipher: Cipher) -> None:
    """Raise KeyRejected if there are rows, and all of them are sealed with other keys than the cipher has.

    A key may have its check without being the right one: it was in ``store.keys`` once, and no row was sealed with it.
    """
    # A view in the place of a table may never end.
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    params = key_params(cipher.key_ids)
    found: set[str] = set()
    with contextlib.suppress(sqlite3.OperationalError):  # tables that somebody has changed fail when they are used
        for table in (table for table in SEALED_COLUMNS if table in tables):
            if connection.execute(is_sealed_with(table, params), params).fetchone():
                return
            found |= {key.hex() for (key,) in connection.execute(seal_keys(table)) if isinstance(key, bytes)}
            # Another process may have written its first row between the two looks.
            if found & set(cipher.key_ids):
                return
        if found:
            raise KeyRejected(
                f"Wrong key: every row of the store {path} was sealed with key {', '.join(sorted(found))}, but "
                f"store.keys has {', '.join(cipher.key_ids)}. Nothing was written. Set the right key, or move the "
                "store away."
            )
