"""The grants: one row for each (principal, server, resource, issuer), renewed under a fencing version.

A refresh is written down before it is sent (``begin_refresh``) and its result with it (``renewed``); both
name the version they start from, so whoever comes late changes nothing.
"""

from dataclasses import replace

from mcp_auth_proxy.models import Account, Grant, TokenSet
from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.codec import RowCipher, decode_rows, grant_columns, new_uid, read_grant, token_columns
from mcp_auth_proxy.store.database import Database, Row, Transaction

SUPERSEDED = "A newer authorization took its place."

_TABLE = "grants"
_ADD = """
    INSERT INTO grants (
        uid, principal, server, resource, issuer, grant_type, client_id, client_auth, client_kind, client_secret,
        client_redirect_uri, client_secret_expires_at, client_created_at, authorization_endpoint, token_endpoint,
        revocation_endpoint, access_token, refresh_token, token_type, token_scopes, obtained_at, expires_at, scopes,
        granted_at, dpop_key, upstream, version
    ) VALUES (
        :uid, :principal, :server, :resource, :issuer, :grant_type, :client_id, :client_auth, :client_kind,
        :client_secret, :client_redirect_uri, :client_secret_expires_at, :client_created_at, :authorization_endpoint,
        :token_endpoint, :revocation_endpoint, :access_token, :refresh_token, :token_type, :token_scopes, :obtained_at,
        :expires_at, :scopes, :granted_at, :dpop_key, :upstream, :version
    )
    ON CONFLICT (principal, server, resource, issuer) DO UPDATE SET
        uid = excluded.uid, grant_type = excluded.grant_type, client_id = excluded.client_id,
        client_auth = excluded.client_auth, client_kind = excluded.client_kind, client_secret = excluded.client_secret,
        client_redirect_uri = excluded.client_redirect_uri,
        client_secret_expires_at = excluded.client_secret_expires_at, client_created_at = excluded.client_created_at,
        authorization_endpoint = excluded.authorization_endpoint, token_endpoint = excluded.token_endpoint,
        revocation_endpoint = excluded.revocation_endpoint, access_token = excluded.access_token,
        refresh_token = excluded.refresh_token, token_type = excluded.token_type, token_scopes = excluded.token_scopes,
        obtained_at = excluded.obtained_at, expires_at = excluded.expires_at, scopes = excluded.scopes,
        granted_at = excluded.granted_at, dpop_key = excluded.dpop_key, upstream = excluded.upstream,
        version = grants.version + 1, refresh_begun_at = NULL, refresh_owner = '', ended_at = NULL, ended_reason = ''
    RETURNING id, version
"""
_SUPERSEDE = """
    UPDATE grants SET ended_at = :now, ended_reason = :reason, refresh_begun_at = NULL, refresh_owner = ''
    WHERE principal = :principal AND server = :server AND id <> :id AND ended_at IS NULL
"""
# Not only where it is pending: two browsers may finish the same link, and the later consent counts.
_FINISH = "UPDATE flows SET status = 'done' WHERE id = :id AND status <> 'failed' RETURNING id"
_BEGIN = """
    UPDATE grants SET refresh_begun_at = :now, refresh_owner = :owner
    WHERE id = :id AND version = :version AND refresh_owner = :seen AND ended_at IS NULL
    RETURNING id
"""
_HELD = """
    SELECT * FROM grants WHERE id = :id AND version = :version AND refresh_owner = :owner AND ended_at IS NULL
"""
_RENEW = """
    UPDATE grants SET
        access_token = :access_token, refresh_token = :refresh_token, token_type = :token_type,
        token_scopes = :token_scopes, obtained_at = :obtained_at, expires_at = :expires_at,
        version = version + 1, refresh_begun_at = NULL, refresh_owner = ''
    WHERE id = :id AND version = :version AND refresh_owner = :owner AND ended_at IS NULL
    RETURNING *
"""
_RELEASE = """
    UPDATE grants SET refresh_begun_at = NULL, refresh_owner = ''
    WHERE id = :id AND version = :version AND refresh_owner = :owner
"""
_END = """
    UPDATE grants SET ended_at = :now, ended_reason = :reason, refresh_begun_at = NULL, refresh_owner = ''
    WHERE id = :id AND version = :version AND ended_at IS NULL
    RETURNING id
"""


class Grants:
    """The grants of the store. Every method raises StoreUnavailable when the store can't be used now."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def current(self, account: Account) -> Grant | None:
        """The newest grant that has not ended, or None."""
        rows = await self._database.fetch_all(
            "SELECT * FROM grants WHERE principal = ? AND server = ? AND ended_at IS NULL "
            "ORDER BY granted_at DESC, id DESC",
            (account.principal, account.server),
        )
        return next(iter(self._read(rows)), None)

    async def get(self, grant_id: int) -> Grant | None:
        """One grant, ended or not; None when it is gone or does not open."""
        rows = await self._database.fetch_all("SELECT * FROM grants WHERE id = ?", (grant_id,))
        return next(iter(self._read(rows)), None)

    async def all(self) -> list[Grant]:
        """Every grant that opens, ended ones too, oldest first."""
        return self._read(await self._database.fetch_all("SELECT * FROM grants ORDER BY granted_at, id"))

    async def add(self, grant: Grant) -> Grant:
        """Stores a grant that was just given, durably; returns it with its id and version.

        It takes the place of one with the same key, whose version it goes on from; other grants of the same
        principal and server end.
        """
        async with self._database.transaction() as transaction:
            return await self._add(transaction, grant)

    async def add_from(self, grant: Grant, flow_id: str) -> Grant | None:
        """As ``add``, and ends the flow that brought the grant; both or neither.

        None, and nothing is stored, where the flow was cancelled meanwhile, or has failed or is gone.
        """
        async with self._database.transaction() as transaction:
            if not await transaction.execute(_FINISH, {"id": flow_id}):
                return None
            await transaction.execute("DELETE FROM attempts WHERE flow_id = ?", (flow_id,))
            return await self._add(transaction, grant)

    async def _add(self, transaction: Transaction, grant: Grant) -> Grant:
        uid = new_uid()
        columns = grant_columns(grant, RowCipher(self._database.cipher, _TABLE, uid))
        (row,) = await transaction.execute(_ADD, {"uid": uid, **columns})
        await transaction.execute(
            _SUPERSEDE,
            {
                "id": row["id"],
                "principal": grant.key.account.principal,
                "server": grant.key.account.server,
                "now": grant.granted_at,
                "reason": SUPERSEDED,
            },
        )
        return replace(
            grant,
            id=row["id"],
            version=row["version"],
            refresh_begun_at=None,
            refresh_owner="",
            ended_at=None,
            ended_reason="",
        )

    async def begin_refresh(self, grant_id: int, *, version: int, owner: str, now: float) -> bool:
        """Writes down that a refresh is about to be sent. ``owner`` comes from ``lease.new_owner``.

        False when the grant has moved on from this version, has ended or is gone, or another owner that is still
        alive has begun one.
        """
        async with self._database.transaction() as transaction:
            row = await transaction.fetch_one(
                "SELECT refresh_begun_at, refresh_owner FROM grants WHERE id = ? AND version = ? AND ended_at IS NULL",
                (grant_id, version),
            )
            if row is None:
                return False
            begun_at, holder = row["refresh_begun_at"], row["refresh_owner"]
            if begun_at is not None and holder != owner and lease.is_held(holder, begun_at, now):
                return False
            values = {"id": grant_id, "version": version, "owner": owner, "now": now, "seen": holder}
            return bool(await transaction.execute(_BEGIN, values))

    async def renewed(self, grant_id: int, *, version: int, owner: str, tokens: TokenSet) -> Grant | None:
        """Stores the result of a refresh, durably. None when another has taken over, or the grant ended meanwhile."""
        values: dict[str, object] = {"id": grant_id, "version": version, "owner": owner}
        async with self._database.transaction() as transaction:
            row = await transaction.fetch_one(_HELD, values)
            if row is None:
                return None
            columns = token_columns(tokens, RowCipher(self._database.cipher, _TABLE, row["uid"]))
            rows = await transaction.execute(_RENEW, {**values, **columns})
        return next(iter(self._read(rows)), None)

    async def release_refresh(self, grant_id: int, *, version: int, owner: str) -> None:
        """Takes back ``begin_refresh``: it is known that the refresh was not processed."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_RELEASE, {"id": grant_id, "version": version, "owner": owner})

    async def end(self, grant_id: int, *, version: int, reason: str, now: float) -> bool:
        """Ends a grant; the row stays so that the reason can be shown. False when it has moved on or ended."""
        values = {"id": grant_id, "version": version, "reason": reason, "now": now}
        async with self._database.transaction() as transaction:
            return bool(await transaction.execute(_END, values))

    async def delete(self, account: Account) -> list[Grant]:
        """Deletes all grants of a principal for a server, also those that do not open; returns those that do."""
        async with self._database.transaction() as transaction:
            rows = await transaction.execute(
                "DELETE FROM grants WHERE principal = ? AND server = ? RETURNING *", (account.principal, account.server)
            )
        return self._read(rows)

    def _read(self, rows: list[Row]) -> list[Grant]:
        return decode_rows(self._database, _TABLE, rows, read_grant)
