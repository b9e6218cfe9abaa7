"""The authorizations that wait for a user, and the visits of browsers to them."""

from mcp_auth_proxy.models import Account, Attempt, Flow, FlowStatus
from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.codec import (
    RowCipher,
    attempt_columns,
    decode_rows,
    flow_columns,
    new_uid,
    read_attempt,
    read_flow,
)
from mcp_auth_proxy.store.database import Database, Row

KEPT_ATTEMPTS = 20
"""How many visits of browsers one flow remembers: the newest."""

KEPT_SECONDS = 3600.0
"""How long a flow stays after its time, so that its link can still say what became of it."""

CANCELLED = "The authorization was cancelled."

_SAVE = """
    INSERT INTO flows (
        uid, id, principal, server, resource, issuer, client_id, client_auth, client_kind, client_secret,
        client_redirect_uri, client_secret_expires_at, client_created_at, authorization_endpoint, token_endpoint,
        revocation_endpoint, scopes, redirect_uri, iss_supported, extra_params, created_at, expires_at, status, reason,
        device, dpop_key, upstream
    ) VALUES (
        :uid, :id, :principal, :server, :resource, :issuer, :client_id, :client_auth, :client_kind, :client_secret,
        :client_redirect_uri, :client_secret_expires_at, :client_created_at, :authorization_endpoint, :token_endpoint,
        :revocation_endpoint, :scopes, :redirect_uri, :iss_supported, :extra_params, :created_at, :expires_at, :status,
        :reason, :device, :dpop_key, :upstream
    )
    ON CONFLICT (id) DO UPDATE SET
        uid = excluded.uid, principal = excluded.principal, server = excluded.server, resource = excluded.resource,
        issuer = excluded.issuer, client_id = excluded.client_id, client_auth = excluded.client_auth,
        client_kind = excluded.client_kind, client_secret = excluded.client_secret,
        client_redirect_uri = excluded.client_redirect_uri,
        client_secret_expires_at = excluded.client_secret_expires_at, client_created_at = excluded.client_created_at,
        authorization_endpoint = excluded.authorization_endpoint, token_endpoint = excluded.token_endpoint,
        revocation_endpoint = excluded.revocation_endpoint, scopes = excluded.scopes,
        redirect_uri = excluded.redirect_uri, iss_supported = excluded.iss_supported,
        extra_params = excluded.extra_params, created_at = excluded.created_at, expires_at = excluded.expires_at,
        status = excluded.status, reason = excluded.reason, device = excluded.device,
        dpop_key = excluded.dpop_key, upstream = excluded.upstream
"""
_FORGET_OLD_ATTEMPTS = """
    DELETE FROM attempts WHERE flow_id = :flow_id AND state_hash NOT IN (
        SELECT state_hash FROM attempts WHERE flow_id = :flow_id ORDER BY created_at DESC, state_hash LIMIT :kept
    )
"""
# A selection, so that a flow purged meanwhile means "not added" and not an error.
_ADD_ATTEMPT = """
    INSERT INTO attempts (uid, state_hash, flow_id, browser_hash, code_verifier, created_at, expires_at)
    SELECT :uid, :state_hash, id, :browser_hash, :code_verifier, :created_at, :expires_at
    FROM flows WHERE id = :flow_id AND status = 'pending'
    RETURNING state_hash
"""
_TAKE_ATTEMPT = """
    DELETE FROM attempts WHERE state_hash = :state_hash AND expires_at > :now AND flow_id IN (
        SELECT id FROM flows WHERE status = 'pending' AND expires_at > :now
    )
    RETURNING *
"""
_END_ONE = "UPDATE flows SET status = :status, reason = :reason WHERE id = :id AND status = 'pending' RETURNING id"
_END_ALL = """
    UPDATE flows SET status = 'failed', reason = :reason
    WHERE principal = :principal AND server = :server AND status <> 'failed'
    RETURNING id
"""

_CLAIM_POLL = """
    UPDATE flows SET poll_owner = :owner, next_poll_at = :next_poll_at WHERE id = :id AND status = 'pending'
    RETURNING id
"""


class Flows:
    """The flows of the store. Every method raises StoreUnavailable when the store can't be used now."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, flow: Flow) -> None:
        """Stores a flow, in the place of one with the same id."""
        uid = new_uid()
        columns = flow_columns(flow, RowCipher(self._database.cipher, "flows", uid))
        async with self._database.transaction() as transaction:
            await transaction.execute(_SAVE, {"uid": uid, **columns})

    async def get(self, flow_id: str) -> Flow | None:
        """One flow, however far it has come; None when it is gone or does not open."""
        return self._flow(await self._database.fetch_all("SELECT * FROM flows WHERE id = ?", (flow_id,)))

    async def live(self, account: Account, now: float) -> Flow | None:
        """The newest flow that still waits for its user, or None."""
        return self._flow(
            await self._database.fetch_all(
                "SELECT * FROM flows WHERE principal = ? AND server = ? AND status = 'pending' AND expires_at > ? "
                "ORDER BY created_at DESC",
                (account.principal, account.server, now),
            )
        )

    async def devices(self, now: float) -> list[Flow]:
        """The flows that still wait for a user on another device, oldest first."""
        rows = await self._database.fetch_all(
            "SELECT * FROM flows WHERE device IS NOT NULL AND status = 'pending' AND expires_at > ? "
            "ORDER BY created_at",
            (now,),
        )
        return decode_rows(self._database, "flows", rows, read_flow)

    async def claim_poll(self, flow_id: str, *, owner: str, now: float, next_poll_at: float) -> bool:
        """Makes ``owner`` (of ``lease.new_owner``) the one process that polls for a flow, until ``next_poll_at``.

        False when the flow is no longer pending, or another process that is still alive polls: a device code that
        is sent once more after it has brought tokens ends the grant at some servers.
        """
        async with self._database.transaction() as transaction:
            row = await transaction.fetch_one(
                "SELECT poll_owner, next_poll_at FROM flows WHERE id = ? AND status = 'pending' AND expires_at > ?",
                (flow_id, now),
            )
            if row is None:
                return False
            holder = row["poll_owner"]
            if holder and holder != owner and lease.is_held(holder, row["next_poll_at"], now):
                return False
            values = {"id": flow_id, "owner": owner, "next_poll_at": next_poll_at}
            return bool(await transaction.execute(_CLAIM_POLL, values))

    async def add_attempt(self, attempt: Attempt) -> bool:
        """Remembers a visit of a browser; the oldest beyond KEPT_ATTEMPTS are forgotten.

        False when the flow is gone or no longer pending.
        """
        uid = new_uid()
        columns = attempt_columns(attempt, RowCipher(self._database.cipher, "attempts", uid))
        async with self._database.transaction() as transaction:
            await transaction.execute(_FORGET_OLD_ATTEMPTS, {"flow_id": attempt.flow_id, "kept": KEPT_ATTEMPTS - 1})
            return bool(await transaction.execute(_ADD_ATTEMPT, {"uid": uid, **columns}))

    async def take_attempt(self, state_hash: str, now: float) -> tuple[Flow, Attempt] | None:
        """Uses up the attempt of a state, so that it is given out once in its life.

        None when it is unknown, used or expired, or its flow is no longer pending.
        """
        async with self._database.transaction() as transaction:
            taken = await transaction.execute(_TAKE_ATTEMPT, {"state_hash": state_hash, "now": now})
            if not taken:
                return None
            rows = await transaction.execute("SELECT * FROM flows WHERE id = ?", (taken[0]["flow_id"],))
        return self._pair(rows, taken)

    async def find_attempt(self, state_hash: str) -> tuple[Flow, Attempt] | None:
        """The attempt of a state that was not used, and its flow, whatever their age; nothing is used up."""
        attempts = await self._database.fetch_all("SELECT * FROM attempts WHERE state_hash = ?", (state_hash,))
        if not attempts:
            return None
        rows = await self._database.fetch_all("SELECT * FROM flows WHERE id = ?", (attempts[0]["flow_id"],))
        return self._pair(rows, attempts)

    async def finish(self, flow_id: str, status: FlowStatus, reason: str = "") -> bool:
        """Ends a pending flow and forgets its attempts; False when it was not pending."""
        async with self._database.transaction() as transaction:
            ended = await transaction.execute(_END_ONE, {"id": flow_id, "status": str(status), "reason": reason})
            if ended:
                await transaction.execute("DELETE FROM attempts WHERE flow_id = ?", (flow_id,))
        return bool(ended)

    async def cancel(self, account: Account) -> None:
        """Ends all flows of a principal for a server: no grant can come from them any more (``Grants.add_from``).

        Those that are done too: a second browser may be finishing one of them.
        """
        values = {"principal": account.principal, "server": account.server, "reason": CANCELLED}
        async with self._database.transaction() as transaction:
            for row in await transaction.execute(_END_ALL, values):
                await transaction.execute("DELETE FROM attempts WHERE flow_id = ?", (row["id"],))

    async def purge(self, now: float) -> None:
        """Deletes attempts whose time is over, and flows KEPT_SECONDS after theirs."""
        async with self._database.transaction() as transaction:
            await transaction.execute("DELETE FROM attempts WHERE expires_at <= ?", (now,))
            await transaction.execute("DELETE FROM flows WHERE expires_at <= ?", (now - KEPT_SECONDS,))

    def _flow(self, rows: list[Row]) -> Flow | None:
        return next(iter(decode_rows(self._database, "flows", rows, read_flow)), None)

    def _pair(self, flows: list[Row], attempts: list[Row]) -> tuple[Flow, Attempt] | None:
        flow = self._flow(flows)
        attempt = next(iter(decode_rows(self._database, "attempts", attempts, read_attempt)), None)
        return (flow, attempt) if flow and attempt else None
