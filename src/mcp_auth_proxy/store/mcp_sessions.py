"""The sessions that the proxy began for MCP clients while consent was outstanding, so that any process can go on.

Only the hash of a session's id is stored; what the client said when it began the session is sealed.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, change_row, decode_rows, new_uid

KEPT_SESSIONS = 100
"""The number of sessions that are kept for one account; those that were used longest ago are deleted."""

KEPT_OF_PRINCIPAL = 1000
"""Those of one principal, however many accounts it invents."""

KEPT_IN_ALL = 10_000
"""Those of everybody."""

_TABLE = "mcp_sessions"
_FIND = "SELECT * FROM mcp_sessions WHERE id_hash = :id_hash"
_ADD = """
    INSERT INTO mcp_sessions (uid, id_hash, principal, account, server, upstream, state, created_at, used_at, seal)
    VALUES (:uid, :id_hash, :principal, :account, :server, :upstream, :state, :created_at, :used_at, :seal)
"""
_END = "DELETE FROM mcp_sessions WHERE id_hash = :id_hash"
# The new one is kept whatever the times of the others are: they may be forged, or from before the clock was set back.
_FORGET_OLD = """
    DELETE FROM mcp_sessions
    WHERE principal = :principal AND account = :account AND server = :server AND uid NOT IN (
        SELECT uid FROM mcp_sessions WHERE principal = :principal AND account = :account AND server = :server
        ORDER BY uid = :uid DESC, used_at DESC LIMIT :kept
    )
"""
# Only a tenth more is too much: to look for the oldest each time would make a full table slow.
_TRIM_PRINCIPAL = """
    DELETE FROM mcp_sessions WHERE principal = :principal
    AND (SELECT count(*) FROM mcp_sessions WHERE principal = :principal) > :most AND uid NOT IN (
        SELECT uid FROM mcp_sessions WHERE principal = :principal ORDER BY uid = :uid DESC, used_at DESC LIMIT :kept
    )
"""
_TRIM = """
    DELETE FROM mcp_sessions WHERE (SELECT count(*) FROM mcp_sessions) > :most AND uid NOT IN (
        SELECT uid FROM mcp_sessions ORDER BY uid = :uid DESC, used_at DESC LIMIT :kept
    )
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionState:
    """What is known of one session. It is opened at the server once there is a token."""

    initialize: bytes = field(repr=False)
    """The client's own ``initialize``, one JSON-RPC request."""
    announced: str
    """The revision that the client was told."""
    log_level: str = ""
    """What the client asked for by ``logging/setLevel`` before the session was opened; empty if it did not."""
    opened: bool = False
    upstream_id: str = field(default="", repr=False)
    """The server's own session id; empty if it gives none."""
    negotiated: str = ""
    """The revision that the server answered with."""
    lists: tuple[str, ...] = ()
    """The capabilities of the server that have lists: of ``tools``, ``prompts`` and ``resources``."""
    announce_lists: bool = True
    """Whether the client has still to be told that the lists have changed."""


class McpSessions:
    """The sessions in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def add(self, session_id: str, account: Account, state: SessionState, *, upstream: str, now: float) -> None:
        """Store a new session of an account with the server at the URL ``upstream``.

        All but those that were used last are deleted: of the account (``KEPT_SESSIONS``), of its principal
        (``KEPT_OF_PRINCIPAL``) and in all (``KEPT_IN_ALL``).
        """
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns: Columns = {
            "id_hash": _hash(session_id),
            **account_params(account),
            "upstream": upstream,
            "state": cipher.seal("state", _encode(state)),
            "created_at": now,
            "used_at": now,
        }
        async with self._engine.transaction() as transaction:
            await transaction.execute(_ADD, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})
            await transaction.execute(_FORGET_OLD, {**account_params(account), "uid": uid, "kept": KEPT_SESSIONS})
            of_principal = {"uid": uid, "principal": account.principal, **_bounds(KEPT_OF_PRINCIPAL)}
            await transaction.execute(_TRIM_PRINCIPAL, of_principal)
            await transaction.execute(_TRIM, {"uid": uid, **_bounds(KEPT_IN_ALL)})

    async def find(self, session_id: str, account: Account, *, upstream: str) -> SessionState | None:
        """Return a session; None if it is unknown, or that of another account or server."""
        asked: Columns = {"id_hash": _hash(session_id), **account_params(account), "upstream": upstream}
        rows = await self._engine.fetch_all(_FIND, {"id_hash": asked["id_hash"]})
        return next(iter(await decode_rows(self._engine, _TABLE, rows, asked, _read)), None)

    async def change(
        self, session_id: str, account: Account, change: Callable[[SessionState], SessionState], *, now: float
    ) -> SessionState | None:
        """Change what is known of a session, used at ``now``, and return it; None if it has ended.

        ``change`` gets what is stored, which another process may have changed.
        """
        asked: Columns = {"id_hash": _hash(session_id), **account_params(account)}
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(_FIND, {"id_hash": asked["id_hash"]})
            for row, before in await decode_rows(self._engine, _TABLE, rows, asked, _read_with_row):
                state = change(before)
                sealed = RowCipher(self._engine.cipher, _TABLE, row["uid"]).seal("state", _encode(state))
                await change_row(self._engine, transaction, _TABLE, row, {"state": sealed, "used_at": now})
                return state
        return None

    async def end(self, session_id: str) -> None:
        """Forget a session."""
        async with self._engine.transaction() as transaction:
            await transaction.execute(_END, {"id_hash": _hash(session_id)})


def _bounds(kept: int) -> dict[str, int]:
    return {"kept": kept, "most": kept + kept // 10}


def _hash(session_id: str) -> str:
    return hashlib.sha256(session_id.encode("utf-8", "surrogateescape")).hexdigest()


def _encode(state: SessionState) -> str:
    return json.dumps(
        {
            "initialize": base64.b64encode(state.initialize).decode("ascii"),
            "announced": state.announced,
            "log_level": state.log_level,
            "opened": state.opened,
            "upstream_id": state.upstream_id,
            "negotiated": state.negotiated,
            "lists": state.lists,
            "announce_lists": state.announce_lists,
        }
    )


def _read(row: Row, cipher: RowCipher) -> SessionState:
    found = json.loads(cipher.open("state", row["state"]))
    return SessionState(
        initialize=base64.b64decode(found["initialize"]),
        announced=found["announced"],
        log_level=found["log_level"],
        opened=found["opened"],
        upstream_id=found["upstream_id"],
        negotiated=found["negotiated"],
        lists=tuple(found["lists"]),
        announce_lists=found["announce_lists"],
    )


def _read_with_row(row: Row, cipher: RowCipher) -> tuple[Row, SessionState]:
    return row, _read(row, cipher)
