"""A known text in ``meta``, sealed with each key: it shows whether a key is right before anything else is read."""

import sqlite3
from collections.abc import Mapping

from mcp_auth_proxy.errors import DecryptionError
from mcp_auth_proxy.store.cipher import Cipher

_CHECK = "mcp-auth-proxy store"
_KEY_ROWS = "key:"


def read_all(connection: sqlite3.Connection) -> dict[str, bytes]:
    """Return the checks, by the id of their key. Somebody else's program may have put anything into their columns."""
    rows = connection.execute("SELECT name, value FROM meta").fetchall()
    return {str(name).removeprefix(_KEY_ROWS): value for name, value in rows if str(name).startswith(_KEY_ROWS)}


def open_with(cipher: Cipher, checks: Mapping[str, bytes], *, version: int) -> bool:
    """Return whether every check of a key that the cipher has is as we sealed it, with seals of this version."""
    try:
        return all(
            cipher.open(checks[key_id], table="meta", row=_KEY_ROWS + key_id, column="value", version=version) == _CHECK
            for key_id in cipher.key_ids
            if key_id in checks
        )
    except (DecryptionError, TypeError):
        return False


def add(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Add the checks of the cipher's keys that are missing."""
    for key_id in cipher.key_ids:
        name = _KEY_ROWS + key_id
        value = cipher.seal(_CHECK, table="meta", row=name, column="value", key_id=key_id)
        connection.execute(
            "INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING",
            {"name": name, "value": value},
        )


def replace_all(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Replace all checks, also those of keys that the cipher does not have, by new ones."""
    connection.execute(
        "DELETE FROM meta WHERE substr(name, 1, :length) = :rows", {"length": len(_KEY_ROWS), "rows": _KEY_ROWS}
    )
    add(connection, cipher)
