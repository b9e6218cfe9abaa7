"""Rows that are sealed as a whole, so that nobody without the key can change what a secret in them is for.

The secrets of a row are sealed one by one. The seal of the row (``SEAL``) covers every other column, those secrets
included: whose they are, where they are sent, and how. A row that does not match its seal counts as missing. Rows that
were deleted, and rows that were put back as they once were, can't be noticed.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import struct
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from mcp_auth_proxy.errors import DecryptionError, excerpt
from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.engine import Engine, Row, Transaction

Columns = dict[str, object]
T = TypeVar("T")

SEAL = "seal"
"""The column with the seal of the whole row."""

UNSEALED: Mapping[str, frozenset[str]] = {
    "grants": frozenset({"refresh_begun_at", "refresh_owner"}),
    "flows": frozenset({"poll_owner", "next_poll_at"}),
    "api_keys": frozenset({"last_used_at"}),
    "servers": frozenset({"connected_at"}),
    "events": frozenset({"id"}),
}
"""The columns that the seal of a row leaves out, by table: which process sends the next request and since when, when
something was last used, the order of events.

Whoever forges them can hold a renewal or a poll up, or repeat one, but not send it elsewhere.
"""

UNKNOWN = "?"
"""Stands for the id of a row that something else than mcp-auth-proxy has made."""

_ROWS_AT_ONCE = 100
_UID = re.compile(r"[0-9a-f]{32}")


def new_uid() -> str:
    """Return an id for a row that is about to be written."""
    return secrets.token_hex(16)


class RowCipher:
    """Seal and open the columns of one row."""

    def __init__(self, cipher: Cipher, table: str, uid: str) -> None:
        self._cipher = cipher
        self._table = table
        self._uid = uid

    def seal(self, column: str, value: str) -> bytes:
        """Encrypt a value for its column."""
        return self._cipher.seal(value, table=self._table, row=self._uid, column=column)

    def seal_if(self, column: str, value: str | None) -> bytes | None:
        """Encrypt a value for its column; None stays None."""
        return None if value is None else self.seal(column, value)

    def open(self, column: str, sealed: bytes) -> str:
        """Decrypt the value of a column. Raises DecryptionError."""
        if not isinstance(sealed, bytes):
            raise DecryptionError(f"{self._table}.{column} of row {self._uid} is damaged: not a sealed value.")
        return self._cipher.open(sealed, table=self._table, row=self._uid, column=column)

    def open_if(self, column: str, sealed: bytes | None) -> str | None:
        """Decrypt the value of a column; None stays None. Raises DecryptionError."""
        return None if sealed is None else self.open(column, sealed)

    def seal_row(self, columns: Mapping[str, object]) -> bytes:
        """Return the seal of the row that has these columns. ``uid``, SEAL and UNSEALED are left out."""
        return self.seal(SEAL, self._fingerprint(columns))

    def check_row(self, columns: Mapping[str, object]) -> None:
        """Raise DecryptionError if a row with these columns is not as it was sealed."""
        sealed = columns.get(SEAL)
        if not isinstance(sealed, bytes) or not hmac.compare_digest(
            self._fingerprint(columns), self.open(SEAL, sealed)
        ):
            server = f" It names the server {excerpt(ascii(columns['server']))}." if "server" in columns else ""
            raise DecryptionError(
                f"something else than mcp-auth-proxy has changed it, so it counts as missing.{server}"
            )

    def _fingerprint(self, columns: Mapping[str, object]) -> str:
        """Hash the names and values of columns. Those that are NULL are left out, so that a migration may add some."""
        left_out = {"uid", SEAL} | UNSEALED.get(self._table, frozenset())
        hashed = hashlib.sha256()
        for name in sorted(columns.keys() - left_out):
            value = columns[name]
            if value is not None:
                for part in (name.encode(), _canonical(value)):
                    hashed.update(len(part).to_bytes(8, "big") + part)
        return hashed.hexdigest()


async def decode_rows(
    engine: Engine, table: str, rows: list[Row], asked: Mapping[str, object], read: Callable[[Row, RowCipher], T]
) -> list[T]:
    """Read rows into values; those that are not as they were sealed, or can't be decoded, are logged and left out.

    So are those that do not have the values that were ``asked`` for, by column: a view in place of the table may
    compute a column twice, and pass one intact row off as another. However many rows somebody has put there, other
    work of the event loop goes on.
    """
    found: list[T] = []
    for number, row in enumerate(rows, 1):
        if number % _ROWS_AT_ONCE == 0:
            await asyncio.sleep(0)
        uid = row_uid(row)
        try:
            cipher = RowCipher(engine.cipher, table, uid)
            columns = row_columns(row)
            cipher.check_row(columns)
            if any(columns[name] != value for name, value in asked.items()):
                raise DecryptionError("something else than mcp-auth-proxy has put it in the place of another one.")
            found.append(read(row, cipher))
        except DecryptionError as error:
            engine.report_broken(table, uid, error)
        except (ValueError, TypeError) as error:
            # Only the type: the text of the error may contain a value of the row.
            engine.report_broken(table, uid, DecryptionError(f"a value is damaged ({type(error).__name__})"))
    return found


class SealedTable(Generic[T]):
    """A whole table as values. To read it again costs little: a row that has the seal it had is not decoded again."""

    def __init__(self, engine: Engine, table: str, read: Callable[[Row, RowCipher], T]) -> None:
        self._engine = engine
        self._table = table
        self._read = read
        self._decoded: dict[str, tuple[bytes, T]] = {}
        self.version = 0
        """Increases whenever a call of ``all`` finds something else than the one before."""

    async def all(self) -> list[T]:
        """Return the values of the rows that are as they were sealed. Raises StoreUnavailable.

        Columns that no seal covers may be those of an earlier call.
        """
        rows = await self._engine.fetch_all(f"SELECT * FROM {self._table}")  # noqa: S608 - a table of our own
        before, self._decoded = self._decoded, {}
        changed = []
        # Something else than the table may be in its place, without these columns.
        has_seals = bool(rows) and {"uid", SEAL} <= set(rows[0].keys())
        for row in rows:
            known = before.get(row["uid"]) if has_seals else None
            if known is not None and known[0] == row[SEAL]:
                self._decoded[row["uid"]] = known
            else:
                changed.append(row)
        for uid, seal, value in await decode_rows(self._engine, self._table, changed, {}, self._read_with_seal):
            self._decoded[uid] = (seal, value)
        if changed or len(self._decoded) != len(before):
            self.version += 1
        return [value for _, value in self._decoded.values()]

    def _read_with_seal(self, row: Row, cipher: RowCipher) -> tuple[str, bytes, T]:
        return row["uid"], row[SEAL], self._read(row, cipher)


async def intact_rows(engine: Engine, table: str, rows: list[Row], asked: Mapping[str, object]) -> list[Row]:
    """Return the rows that are as they were sealed, and as they were asked for; the others are logged and left out."""
    return await decode_rows(engine, table, rows, asked, lambda row, _: row)


async def change_row(
    engine: Engine, transaction: Transaction, table: str, row: Row, changes: Mapping[str, object]
) -> None:
    """Write columns of an intact row that was read in this transaction, and seal it again.

    What is sealed is what was read and checked. The row as it is after the write is not looked at: a trigger that
    somebody else put into the database may have changed it.
    """
    seal = RowCipher(engine.cipher, table, row["uid"]).seal_row({**row_columns(row), **changes})
    values = {**changes, SEAL: seal}
    assignments = ", ".join(f"{name} = :{name}" for name in values)
    sql = f"UPDATE {table} SET {assignments} WHERE uid = :uid"  # noqa: S608 - all names are those of our own columns
    await transaction.execute(sql, {**values, "uid": row["uid"]})


def row_uid(row: Row) -> str:
    """Return the id of a row; UNKNOWN for one that we have not made, which must not reach a log."""
    uid = row_columns(row).get("uid")
    return uid if isinstance(uid, str) and _UID.fullmatch(uid) else UNKNOWN


def row_columns(row: Row) -> Columns:
    """Return the columns of a row by name."""
    return {name: row[name] for name in row.keys()}  # noqa: SIM118 - iterating over a row gives its values


def _canonical(value: object) -> bytes:
    """Return the same bytes for a value before it is written and after it was read: a database turns True into 1."""
    match value:
        case str():
            return b"t" + value.encode("utf-8", "surrogatepass")
        case bytes():
            return b"b" + value
        case int() | float():
            return b"n" + struct.pack(">d", value)
        case _:
            raise TypeError(f"no column holds a {type(value).__name__}")
