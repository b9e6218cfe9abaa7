"""What a user has confirmed: to be sent by the server at this origin to sign in at this host, for this issuer."""

from typing import NamedTuple

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, intact_rows, new_uid

KEPT_CONFIRMATIONS = 20
"""The number of confirmations that are kept for one account; older ones are deleted, and the user is asked again."""

_TABLE = "confirmations"
_FIND = """
    SELECT * FROM confirmations
    WHERE principal = :principal AND account = :account AND server = :server
        AND upstream = :upstream AND issuer = :issuer AND sign_in_host = :sign_in_host
"""
_ADD = """
    INSERT INTO confirmations (uid, principal, account, server, upstream, issuer, sign_in_host, confirmed_at, seal)
    VALUES (:uid, :principal, :account, :server, :upstream, :issuer, :sign_in_host, :confirmed_at, :seal)
    ON CONFLICT (principal, account, server, upstream, issuer, sign_in_host) DO UPDATE SET
        uid = excluded.uid, confirmed_at = excluded.confirmed_at, seal = excluded.seal
"""
# The new one is kept whatever the times of the others are: they may be forged, or from before the clock was set back.
_FORGET_OLD = """
    DELETE FROM confirmations
    WHERE principal = :principal AND account = :account AND server = :server AND uid NOT IN (
        SELECT uid FROM confirmations WHERE principal = :principal AND account = :account AND server = :server
        ORDER BY uid = :uid DESC, confirmed_at DESC LIMIT :kept
    )
"""
_ALL = "SELECT * FROM confirmations ORDER BY confirmed_at, principal, account, server"


class Confirmation(NamedTuple):
    """That a user wants to sign in at this host for a server. ``confirmed_at`` is in Unix seconds."""

    account: Account
    upstream: str
    issuer: str
    sign_in_host: str
    confirmed_at: float


class Confirmations:
    """The confirmations in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def add(self, account: Account, *, upstream: str, issuer: str, sign_in_host: str, now: float) -> None:
        """Remember a confirmation, at ``now`` (Unix seconds); it replaces an earlier one of the same.

        ``upstream``: the origin of the server, because a name may later be configured for another server.
        All but the newest KEPT_CONFIRMATIONS of the account are deleted.
        """
        async with self._engine.transaction() as transaction:
            await self._write(transaction, Confirmation(account, upstream, issuer, sign_in_host, now))

    async def add_within(self, transaction: Transaction, confirmation: Confirmation) -> None:
        """Remember a confirmation within a transaction, unless the same one is there."""
        asked = _params(*confirmation[:-1])
        if not await intact_rows(self._engine, _TABLE, await transaction.execute(_FIND, asked), asked):
            await self._write(transaction, confirmation)

    async def all(self) -> list[Confirmation]:
        """Return all confirmations, oldest first."""
        return await decode_rows(self._engine, _TABLE, await self._engine.fetch_all(_ALL), {}, _read)

    async def _write(self, transaction: Transaction, confirmation: Confirmation) -> None:
        uid = new_uid()
        columns = {**_params(*confirmation[:-1]), "confirmed_at": confirmation.confirmed_at}
        seal = RowCipher(self._engine.cipher, _TABLE, uid).seal_row(columns)
        await transaction.execute(_ADD, {"uid": uid, **columns, SEAL: seal})
        kept = {**account_params(confirmation.account), "uid": uid, "kept": KEPT_CONFIRMATIONS}
        await transaction.execute(_FORGET_OLD, kept)

    async def contains(self, account: Account, *, upstream: str, issuer: str, sign_in_host: str) -> bool:
        """Return whether this was confirmed. A row that was changed in the store counts as missing."""
        asked = _params(account, upstream, issuer, sign_in_host)
        return bool(await intact_rows(self._engine, _TABLE, await self._engine.fetch_all(_FIND, asked), asked))


def _params(account: Account, upstream: str, issuer: str, sign_in_host: str) -> Columns:
    return {**account_params(account), "upstream": upstream, "issuer": issuer, "sign_in_host": sign_in_host}


def _read(row: Row, _: RowCipher) -> Confirmation:
    account = Account(row["principal"], row["server"], row["account"])
    return Confirmation(account, row["upstream"], row["issuer"], row["sign_in_host"], row["confirmed_at"])
