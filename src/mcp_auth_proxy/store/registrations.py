"""Client identities that authorization servers gave us, and the issuers that configured clients are bound to."""

import hashlib
from typing import NamedTuple

from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Registration
from mcp_auth_proxy.store.codec import read_registration, registration_columns
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.leases import Leases
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, intact_rows, new_uid

KEPT_REGISTRATIONS = 20
"""The number of registrations that are kept for one server, which may name a new issuer whenever it is asked.

The oldest that no live grant uses are deleted first.
"""

_ALL = "SELECT * FROM registrations ORDER BY client_created_at, server, issuer, account"
_TABLE = "registrations"
_BINDINGS = "client_bindings"
_FIND = """
    SELECT * FROM registrations
    WHERE server = :server AND issuer = :issuer AND account = :account AND client_redirect_uri = :redirect_uri
"""
_SAVE = """
    INSERT INTO registrations (
        uid, server, issuer, account, client_id, client_auth, client_kind, client_secret, client_redirect_uri,
        client_secret_expires_at, client_created_at, seal
    ) VALUES (
        :uid, :server, :issuer, :account, :client_id, :client_auth, :client_kind, :client_secret, :client_redirect_uri,
        :client_secret_expires_at, :client_created_at, :seal
    )
    ON CONFLICT (server, issuer, account, client_redirect_uri) DO UPDATE SET
        uid = excluded.uid, client_id = excluded.client_id, client_auth = excluded.client_auth,
        client_kind = excluded.client_kind, client_secret = excluded.client_secret,
        client_secret_expires_at = excluded.client_secret_expires_at, client_created_at = excluded.client_created_at,
        seal = excluded.seal
"""
# Nothing is changed if another process has stored a client since: ``seen`` is the one that was there before.
_ADD = f"{_SAVE} WHERE registrations.client_id = :seen RETURNING uid"
# The new one is kept whatever the times of the others are; then come those that the next login of a live grant needs.
_FORGET_OLD = """
    DELETE FROM registrations WHERE server = :server AND uid NOT IN (
        SELECT uid FROM registrations WHERE server = :server
        ORDER BY uid = :uid DESC, EXISTS (
            SELECT 1 FROM grants
            WHERE grants.server = registrations.server AND grants.account = registrations.account
                AND grants.issuer = registrations.issuer AND grants.client_id = registrations.client_id
                AND grants.ended_at IS NULL
        ) DESC, client_created_at DESC LIMIT :kept
    )
"""
_DELETE = "DELETE FROM registrations WHERE server = :server AND account = :account"
_DELETE_AT_ISSUER = f"{_DELETE} AND issuer = :issuer"
_BIND = """
    INSERT INTO client_bindings (uid, server, client_id, issuer, seal)
    VALUES (:uid, :server, :client_id, :issuer, :seal)
    ON CONFLICT (server, client_id) DO UPDATE SET
        uid = excluded.uid, issuer = excluded.issuer, seal = excluded.seal
"""
_ALL_BOUND = "SELECT * FROM client_bindings ORDER BY server, client_id"
_BOUND = "SELECT * FROM client_bindings WHERE server = :server AND client_id = :client_id"


def registration_lease(server: str, issuer: str, account: str, redirect_uri: str) -> str:
    """Return the name of the lease on registering a client (``store.leases``)."""
    parts = "\0".join((server, issuer, account, redirect_uri))
    return f"register:{hashlib.sha256(parts.encode('utf-8', 'surrogatepass')).hexdigest()}"


class ClientBinding(NamedTuple):
    """The issuer that a configured client of a server may be used with."""

    server: str
    client_id: str
    issuer: str


class Registrations:
    """The registrations in the store. Every method raises StoreUnavailable if the store can't be used now.

    ``account`` is the name of an account of the server (``models.Account.name``).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.leases = Leases(engine)
        """Those of ``registration_lease``."""

    async def find(
        self, server: str, issuer: str, redirect_uri: str, *, account: str = DEFAULT_ACCOUNT
    ) -> Registration | None:
        """Return the registration for a redirect URI; None if there is none or it can't be decrypted."""
        values = {"server": server, "issuer": issuer, "account": account, "redirect_uri": redirect_uri}
        rows = await self._engine.fetch_all(_FIND, values)
        asked = {"server": server, "issuer": issuer, "account": account, "client_redirect_uri": redirect_uri}
        return next(iter(await decode_rows(self._engine, _TABLE, rows, asked, read_registration)), None)

    async def all(self) -> list[Registration]:
        """Return all registrations, oldest first."""
        return await decode_rows(self._engine, _TABLE, await self._engine.fetch_all(_ALL), {}, read_registration)

    async def add_within(self, transaction: Transaction, registration: Registration) -> bool:
        """Store a registration within a transaction. Return False if there is one for its redirect URI already."""
        find = {
            "server": registration.server,
            "issuer": registration.issuer,
            "account": registration.account,
            "redirect_uri": registration.redirect_uri,
        }
        if await intact_rows(self._engine, _TABLE, await transaction.execute(_FIND, find), {}):
            return False
        values = self._values(registration)
        await transaction.execute(_SAVE, values)
        await self._forget_old(transaction, values)
        return True

    async def save(self, registration: Registration) -> None:
        """Store a registration; it replaces the one for the same server, issuer, account and redirect URI.

        All but KEPT_REGISTRATIONS of the server are deleted.
        """
        values = self._values(registration)
        async with self._engine.transaction() as transaction:
            await transaction.execute(_SAVE, values)
            await self._forget_old(transaction, values)

    def _values(self, registration: Registration) -> Columns:
        """Return the columns of a new row."""
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns = {
            "server": registration.server,
            "issuer": registration.issuer,
            "account": registration.account,
            **registration_columns(registration, cipher),
        }
        return {"uid": uid, **columns, SEAL: cipher.seal_row(columns)}

    async def _forget_old(self, transaction: Transaction, new: Columns) -> None:
        kept = {"server": new["server"], "uid": new["uid"], "kept": KEPT_REGISTRATIONS}
        await transaction.execute(_FORGET_OLD, kept)

    async def add(self, registration: Registration, *, replaces: str | None) -> Registration:
        """Store a new registration unless another process was faster; return the one that is stored then.

        ``replaces``: the id of the client that it takes the place of, None if there was none.
        """
        asked: Columns = {
            "server": registration.server,
            "issuer": registration.issuer,
            "account": registration.account,
            "client_redirect_uri": registration.redirect_uri,
        }
        find = {**asked, "redirect_uri": registration.redirect_uri}
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(_FIND, find)
            for stored in await decode_rows(self._engine, _TABLE, rows, asked, read_registration):
                if stored.client_id != replaces:
                    return stored
            # What something else has changed counts as missing, and is replaced.
            seen = rows[0]["client_id"] if rows else ""
            values = self._values(registration)
            if await transaction.execute(_ADD, {**values, "seen": seen}):
                await self._forget_old(transaction, values)
                return registration
            rows = await transaction.execute(_FIND, find)
            stored_now = await decode_rows(self._engine, _TABLE, rows, asked, read_registration)
        return stored_now[0] if stored_now else registration

    async def delete(self, server: str, issuer: str | None = None, *, account: str = DEFAULT_ACCOUNT) -> None:
        """Delete the registrations of an account, at one issuer or, if that is None, at all."""
        values = {"server": server, "account": account}
        async with self._engine.transaction() as transaction:
            if issuer is None:
                await transaction.execute(_DELETE, values)
            else:
                await transaction.execute(_DELETE_AT_ISSUER, {**values, "issuer": issuer})

    async def bound_issuer(self, server: str, client_id: str) -> str | None:
        """Return the issuer that ``bind_client`` has bound a configured client to; None if it was never used."""
        asked: Columns = {"server": server, "client_id": client_id}
        return await self._issuer(await self._engine.fetch_all(_BOUND, asked), asked)

    async def bindings(self) -> list[ClientBinding]:
        """Return the issuers of all configured clients that were used."""
        rows = await intact_rows(self._engine, _BINDINGS, await self._engine.fetch_all(_ALL_BOUND), {})
        return [ClientBinding(row["server"], row["client_id"], row["issuer"]) for row in rows]

    async def bind_client(self, server: str, client_id: str, issuer: str) -> str:
        """Bind a configured client to ``issuer`` unless it is bound, and return the issuer that it is bound to.

        A client is bound to the first issuer that it was used with. Its secret must not be sent to another.
        """
        async with self._engine.transaction() as transaction:
            return await self.bind_within(transaction, ClientBinding(server, client_id, issuer))

    async def bind_within(self, transaction: Transaction, binding: ClientBinding) -> str:
        """Bind a configured client as ``bind_client`` does, within a transaction."""
        uid, columns = new_uid(), binding._asdict()
        asked: Columns = {"server": binding.server, "client_id": binding.client_id}
        bound = await self._issuer(await transaction.execute(_BOUND, asked), asked)
        if bound is None:
            seal = RowCipher(self._engine.cipher, _BINDINGS, uid).seal_row(columns)
            await transaction.execute(_BIND, {"uid": uid, **columns, SEAL: seal})
        return bound or binding.issuer

    async def _issuer(self, bindings: list[Row], asked: Columns) -> str | None:
        return next((str(row["issuer"]) for row in await intact_rows(self._engine, _BINDINGS, bindings, asked)), None)
