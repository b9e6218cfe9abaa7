"""What processes saw of connections: when they were used, and what went wrong last. One row for each account."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, new_uid

KEPT_NOTES = 5000
"""Notes that are kept at most; those of the accounts that were used longest ago go first."""

KEPT_OF_PRINCIPAL = 200
"""Those of one principal, who may name any account, so that others keep theirs."""

_TABLE = "connection_notes"
_ALL = "SELECT * FROM connection_notes"
_FIND = "SELECT * FROM connection_notes WHERE principal = :principal AND account = :account AND server = :server"
_DELETE = "DELETE FROM connection_notes WHERE principal = :principal AND account = :account AND server = :server"
_PUT = """
    INSERT INTO connection_notes (
        uid, principal, account, server, used_at, unreachable_since, failed_at, failure, remedy, retrying_since, seal
    ) VALUES (
        :uid, :principal, :account, :server, :used_at, :unreachable_since, :failed_at, :failure, :remedy,
        :retrying_since, :seal
    )
    ON CONFLICT (principal, account, server) DO UPDATE SET
        uid = excluded.uid, used_at = excluded.used_at, unreachable_since = excluded.unreachable_since,
        failed_at = excluded.failed_at, failure = excluded.failure, remedy = excluded.remedy,
        retrying_since = excluded.retrying_since, seal = excluded.seal
"""
_NEWEST_FIRST = "ORDER BY uid = :uid DESC, coalesce(used_at, 0) DESC, coalesce(failed_at, 0) DESC LIMIT :kept"
_TRIM_PRINCIPAL = f"""
    DELETE FROM connection_notes WHERE principal = :principal AND uid NOT IN (
        SELECT uid FROM connection_notes WHERE principal = :principal {_NEWEST_FIRST}
    )
"""  # noqa: S608 - a text of our own
_TRIM = f"""
    DELETE FROM connection_notes WHERE (SELECT count(*) FROM connection_notes) > :kept AND uid NOT IN (
        SELECT uid FROM connection_notes {_NEWEST_FIRST}
    )
"""  # noqa: S608 - a text of our own


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNote:
    """What is known of an account's connection beside its grant. Times are Unix seconds; None if it is not known."""

    used_at: float | None = None
    """When a request was last sent with its token, to the hour."""
    unreachable_since: float | None = None
    """Since when requests could not connect to the server; None if they could, as far as is known."""
    failed_at: float | None = None
    failure: str = ""
    """What went wrong last; empty if nothing did, or since it has worked again. No secret is in it."""
    remedy: str = ""
    """What to do about that, if it is known."""
    retrying_since: float | None = None
    """Since when its grant could not be renewed, for a reason that passes; None if it could."""


class StoredNotes:
    """The notes in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def all(self) -> dict[Account, StoredNote]:
        """Return all notes."""
        rows = await self._engine.fetch_all(_ALL)
        return dict(await decode_rows(self._engine, _TABLE, rows, {}, _read))

    async def change(self, changes: Mapping[Account, Mapping[str, object] | None]) -> None:
        """Change fields of several notes, whatever other processes have written to the others; None deletes a note."""
        async with self._engine.transaction() as transaction:
            for account, fields in changes.items():
                if fields is None:
                    await transaction.execute(_DELETE, account_params(account))
                else:
                    await self._change(transaction, account, fields)

    async def _change(self, transaction: Transaction, account: Account, fields: Mapping[str, object]) -> None:
        asked: Columns = account_params(account)
        rows = await transaction.execute(_FIND, asked)
        found = dict(await decode_rows(self._engine, _TABLE, rows, asked, _read))
        # The fields are those of ``StoredNote``, by name.
        note = replace(found.get(account, StoredNote()), **fields)  # type: ignore[arg-type]
        uid = new_uid()
        columns: Columns = {
            **asked,
            "used_at": note.used_at,
            "unreachable_since": note.unreachable_since,
            "failed_at": note.failed_at,
            "failure": note.failure,
            "remedy": note.remedy,
            "retrying_since": note.retrying_since,
        }
        seal = RowCipher(self._engine.cipher, _TABLE, uid).seal_row(columns)
        await transaction.execute(_PUT, {"uid": uid, **columns, SEAL: seal})
        of_principal = {"uid": uid, "principal": account.principal, "kept": KEPT_OF_PRINCIPAL}
        await transaction.execute(_TRIM_PRINCIPAL, of_principal)
        await transaction.execute(_TRIM, {"uid": uid, "kept": KEPT_NOTES})


def _read(row: Row, _: RowCipher) -> tuple[Account, StoredNote]:
    note = StoredNote(
        used_at=row["used_at"],
        unreachable_since=row["unreachable_since"],
        failed_at=row["failed_at"],
        failure=row["failure"],
        remedy=row["remedy"],
        retrying_since=row["retrying_since"],
    )
    return Account(row["principal"], row["server"], row["account"]), note
