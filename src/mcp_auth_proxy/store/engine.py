"""The database interface that grants, flows, registrations and the broker use.

SQL is written once for every engine: parameters are named (``:name``), rows are read by column name, and only what
SQLite and PostgreSQL share is used (``RETURNING``, ``ON CONFLICT … DO UPDATE``).
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.lease import Owners

Params = Mapping[str, object]
"""The values of a statement's named parameters."""

NO_PARAMS: Params = {}


class Row(Protocol):
    """One row of a result."""

    def __getitem__(self, column: str, /) -> Any:
        """Return the value of a column. Raises an error of the engine if there is no such column."""

    def keys(self) -> Iterable[str]:
        """Return the names of the columns."""


class Transaction:
    """The statements between BEGIN and COMMIT. ``run`` executes one of them and returns its rows."""

    def __init__(self, run: Callable[[str, Params], Coroutine[Any, Any, list[Row]]]) -> None:
        self._run = run

    async def execute(self, sql: str, params: Params = NO_PARAMS) -> list[Row]:
        """Run one statement and return its rows; with RETURNING, those that it changed."""
        return await self._run(sql, params)

    async def fetch_one(self, sql: str, params: Params = NO_PARAMS) -> Row | None:
        """Run one statement and return its first row, or None."""
        rows = await self._run(sql, params)
        return rows[0] if rows else None


class Engine(Protocol):
    """A database of this process, opened by ``store.open_store``.

    Every method raises StoreUnavailable if the database can't be used now.
    """

    cipher: Cipher
    """The cipher that seals and opens the secrets in the rows. Another one may take its place (``keys.renew_keys``)."""

    @property
    def owners(self) -> Owners:
        """The owners of leases: of this process, and what is known of those of others. Closed with the database."""

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Begin a transaction that may write; no other of this process runs meanwhile.

        It is committed, and durable, when the block ends; rolled back if the block raises or is cancelled.
        """

    async def fetch_all(self, sql: str, params: Params = NO_PARAMS) -> list[Row]:
        """Return all rows of a query, as committed."""

    async def fetch_one(self, sql: str, params: Params = NO_PARAMS) -> Row | None:
        """Return the first row of a query, as committed, or None."""

    async def changed(self, reader: str = "") -> bool:
        """Return whether another process has written since the last call of the same ``reader``; True for its first."""

    def now(self) -> float:
        """Return the time that all processes on the store share, in Unix seconds: that of the database server."""

    async def check_schema(self) -> None:
        """Raise StoreMigrated if a newer version has migrated the store since it was opened.

        ``transaction``, the reads and ``check_writable`` raise it too, so that a row of another schema is never
        decoded, nor written: it would look like one that somebody has changed. See ``schema_guard.py``.
        """

    async def check_writable(self) -> None:
        """Check that the database can be written now. After a failed write this includes a write. See the class."""

    def report_broken(self, table: str, uid: str, problem: Exception) -> None:
        """Log, once for each row, that it is skipped because it can't be decrypted or decoded."""

    async def close(self) -> None:
        """Close the database once a running transaction has ended. May be called again."""
