"""Seal every row of the store again with the first key, while other processes use it.

What is sealed with that key already is left alone, so a rotation that was interrupted goes on where it stopped. Rows
are read, opened, sealed and written in small transactions; one that another process has changed meanwhile is read
again. Columns that no seal covers stay as they are.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mcp_auth_proxy.errors import DecryptionError, StoreUnavailable
from mcp_auth_proxy.store import keys
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, UNKNOWN, RowCipher, row_columns, row_uid
from mcp_auth_proxy.store.sealed_tables import SEALED_COLUMNS, key_column, rows_by_key

ROWS_IN_TRANSACTION = 50
"""Rows that are written in one transaction: a few milliseconds, while other processes wait."""

MAX_PASSES = 5
"""How often the tables are gone through while rows turn up that are sealed with another key."""

_PAGE = 1000
_SHORTEST_PAUSE = 0.01
_ATTEMPTS = 5
_RETRY_PAUSE = 1.0
_PASS_PAUSE = 0.2


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that can't be read with the keys that there are, and was left as it is."""

    table: str
    uid: str
    """"?" for one that we have not made."""
    problem: str


@dataclass(slots=True)
class Progress:
    """What a rotation has done so far."""

    key: str
    """The id of the key that seals."""
    total: int = 0
    """Rows in the store when it began."""
    resealed: int = 0
    skipped: int = 0
    """Rows that were sealed with the key already."""
    left: int = 0
    """Rows that turned up in the last pass, sealed with another key: who writes them goes on doing so."""
    late: bool = False
    """Whether rows turned up after the first pass."""
    broken: dict[tuple[str, str], BrokenRow] = field(default_factory=dict)


Show = Callable[[Progress], None]


async def rotate(engine: Engine, show: Show) -> Progress:
    """Seal every row with the first key of the engine. Call ``show`` now and then. Raises StoreUnavailable."""
    done = Progress(engine.cipher.key_ids[0])
    for table in SEALED_COLUMNS:
        row = await engine.fetch_one(f"SELECT count(*) AS count FROM {table}")  # noqa: S608
        done.total += int(row["count"]) if row is not None else 0
    for number in range(MAX_PASSES):
        before = done.resealed
        for table in SEALED_COLUMNS:
            await _Table(engine, table, done, show, first=number == 0).rotate()
        found = done.resealed - before
        if number:
            done.left, done.late = found, done.late or found > 0
        if not found:
            break
        await asyncio.sleep(_PASS_PAUSE)
    if not done.left:
        # Nothing must open with a key alone that no row needs any more.
        await keys.forget_checks(engine, keep={done.key, *await rows_by_key(engine)})
    return done


class _Table:
    """One pass over one table."""

    def __init__(self, engine: Engine, table: str, done: Progress, show: Show, *, first: bool) -> None:
        self._engine = engine
        self._table = table
        self._columns = SEALED_COLUMNS[table]
        self._key = bytes.fromhex(done.key)
        self._done = done
        self._show = show
        self._first = first

    async def rotate(self) -> None:
        """Seal the rows again that are sealed with another key."""
        columns = ", ".join(f"{key_column(name)} AS key_{name}" for name in self._columns)
        sql = f"SELECT uid, {columns} FROM {self._table} WHERE uid > :after ORDER BY uid LIMIT :count"  # noqa: S608
        after = ""
        while True:
            # Outside of a transaction: nobody waits while the table is read.
            rows = await self._engine.fetch_all(sql, {"after": after, "count": _PAGE})
            uids = [uid for row in rows if (uid := row_uid(row)) != UNKNOWN]
            due = [row_uid(row) for row in rows if self._is_due(row)]
            for some in _chunks(due):
                await self._reseal(some)
                self._show(self._done)
            if len(rows) < _PAGE:
                return
            if not uids:
                raise StoreUnavailable(f"The table {self._table} is full of rows that mcp-auth-proxy has not made.")
            after = uids[-1]

    def _is_due(self, row: Row) -> bool:
        """Return whether something in a row is sealed with another key. What is not is counted, in the first pass."""
        found = {row[f"key_{name}"] for name in self._columns} - {None}
        if not found or (self._table, str(row["uid"])) in self._done.broken:
            return False
        if found == {self._key}:
            self._done.skipped += self._first
            return False
        if row_uid(row) == UNKNOWN:
            self._broken(row, "something else than mcp-auth-proxy has written it")
            return False
        return True

    def _broken(self, row: Row, problem: str) -> None:
        self._done.broken[self._table, str(row["uid"])] = BrokenRow(self._table, row_uid(row), problem)

    async def _reseal(self, uids: list[str]) -> None:
        """Seal rows again in one transaction, then leave the store to others for as long as it took."""
        for attempt in range(1, _ATTEMPTS + 1):
            begun_at = time.monotonic()
            try:
                resealed, broken = await self._transaction(uids)
                break
            except StoreUnavailable:
                if attempt == _ATTEMPTS:
                    raise
                await asyncio.sleep(_RETRY_PAUSE)
        self._done.resealed += resealed
        for row, problem in broken:
            self._broken(row, problem)
        await asyncio.sleep(max(_SHORTEST_PAUSE, time.monotonic() - begun_at))

    async def _transaction(self, uids: list[str]) -> tuple[int, list[tuple[Row, str]]]:
        """Return how many rows were written, and those that can't be read, each with the problem."""
        names = {f"uid_{number}": uid for number, uid in enumerate(uids)}
        places = ", ".join(f":{name}" for name in names)
        sql = f"SELECT * FROM {self._table} WHERE uid IN ({places})"  # noqa: S608
        resealed, broken = 0, []
        async with self._engine.transaction() as transaction:
            for row in await transaction.execute(sql, names):
                try:
                    changes = self._sealed_again(row)
                except DecryptionError as error:
                    broken.append((row, str(error)))
                except (ValueError, TypeError) as error:
                    # Only the type: the text of the error may contain a value of the row.
                    broken.append((row, f"a value is damaged ({type(error).__name__})"))
                else:
                    resealed += await self._write(transaction, row, changes)
        return resealed, broken

    def _sealed_again(self, row: Row) -> dict[str, object]:
        """Return the sealed columns of a row, sealed with the first key. Raises DecryptionError, ValueError."""
        columns = row_columns(row)
        cipher = RowCipher(self._engine.cipher, self._table, row["uid"])
        cipher.check_row(columns)
        changes: dict[str, object] = {
            name: cipher.seal(name, cipher.open(name, row[name]))
            for name in self._columns
            if name != SEAL and row[name] is not None
        }
        changes[SEAL] = cipher.seal_row({**columns, **changes})
        return changes

    async def _write(self, transaction: Transaction, row: Row, changes: dict[str, object]) -> int:
        """Write a row that nobody has changed since it was read. Return how many were written."""
        assignments = ", ".join(f"{name} = :{name}" for name in changes)
        sql = f"UPDATE {self._table} SET {assignments} WHERE uid = :uid AND {SEAL} = :seen RETURNING uid"  # noqa: S608
        return len(await transaction.execute(sql, {**changes, "uid": row["uid"], "seen": row[SEAL]}))


def _chunks(uids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(uids), ROWS_IN_TRANSACTION):
        yield uids[start : start + ROWS_IN_TRANSACTION]
