"""Grants: one row for each (account, resource, issuer), with a fencing version that every renewal increments.

A refresh is recorded before it is sent (``begin_refresh``), and so is its result (``renewed``). Both name the version
that they start from, so a process that comes late changes nothing.
"""

from dataclasses import replace

from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.models import HEALTHY, Account, FlowStatus, Grant, GrantKey, RenewalHealth, TokenSet
from mcp_auth_proxy.store.codec import (
    account_params,
    grant_columns,
    health_columns,
    key_columns,
    read_grant,
    token_columns,
)
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.lease import ABANDONED
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, change_row, decode_rows, intact_rows, new_uid

SUPERSEDED = "A newer authorization has replaced it."

_TABLE = "grants"
_UNIQUE = ("principal", "account", "server", "resource", "issuer")
_NO_REFRESH = {"refresh_begun_at": None, "refresh_owner": ""}
_ADD = """
    INSERT INTO grants (
        uid, principal, account, server, resource, issuer, grant_type, client_id, client_auth, client_kind,
        client_secret, client_redirect_uri, client_secret_expires_at, client_created_at, authorization_endpoint,
        token_endpoint, revocation_endpoint, access_token, refresh_token, token_type, token_scopes, obtained_at,
        expires_at, scopes, granted_at, dpop_key, upstream, path, version, ended_at, ended_reason, label, oauth_client,
        refresh_expires_at, renewal_refused_at, failing_since, renewal_failure, next_try_at, rejected_since
    ) VALUES (
        :uid, :principal, :account, :server, :resource, :issuer, :grant_type, :client_id, :client_auth, :client_kind,
        :client_secret, :client_redirect_uri, :client_secret_expires_at, :client_created_at, :authorization_endpoint,
        :token_endpoint, :revocation_endpoint, :access_token, :refresh_token, :token_type, :token_scopes, :obtained_at,
        :expires_at, :scopes, :granted_at, :dpop_key, :upstream, :path, :version, :ended_at, :ended_reason, :label,
        :oauth_client, :refresh_expires_at, :renewal_refused_at, :failing_since, :renewal_failure, :next_try_at,
        :rejected_since
    )
    ON CONFLICT (principal, account, server, resource, issuer) DO UPDATE SET
        uid = excluded.uid, grant_type = excluded.grant_type, client_id = excluded.client_id,
        client_auth = excluded.client_auth, client_kind = excluded.client_kind, client_secret = excluded.client_secret,
        client_redirect_uri = excluded.client_redirect_uri,
        client_secret_expires_at = excluded.client_secret_expires_at, client_created_at = excluded.client_created_at,
        authorization_endpoint = excluded.authorization_endpoint, token_endpoint = excluded.token_endpoint,
        revocation_endpoint = excluded.revocation_endpoint, access_token = excluded.access_token,
        refresh_token = excluded.refresh_token, token_type = excluded.token_type, token_scopes = excluded.token_scopes,
        obtained_at = excluded.obtained_at, expires_at = excluded.expires_at, scopes = excluded.scopes,
        granted_at = excluded.granted_at, dpop_key = excluded.dpop_key, upstream = excluded.upstream,
        path = excluded.path, version = excluded.version, refresh_begun_at = NULL, refresh_owner = '',
        ended_at = excluded.ended_at, ended_reason = excluded.ended_reason, label = excluded.label,
        oauth_client = excluded.oauth_client, refresh_expires_at = excluded.refresh_expires_at,
        renewal_refused_at = excluded.renewal_refused_at, failing_since = excluded.failing_since,
        renewal_failure = excluded.renewal_failure, next_try_at = excluded.next_try_at,
        rejected_since = excluded.rejected_since
    RETURNING id
"""
# The seal covers the id, which is known only now.
_SEAL = "UPDATE grants SET seal = :seal WHERE uid = :uid"
_SAME = """
    SELECT * FROM grants
    WHERE principal = :principal AND account = :account AND server = :server AND resource = :resource
        AND issuer = :issuer
"""
_DELETE_SAME = """
    DELETE FROM grants
    WHERE principal = :principal AND account = :account AND server = :server AND resource = :resource
        AND issuer = :issuer
"""
_OTHERS = """
    SELECT * FROM grants
    WHERE principal = :principal AND server = :server AND account = :account AND id <> :id AND ended_at IS NULL
"""
# Also a flow that is done already: two browsers may finish the same link, and the later consent counts.
_FLOW = "SELECT * FROM flows WHERE id = :id AND status <> 'failed'"
_BY_ID = "SELECT * FROM grants WHERE id = :id"
_ALL = "SELECT * FROM grants ORDER BY granted_at, id"
_INTERRUPTED = """
    SELECT principal, server, account, refresh_owner, refresh_begun_at FROM grants
    WHERE refresh_begun_at IS NOT NULL AND ended_at IS NULL
"""
_CURRENT = """
    SELECT * FROM grants
    WHERE principal = :principal AND server = :server AND account = :account AND ended_at IS NULL
    ORDER BY granted_at DESC, id DESC
"""
_OF_ACCOUNT = "SELECT * FROM grants WHERE principal = :principal AND server = :server AND account = :account"
_ACCOUNT_NAMES = """
    SELECT DISTINCT account FROM grants
    WHERE principal = :principal AND server = :server AND ended_at IS NULL LIMIT :count
"""
_OTHER_ACCOUNT = """
    SELECT * FROM grants
    WHERE principal = :principal AND server = :server AND account <> :account AND ended_at IS NULL LIMIT 1
"""
_OF_ISSUER = "SELECT * FROM grants WHERE issuer = :issuer AND ended_at IS NULL ORDER BY id"
_OF_OAUTH_CLIENT = "SELECT * FROM grants WHERE oauth_client = :oauth_client AND ended_at IS NULL ORDER BY id"
_DELETE = "DELETE FROM grants WHERE principal = :principal AND server = :server AND account = :account RETURNING *"
_LIVE = "SELECT * FROM grants WHERE id = :id AND version = :version AND ended_at IS NULL"
# What was seen must still be there: a database server may have let another transaction write in between.
_BEGIN = """
    UPDATE grants SET refresh_begun_at = :now, refresh_owner = :owner
    WHERE id = :id AND version = :version AND ended_at IS NULL
        AND refresh_owner = :seen AND coalesce(refresh_begun_at, 0.0) = :seen_at
    RETURNING id
"""
_HELD = """
    SELECT * FROM grants WHERE id = :id AND version = :version AND refresh_owner = :owner AND ended_at IS NULL
"""
_RELEASE = """
    UPDATE grants SET refresh_begun_at = NULL, refresh_owner = ''
    WHERE id = :id AND version = :version AND refresh_owner = :owner
"""


class Grants:
    """The grants in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.owners = engine.owners

    async def current(self, account: Account) -> Grant | None:
        """Return the newest grant that has not ended, or None."""
        asked = account_params(account)
        return next(iter(await self._read(await self._engine.fetch_all(_CURRENT, asked), asked)), None)

    async def get(self, grant_id: int) -> Grant | None:
        """Return a grant, ended or not; None if it is gone or can't be decrypted."""
        asked: Columns = {"id": grant_id}
        return next(iter(await self._read(await self._engine.fetch_all(_BY_ID, asked), asked)), None)

    async def all(self) -> list[Grant]:
        """Return every grant that can be decrypted, ended ones too, oldest first."""
        return await self._read(await self._engine.fetch_all(_ALL), {})

    async def has_other_account(self, account: Account) -> bool:
        """Return whether the principal has a grant for another account of the server, which has not ended."""
        asked: Columns = {"principal": account.principal, "server": account.server}
        return bool(
            await self._intact(await self._engine.fetch_all(_OTHER_ACCOUNT, {**asked, "account": account.name}), asked)
        )

    async def account_names(self, principal: str, server: str, *, count: int) -> set[str]:
        """Return at most ``count`` accounts of a principal at a server that have a grant, which has not ended."""
        values = {"principal": principal, "server": server, "count": count}
        return {row["account"] for row in await self._engine.fetch_all(_ACCOUNT_NAMES, values)}

    async def interrupted(self, now: float, *, settled: bool = True) -> tuple[dict[Account, float], bool]:
        """Return the accounts with a refresh that a dead process has begun and not ended, each with its begin.

        Also return whether other refreshes are under way: their processes may die. ``settled``: see
        ``Owners.may_refresh``.
        """
        dead: dict[Account, float] = {}
        rows = await self._engine.fetch_all(_INTERRUPTED)
        for row in rows:
            begun_at = row["refresh_begun_at"]
            holder = row["refresh_owner"]
            if self.owners.may_refresh(holder, begun_at, owner="", now=now, needed=False, settled=settled):
                dead[Account(row["principal"], row["server"], row["account"])] = begun_at
        return dead, len(dead) < len(rows)

    async def servers_of_issuer(self, issuer: str) -> list[GrantKey]:
        """Return the keys of all grants of an issuer that have not ended, whoever's and for whichever server."""
        asked: Columns = {"issuer": issuer}
        return [grant.key for grant in await self._read(await self._engine.fetch_all(_OF_ISSUER, asked), asked)]

    async def of_oauth_client(self, client_id: str) -> list[Grant]:
        """Return the grants of a client of the API that have not ended."""
        asked: Columns = {"oauth_client": client_id}
        return await self._read(await self._engine.fetch_all(_OF_OAUTH_CLIENT, asked), asked)

    async def add(self, grant: Grant) -> Grant:
        """Store a new grant durably, and return it with its id and version.

        It replaces a grant with the same key, and its version then continues from that one's. Other grants of the
        same account end.
        """
        async with self._engine.transaction() as transaction:
            return await self._add(transaction, grant)

    async def add_from(self, grant: Grant, flow_id: str) -> Grant | None:
        """Store a new grant as ``add`` does, and end the flow that it came from, in one transaction.

        Return None, and store nothing, if the flow was cancelled meanwhile, has failed or is gone.
        """
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": flow_id}
            flows = await intact_rows(self._engine, "flows", await transaction.execute(_FLOW, asked), asked)
            if not flows:
                return None
            await change_row(self._engine, transaction, "flows", flows[0], {"status": str(FlowStatus.DONE)})
            await transaction.execute("DELETE FROM attempts WHERE flow_id = :id", {"id": flow_id})
            return await self._add(transaction, grant)

    async def add_within(self, transaction: Transaction, grant: Grant) -> Grant:
        """Store a new grant as ``add`` does, within a transaction."""
        return await self._add(transaction, grant)

    async def current_within(self, transaction: Transaction, account: Account) -> Grant | None:
        """Return what ``current`` does, within a transaction."""
        asked = account_params(account)
        return next(iter(await self._read(await transaction.execute(_CURRENT, asked), asked)), None)

    async def _add(self, transaction: Transaction, grant: Grant) -> Grant:
        key = key_columns(grant.key)
        same = {name: key[name] for name in _UNIQUE}
        before = await self._intact(await transaction.execute(_SAME, same), same)
        if before:
            grant = replace(grant, version=before[0]["version"] + 1)
        else:
            # A row that is not as it was sealed must not lend its id and version to the new one.
            await transaction.execute(_DELETE_SAME, same)
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns = grant_columns(grant, cipher)
        rows = await transaction.execute(_ADD, {"uid": uid, **columns})
        if not rows:
            raise StoreUnavailable("The store has not kept a new grant: a trigger of somebody else is in its way.")
        row = rows[0]
        columns["id"] = row["id"]
        await transaction.execute(_SEAL, {"uid": uid, SEAL: cipher.seal_row(columns)})
        asked = account_params(grant.key.account)
        for other in await self._intact(await transaction.execute(_OTHERS, {**asked, "id": row["id"]}), asked):
            await self._end(transaction, other, now=grant.granted_at, reason=SUPERSEDED)
        return replace(grant, id=row["id"], refresh_begun_at=None, refresh_owner="", ended_at=None, ended_reason="")

    def may_begin_refresh(
        self, grant: Grant, *, owner: str, now: float, needed: bool = True, settled: bool = True
    ) -> bool:
        """Return whether ``begin_refresh`` is worth a try, as far as the grant tells that was just read."""
        return self.owners.may_refresh(
            grant.refresh_owner, grant.refresh_begun_at, owner=owner, now=now, needed=needed, settled=settled
        )

    async def begin_refresh(
        self, grant_id: int, *, version: int, owner: str, now: float, needed: bool = True, settled: bool = True
    ) -> bool:
        """Record that a refresh is about to be sent. ``owner`` comes from ``owners.new``, ``now`` is Unix seconds.

        Return False if the grant has another version by now, has ended or is gone, or if another owner has begun a
        refresh: see ``Owners.may_refresh``, also for ``needed`` and ``settled``.
        """
        self.owners.appear()
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": grant_id, "version": version}
            rows = await self._intact(await transaction.execute(_LIVE, asked), asked)
            if not rows:
                return False
            row = rows[0]
            begun_at, holder = row["refresh_begun_at"], row["refresh_owner"]
            if not self.owners.may_refresh(holder, begun_at, owner=owner, now=now, needed=needed, settled=settled):
                return False
            seen = {"seen": holder, "seen_at": begun_at or 0.0}
            begun = await transaction.execute(
                _BEGIN, {"id": grant_id, "version": version, "owner": owner, "now": now, **seen}
            )
        if begun:
            self.owners.took(_lease(grant_id))
        return bool(begun)

    async def renewed(self, grant_id: int, *, version: int, owner: str, tokens: TokenSet) -> Grant | None:
        """Store the result of a refresh durably. Return None if another owner took over or the grant has ended."""
        values: dict[str, object] = {"id": grant_id, "version": version, "owner": owner}
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": grant_id, "version": version}
            rows = await self._intact(await transaction.execute(_HELD, values), asked)
            if not rows:
                return None
            columns = token_columns(tokens, RowCipher(self._engine.cipher, _TABLE, rows[0]["uid"]))
            changes = {**columns, **health_columns(HEALTHY), "version": version + 1, **_NO_REFRESH}
            await change_row(self._engine, transaction, _TABLE, rows[0], changes)
            rows = await transaction.execute(_BY_ID, {"id": grant_id})
        self.owners.gave_back(_lease(grant_id))
        return next(iter(await self._read(rows, {"id": grant_id})), None)

    async def release_refresh(self, grant_id: int, *, version: int, owner: str) -> None:
        """Undo ``begin_refresh`` after a refresh that is known not to have been processed."""
        async with self._engine.transaction() as transaction:
            await transaction.execute(_RELEASE, {"id": grant_id, "version": version, "owner": owner})
        self.owners.gave_back(_lease(grant_id))

    async def note_failure(self, grant_id: int, *, version: int, owner: str, health: RenewalHealth, keep: bool) -> bool:
        """Store why a refresh that was begun has failed, and let others begin one.

        ``keep``: it may have been processed, so its intent stays. Return False if another owner took over or the grant
        has ended.
        """
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": grant_id, "version": version}
            rows = await self._intact(await transaction.execute(_HELD, {**asked, "owner": owner}), asked)
            for row in rows:
                changes = {**health_columns(health), **_NO_REFRESH}
                if keep:
                    changes |= {"refresh_begun_at": row["refresh_begun_at"], "refresh_owner": owner + ABANDONED}
                await change_row(self._engine, transaction, _TABLE, row, changes)
        if not keep:
            self.owners.gave_back(_lease(grant_id))
        return bool(rows)

    async def note_refusal(self, grant_id: int, *, version: int, owner: str, health: RenewalHealth) -> Grant | None:
        """Store that a refresh was refused though the token works. The version is a new one, for other processes.

        Return the grant; None if another owner took over or the grant has ended.
        """
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": grant_id, "version": version}
            rows = await self._intact(await transaction.execute(_HELD, {**asked, "owner": owner}), asked)
            if not rows:
                return None
            changes = {**health_columns(health), "version": version + 1, **_NO_REFRESH}
            await change_row(self._engine, transaction, _TABLE, rows[0], changes)
            rows = await transaction.execute(_BY_ID, {"id": grant_id})
        return next(iter(await self._read(rows, {"id": grant_id})), None)

    async def end(self, grant_id: int, *, version: int, reason: str, now: float) -> bool:
        """End a grant, keeping its row so that the reason can be shown.

        Return False if it has another version by now or has ended already.
        """
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": grant_id, "version": version}
            rows = await self._intact(await transaction.execute(_LIVE, asked), asked)
            for row in rows:
                await self._end(transaction, row, now=now, reason=reason)
        self.owners.gave_back(_lease(grant_id))
        return bool(rows)

    async def set_label(self, grant_id: int, label: str) -> None:
        """Store whose account a grant is for, unless it is gone."""
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": grant_id}
            for row in await self._intact(await transaction.execute(_BY_ID, asked), asked):
                await change_row(self._engine, transaction, _TABLE, row, {"label": label})

    async def assign(self, account: Account, principal: str) -> bool:
        """Give the grants of an account to another principal, under the same name of the account.

        Return False, and change nothing, if that principal has a grant for the account that has not ended; one that has
        ended is deleted.
        """
        target = Account(principal, account.server, account.name)
        async with self._engine.transaction() as transaction:
            asked = account_params(target)
            if await self._intact(await transaction.execute(_CURRENT, asked), asked):
                return False
            await transaction.execute(_DELETE, asked)
            given = account_params(account)
            for row in await self._intact(await transaction.execute(_OF_ACCOUNT, given), given):
                await change_row(self._engine, transaction, _TABLE, row, {"principal": principal, **_NO_REFRESH})
        return True

    async def delete(self, account: Account) -> list[Grant]:
        """Delete all grants of an account, and return those that can be decrypted."""
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(_DELETE, account_params(account))
        return await self._read(rows, account_params(account))

    async def delete_one(self, grant_id: int) -> Grant | None:
        """Delete a grant, and return it; None if it was gone or can't be decrypted."""
        asked: Columns = {"id": grant_id}
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute("DELETE FROM grants WHERE id = :id RETURNING *", asked)
        return next(iter(await self._read(rows, asked)), None)

    async def _end(self, transaction: Transaction, row: Row, *, now: float, reason: str) -> None:
        changes = {"ended_at": now, "ended_reason": reason, **_NO_REFRESH}
        await change_row(self._engine, transaction, _TABLE, row, changes)

    async def _intact(self, rows: list[Row], asked: Columns) -> list[Row]:
        return await intact_rows(self._engine, _TABLE, rows, asked)

    async def _read(self, rows: list[Row], asked: Columns) -> list[Grant]:
        return await decode_rows(self._engine, _TABLE, rows, asked, read_grant)


def _lease(grant_id: int) -> str:
    return f"refresh:{grant_id}"
