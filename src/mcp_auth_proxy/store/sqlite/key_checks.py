"""The checks of keys (``store.key_checks``) in an SQLite file."""

import sqlite3

from mcp_auth_proxy.store import key_checks
from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.key_checks import open_with

__all__ = ["add", "open_with", "read_all", "replace_all"]


def read_all(connection: sqlite3.Connection) -> dict[str, bytes]:
    """Return the checks, by the id of their key. Somebody else's program may have put anything into their columns."""
    return key_checks.checks(connection.execute("SELECT name, value FROM meta").fetchall())


def add(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Add the checks of the cipher's keys that are missing."""
    for key_id in cipher.key_ids:
        connection.execute(key_checks.ADD, key_checks.values(cipher, key_id))


def replace_all(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Replace all checks, also those of keys that the cipher does not have, by new ones."""
    connection.execute(
        "DELETE FROM meta WHERE substr(name, 1, :length) = :rows",
        {"length": len(key_checks.PREFIX), "rows": key_checks.PREFIX},
    )
    add(connection, cipher)
