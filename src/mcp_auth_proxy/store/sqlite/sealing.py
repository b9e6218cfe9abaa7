"""The step of a migration that seals the rows of a store in which only the secrets were sealed."""

import contextlib
import sqlite3

from mcp_auth_proxy.errors import DecryptionError
from mcp_auth_proxy.store.cipher import BEFORE_SEALED_ROWS, Cipher
from mcp_auth_proxy.store.sealed_rows import SEAL, RowCipher
from mcp_auth_proxy.store.sqlite import key_checks

_TABLES = ("grants", "registrations", "client_bindings", "flows", "attempts")


def seal_rows(connection: sqlite3.Connection, cipher: Cipher) -> None:
    """Seal every row, and its secrets again so that they open in sealed rows only.

    A row with a secret that can't be opened is left as it is; without a seal it counts as missing. Whether a row was
    changed before can't be known.
    """
    for table in _TABLES:
        cursor = connection.cursor()
        cursor.row_factory = sqlite3.Row
        for row in cursor.execute(f"SELECT * FROM {table}").fetchall():  # noqa: S608 - the names above
            with contextlib.suppress(DecryptionError, ValueError, TypeError):
                _seal_row(connection, cipher, table, dict(row))
    key_checks.replace_all(connection, cipher)


def _seal_row(connection: sqlite3.Connection, cipher: Cipher, table: str, columns: dict[str, object]) -> None:
    """Seal one row. Raises DecryptionError, and ValueError or TypeError for a value that no column of ours has."""
    uid = str(columns["uid"])
    row = RowCipher(cipher, table, uid)
    changes = {
        name: row.seal(name, cipher.open(value, table=table, row=uid, column=name, version=BEFORE_SEALED_ROWS))
        for name, value in columns.items()
        if isinstance(value, bytes)
    }
    changes[SEAL] = row.seal_row({**columns, **changes})
    assignments = ", ".join(f"{name} = :{name}" for name in changes)
    sql = f"UPDATE {table} SET {assignments} WHERE uid = :uid"  # noqa: S608 - all names are those of our own columns
    connection.execute(sql, {**changes, "uid": uid})
