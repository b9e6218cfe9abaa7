"""Flows (authorizations that wait for a user) and attempts (a browser that has opened the link of one)."""

import hashlib
from collections.abc import Callable

from mcp_auth_proxy.models import HEADLESS_ATTEMPT, Account, Attempt, Flow, FlowStatus
from mcp_auth_proxy.store import leases
from mcp_auth_proxy.store.codec import account_params, attempt_columns, flow_columns, read_attempt, read_flow
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, change_row, decode_rows, intact_rows, new_uid

KEPT_ATTEMPTS = 500
"""The number of attempts that are kept for one flow: the oldest half, and the newest.

Others may open a link as often as they like, before its user does or after.
"""

KEPT_FLOWS = 20
"""The number of flows that are kept for one account; those that wait for their user are deleted last."""

KEPT_IN_ALL = 5000
"""The number of flows that are kept for all accounts together."""

KEPT_ATTEMPTS_IN_ALL = 20_000
"""The number of attempts that are kept for all flows together; the most visited flow loses its second oldest first."""

KEPT_SECONDS = 3600.0
"""Seconds that a flow is kept after it has expired, so that its link can still say how it ended."""

KEPT_UNANSWERED_SECONDS = 30 * 86_400.0
"""The same for the newest flow of an account that neither succeeded nor was cancelled: ``status`` still shows it."""

CANCELLED = "The authorization was cancelled."

_SAVE = """
    INSERT INTO flows (
        uid, id, principal, account, server, resource, issuer, client_id, client_auth, client_kind, client_secret,
        client_redirect_uri, client_secret_expires_at, client_created_at, authorization_endpoint, token_endpoint,
        revocation_endpoint, scopes, redirect_uri, iss_supported, extra_params, created_at, expires_at, status, reason,
        device, dpop_key, upstream, path, oauth_client, mode, return_origin, seal
    ) VALUES (
        :uid, :id, :principal, :account, :server, :resource, :issuer, :client_id, :client_auth, :client_kind,
        :client_secret, :client_redirect_uri, :client_secret_expires_at, :client_created_at, :authorization_endpoint,
        :token_endpoint, :revocation_endpoint, :scopes, :redirect_uri, :iss_supported, :extra_params, :created_at,
        :expires_at, :status, :reason, :device, :dpop_key, :upstream, :path, :oauth_client, :mode, :return_origin, :seal
    )
    ON CONFLICT (id) DO UPDATE SET
        uid = excluded.uid, principal = excluded.principal, account = excluded.account, server = excluded.server,
        resource = excluded.resource, issuer = excluded.issuer, client_id = excluded.client_id,
        client_auth = excluded.client_auth, client_kind = excluded.client_kind, client_secret = excluded.client_secret,
        client_redirect_uri = excluded.client_redirect_uri,
        client_secret_expires_at = excluded.client_secret_expires_at, client_created_at = excluded.client_created_at,
        authorization_endpoint = excluded.authorization_endpoint, token_endpoint = excluded.token_endpoint,
        revocation_endpoint = excluded.revocation_endpoint, scopes = excluded.scopes,
        redirect_uri = excluded.redirect_uri, iss_supported = excluded.iss_supported,
        extra_params = excluded.extra_params, created_at = excluded.created_at, expires_at = excluded.expires_at,
        status = excluded.status, reason = excluded.reason, device = excluded.device,
        dpop_key = excluded.dpop_key, upstream = excluded.upstream, path = excluded.path,
        oauth_client = excluded.oauth_client, mode = excluded.mode, return_origin = excluded.return_origin,
        seal = excluded.seal
"""
# The new one is kept whatever the times of the others are.
_FORGET_OLD_FLOWS = """
    DELETE FROM flows
    WHERE principal = :principal AND server = :server AND account = :account AND uid NOT IN (
        SELECT uid FROM flows WHERE principal = :principal AND server = :server AND account = :account
        ORDER BY uid = :uid DESC, (status = 'pending' AND expires_at > :now) DESC, created_at DESC LIMIT :kept
    )
"""
_FORGET_OLD_IN_ALL = """
    DELETE FROM flows
    WHERE (SELECT count(*) FROM flows) > :kept AND uid NOT IN (
        SELECT uid FROM flows
        ORDER BY uid = :uid DESC, (status = 'pending' AND expires_at > :now) DESC, created_at DESC LIMIT :kept
    )
"""
_FORGET_ATTEMPTS = """
    DELETE FROM attempts WHERE flow_id = :flow_id AND state_hash NOT IN (
        SELECT state_hash FROM attempts WHERE flow_id = :flow_id ORDER BY created_at, state_hash LIMIT :oldest
    ) AND state_hash NOT IN (
        SELECT state_hash FROM attempts WHERE flow_id = :flow_id ORDER BY created_at DESC, state_hash DESC LIMIT :newest
    )
"""
# Whoever visits one link again and again evicts neither its first visitor nor those of other links.
_FORGET_ONE_ATTEMPT = """
    DELETE FROM attempts WHERE (SELECT count(*) FROM attempts) >= :kept AND state_hash = (
        SELECT state_hash FROM attempts
        WHERE flow_id = (SELECT flow_id FROM attempts GROUP BY flow_id ORDER BY count(*) DESC LIMIT 1)
        ORDER BY created_at, state_hash LIMIT 1 OFFSET 1
    )
"""
# SELECT instead of VALUES, so that nothing is added, and nothing raised, if the flow was purged meanwhile.
_ADD_ATTEMPT = """
    INSERT INTO attempts (uid, state_hash, flow_id, browser_hash, code_verifier, created_at, expires_at, seal)
    SELECT :uid, :state_hash, id, :browser_hash, :code_verifier, :created_at, :expires_at, :seal
    FROM flows WHERE id = :flow_id AND status = 'pending'
    RETURNING state_hash
"""
_TAKE_ATTEMPT = """
    DELETE FROM attempts WHERE state_hash = :state_hash AND expires_at > :now AND flow_id IN (
        SELECT id FROM flows WHERE status = 'pending' AND expires_at > :now
    )
    RETURNING *
"""
_PENDING = "SELECT * FROM flows WHERE id = :id AND status = 'pending'"
_OF_ACCOUNT = """
    SELECT * FROM flows
    WHERE principal = :principal AND server = :server AND account = :account AND status <> 'failed'
"""
_BY_ID = "SELECT * FROM flows WHERE id = :id"
_LIVE = """
    SELECT * FROM flows
    WHERE principal = :principal AND server = :server AND account = :account
        AND status = 'pending' AND expires_at > :now
    ORDER BY created_at DESC
"""
_DONE = """
    SELECT * FROM flows WHERE principal = :principal AND server = :server AND account = :account AND status = 'done'
    ORDER BY created_at
"""
_DEVICES = """
    SELECT * FROM flows WHERE device IS NOT NULL AND status = 'pending' AND expires_at > :now ORDER BY created_at
"""
_OF_OAUTH_CLIENT = "SELECT * FROM flows WHERE oauth_client = :oauth_client AND status = 'pending' ORDER BY created_at"
_UNANSWERED = "SELECT * FROM flows WHERE status <> 'done' AND reason <> :cancelled ORDER BY created_at"
_NEWEST = """
    SELECT * FROM flows WHERE principal = :principal AND server = :server AND account = :account
    ORDER BY (status = 'pending' AND expires_at > :now) DESC, created_at DESC, uid DESC
"""
_FORGET_EXPIRED = """
    DELETE FROM flows
    WHERE expires_at <= :then AND (
        expires_at <= :long_ago OR status = 'done' OR reason = :cancelled OR uid NOT IN (
            SELECT uid FROM (
                SELECT uid, row_number() OVER (
                    PARTITION BY principal, server, account ORDER BY created_at DESC, uid DESC
                ) AS place FROM flows
            ) AS ranked WHERE place = 1
        )
    )
"""
_POLL = "SELECT * FROM flows WHERE id = :id AND status = 'pending' AND expires_at > :now"
_CLAIM_POLL = """
    UPDATE flows SET poll_owner = :owner, next_poll_at = :next_poll_at
    WHERE id = :id AND status = 'pending' AND poll_owner = :seen AND next_poll_at = :seen_at
    RETURNING id
"""
_VISITED = "SELECT state_hash FROM attempts WHERE flow_id = :id AND browser_hash <> :headless LIMIT 1"
_HEADLESS = "SELECT * FROM attempts WHERE flow_id = :flow_id AND browser_hash = :browser_hash"
_OF_SERVER = "SELECT * FROM flows WHERE principal = :principal AND server = :server ORDER BY created_at"
_ATTEMPT = "SELECT * FROM attempts WHERE state_hash = :state_hash"
_DELETE_ATTEMPTS = "DELETE FROM attempts WHERE flow_id = :id"


class Flows:
    """The flows in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.owners = engine.owners

    async def save(self, flow: Flow) -> None:
        """Store a flow; it replaces one with the same id. All but KEPT_FLOWS of its account are deleted."""
        async with self._engine.transaction() as transaction:
            await self._save(transaction, flow)

    async def _save(self, transaction: Transaction, flow: Flow) -> None:
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, "flows", uid)
        columns = flow_columns(flow, cipher)
        await transaction.execute(_SAVE, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})
        new = {"uid": uid, "now": flow.created_at}
        of_account = {**account_params(flow.key.account), **new, "kept": KEPT_FLOWS}
        await transaction.execute(_FORGET_OLD_FLOWS, of_account)
        await transaction.execute(_FORGET_OLD_IN_ALL, {**new, "kept": KEPT_IN_ALL})

    async def begin(self, flow: Flow, *, adopts: Callable[[Flow], bool], opened_by: str = "") -> Flow:
        """Store a new flow, unless its account has one that ``adopts`` accepts. Return that one, else the new one.

        Both happen in one transaction: of the processes that begin a flow in the same instant, one makes it.
        ``opened_by``: the owner that is about to open its link in a browser (``claim_window``); empty if nobody is.
        """
        asked = account_params(flow.key.account)
        async with self._engine.transaction() as transaction:
            await leases.lock(transaction, start_lease(flow.key.account))
            live = await transaction.execute(_LIVE, {**asked, "now": flow.created_at})
            for other in await decode_rows(self._engine, "flows", live, asked, read_flow):
                if adopts(other):
                    return other
            await self._save(transaction, flow)
            if opened_by:
                await self._claim_window(transaction, flow, opened_by, flow.created_at)
        return flow

    async def claim_window(self, flow: Flow, *, owner: str, now: float) -> bool:
        """Return whether ``owner`` (from ``Engine.owners``) may open the link of a flow in a browser.

        The first that asks may: so there is one window, however many processes have the link.
        """
        async with self._engine.transaction() as transaction:
            return await self._claim_window(transaction, flow, owner, now)

    async def _claim_window(self, transaction: Transaction, flow: Flow, owner: str, now: float) -> bool:
        """Claim the window of a flow for as long as its link can be used, unless the process that did it is dead."""
        longest, name = flow.expires_at - flow.created_at, f"window:{flow.id}"
        return await leases.claim(transaction, self.owners, name, owner=owner, now=now, longest=longest)

    async def get(self, flow_id: str) -> Flow | None:
        """Return a flow, whatever its status is; None if it is gone or can't be decrypted."""
        asked: Columns = {"id": flow_id}
        return await self._flow(await self._engine.fetch_all(_BY_ID, asked), asked)

    async def live(self, account: Account, now: float) -> Flow | None:
        """Return the newest flow of an account that still waits for its user at ``now`` (Unix seconds), or None."""
        return next(iter(await self.all_live(account, now)), None)

    async def all_live(self, account: Account, now: float) -> list[Flow]:
        """Return the flows of an account that still wait for their user at ``now`` (Unix seconds), newest first."""
        asked = account_params(account)
        rows = await self._engine.fetch_all(_LIVE, {**asked, "now": now})
        return await decode_rows(self._engine, "flows", rows, asked, read_flow)

    async def all_done(self, account: Account) -> list[Flow]:
        """Return the flows of an account that its user has finished, oldest first."""
        asked = account_params(account)
        return await decode_rows(self._engine, "flows", await self._engine.fetch_all(_DONE, asked), asked, read_flow)

    async def devices(self, now: float) -> list[Flow]:
        """Return the flows that still wait for a user on another device, oldest first."""
        rows = await self._engine.fetch_all(_DEVICES, {"now": now})
        return await decode_rows(self._engine, "flows", rows, {}, read_flow)

    async def newest(self, account: Account, now: float) -> Flow | None:
        """Return the newest flow of an account, if possible one that still waits for its user at ``now``; or None."""
        asked = account_params(account)
        return await self._flow(await self._engine.fetch_all(_NEWEST, {**asked, "now": now}), asked)

    async def unanswered(self) -> list[Flow]:
        """Return the flows of all accounts that neither succeeded nor were cancelled, oldest first."""
        rows = await self._engine.fetch_all(_UNANSWERED, {"cancelled": CANCELLED})
        return await decode_rows(self._engine, "flows", rows, {}, read_flow)

    async def of_oauth_client(self, client_id: str) -> list[Flow]:
        """Return the flows of a client of the API that wait for their user."""
        asked: Columns = {"oauth_client": client_id}
        rows = await self._engine.fetch_all(_OF_OAUTH_CLIENT, asked)
        return await decode_rows(self._engine, "flows", rows, asked, read_flow)

    async def claim_poll(self, flow_id: str, *, owner: str, now: float, next_poll_at: float) -> bool:
        """Make ``owner`` (from ``Engine.owners``) the only process that polls for a flow, until ``next_poll_at``.

        Return False if the flow is no longer pending, or if another process that is still alive polls: some servers
        end the grant if a device code is sent again after it was exchanged for tokens.
        """
        self.owners.appear()
        async with self._engine.transaction() as transaction:
            rows = await self._intact(await transaction.execute(_POLL, {"id": flow_id, "now": now}), {"id": flow_id})
            if not rows:
                return False
            holder = rows[0]["poll_owner"]
            if holder and holder != owner and self.owners.is_held(holder, rows[0]["next_poll_at"], now):
                return False
            self.owners.took(f"poll:{flow_id}")
            seen = {"seen": holder, "seen_at": rows[0]["next_poll_at"]}
            values = {"id": flow_id, "owner": owner, "next_poll_at": next_poll_at, **seen}
            return bool(await transaction.execute(_CLAIM_POLL, values))

    async def add_attempt(self, attempt: Attempt) -> bool:
        """Store an attempt, and delete the middle ones of its flow if it has more than KEPT_ATTEMPTS.

        Return False if the flow is gone or no longer pending.
        """
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, "attempts", uid)
        columns = attempt_columns(attempt, cipher)
        async with self._engine.transaction() as transaction:
            await transaction.execute(_FORGET_ONE_ATTEMPT, {"kept": KEPT_ATTEMPTS_IN_ALL})
            kept = {"oldest": KEPT_ATTEMPTS // 2, "newest": KEPT_ATTEMPTS - KEPT_ATTEMPTS // 2 - 1}
            await transaction.execute(_FORGET_ATTEMPTS, {"flow_id": attempt.flow_id, **kept})
            return bool(
                await transaction.execute(_ADD_ATTEMPT, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})
            )

    async def was_visited(self, flow_id: str) -> bool:
        """Return whether a flow has attempts of browsers that have not come back."""
        return bool(await self._engine.fetch_all(_VISITED, {"id": flow_id, "headless": HEADLESS_ATTEMPT}))

    async def headless_attempt(self, flow_id: str) -> Attempt | None:
        """Return the attempt of a flow whose code a program brings; None if it was used, or if there is none."""
        asked: Columns = {"flow_id": flow_id, "browser_hash": HEADLESS_ATTEMPT}
        rows = await self._engine.fetch_all(_HEADLESS, asked)
        return next(iter(await decode_rows(self._engine, "attempts", rows, asked, read_attempt)), None)

    async def of_server(self, principal: str, server: str) -> list[Flow]:
        """Return the flows of all accounts that a principal has at a server, whatever their status is."""
        asked: Columns = {"principal": principal, "server": server}
        return await decode_rows(
            self._engine, "flows", await self._engine.fetch_all(_OF_SERVER, asked), asked, read_flow
        )

    async def take_attempt(self, state_hash: str, now: float) -> tuple[Flow, Attempt] | None:
        """Delete the attempt of a state and return it with its flow, so that each state is accepted once.

        Return None if it is unknown, used or expired, or if its flow is no longer pending.
        """
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(_TAKE_ATTEMPT, {"state_hash": state_hash, "now": now})
            taken = await self._attempts(rows, state_hash)
            if not taken:
                return None
            asked: Columns = {"id": taken[0].flow_id}
            flow = await self._flow(await transaction.execute(_BY_ID, asked), asked)
        return None if flow is None else (flow, taken[0])

    async def find_attempt(self, state_hash: str) -> tuple[Flow, Attempt] | None:
        """Return the unused attempt of a state and its flow, even if they have expired, without using it up."""
        found = await self._attempts(await self._engine.fetch_all(_ATTEMPT, {"state_hash": state_hash}), state_hash)
        flow = await self.get(found[0].flow_id) if found else None
        return None if flow is None else (flow, found[0])

    async def finish(self, flow_id: str, status: FlowStatus, reason: str = "") -> bool:
        """End a pending flow and delete its attempts. Return False if it was not pending."""
        async with self._engine.transaction() as transaction:
            rows = await self._intact(await transaction.execute(_PENDING, {"id": flow_id}), {"id": flow_id})
            for row in rows:
                await self._finish(transaction, row, status, reason)
        return bool(rows)

    async def tell(self, flow: Flow, return_origin: str) -> bool:
        """Let the origin of a page hear how a pending flow ends. Return False if it has ended, or one hears of it."""
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": flow.id}
            for row in await self._intact(await transaction.execute(_PENDING, asked), asked):
                if row["return_origin"] is None:
                    await change_row(self._engine, transaction, "flows", row, {"return_origin": return_origin})
                    return True
        return False

    async def cancel(self, account: Account) -> None:
        """Fail all flows of an account, so that no grant can come from them any more (``Grants.add_from``).

        Flows that are done are included: a second browser may be finishing one of them.
        """
        async with self._engine.transaction() as transaction:
            asked = account_params(account)
            for row in await self._intact(await transaction.execute(_OF_ACCOUNT, asked), asked):
                await self._finish(transaction, row, FlowStatus.FAILED, CANCELLED)

    async def _finish(self, transaction: Transaction, row: Row, status: FlowStatus, reason: str) -> None:
        changes = {"status": str(status), "reason": reason}
        await change_row(self._engine, transaction, "flows", row, changes)
        await transaction.execute(_DELETE_ATTEMPTS, {"id": row["id"]})

    async def purge(self, now: float) -> None:
        """Delete expired attempts, and flows KEPT_SECONDS or KEPT_UNANSWERED_SECONDS after they have expired."""
        old = {"then": now - KEPT_SECONDS, "long_ago": now - KEPT_UNANSWERED_SECONDS, "cancelled": CANCELLED}
        async with self._engine.transaction() as transaction:
            await transaction.execute("DELETE FROM attempts WHERE expires_at <= :now", {"now": now})
            await transaction.execute(_FORGET_EXPIRED, old)

    async def _intact(self, rows: list[Row], asked: Columns) -> list[Row]:
        return await intact_rows(self._engine, "flows", rows, asked)

    async def _flow(self, rows: list[Row], asked: Columns) -> Flow | None:
        return next(iter(await decode_rows(self._engine, "flows", rows, asked, read_flow)), None)

    async def _attempts(self, rows: list[Row], state_hash: str) -> list[Attempt]:
        return await decode_rows(self._engine, "attempts", rows, {"state_hash": state_hash}, read_attempt)


def start_lease(account: Account) -> str:
    """Return the name of the lease on beginning an authorization of an account (``store.leases``)."""
    parts = "\0".join((account.principal, account.server, account.name))
    return f"start:{hashlib.sha256(parts.encode('utf-8', 'surrogatepass')).hexdigest()}"
