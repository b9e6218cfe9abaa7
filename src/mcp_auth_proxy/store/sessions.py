"""The sessions of browsers, and the single-use links for one. Only hashes of their secrets are stored (T76)."""

from collections.abc import Callable

from mcp_auth_proxy.models import Scope, Session, SessionKind
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, change_row, decode_rows

KEPT_SESSIONS = 100
"""The number of sessions that are kept for one principal; older ones end."""

_TABLE = "sessions"
_FIND = "SELECT * FROM sessions WHERE id_hash = :id_hash"
_ADD = """
    INSERT INTO sessions (uid, id_hash, kind, principal, credential, scopes, created_at, expires_at, seal)
    VALUES (:uid, :id_hash, :kind, :principal, :credential, :scopes, :created_at, :expires_at, :seal)
"""
_END = "DELETE FROM sessions WHERE id_hash = :id_hash"
_END_ALL = "DELETE FROM sessions WHERE principal = :principal"
_END_OF = "DELETE FROM sessions WHERE principal = :principal AND credential = :credential"
_PURGE = "DELETE FROM sessions WHERE expires_at <= :now"
# The new one is kept whatever the times of the others are: they may be forged, or from before the clock was set back.
_FORGET_OLD = """
    DELETE FROM sessions WHERE principal = :principal AND uid NOT IN (
        SELECT uid FROM sessions WHERE principal = :principal
        ORDER BY uid = :uid DESC, created_at DESC LIMIT :kept
    )
"""


class Sessions:
    """The sessions in the store. Every method raises StoreUnavailable if the store can't be used now.

    ``id_hash`` is the SHA-256 (hex) of a browser's cookie, or of the secret in a link.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def add(self, session: Session, id_hash: str, *, replaces: str = "") -> None:
        """Store a new session, and end the one whose hash is ``replaces``. Sessions that are over are deleted.

        So are all but the newest KEPT_SESSIONS of the principal.
        """
        async with self._engine.transaction() as transaction:
            await self._add(transaction, session, id_hash, replaces)

    async def find(self, id_hash: str, now: float) -> Session | None:
        """Return a session or a link; None if it is unknown or over at ``now``, or was changed in the store."""
        asked: Columns = {"id_hash": id_hash}
        rows = await self._engine.fetch_all(_FIND, asked)
        found = next(iter(await decode_rows(self._engine, _TABLE, rows, asked, _read)), None)
        return found if found is not None and found.expires_at > now else None

    async def open_link(
        self, link_hash: str, begun: Callable[[Session], Session], id_hash: str, *, replaces: str = "", now: float
    ) -> Session | None:
        """Store the session that a link begins, with the hash ``id_hash``, and return it.

        None if the link is unknown or over at ``now``, or was used before: then the session that it began ends too.
        ``begun`` returns the session for a link.
        """
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id_hash": link_hash}
            rows = await transaction.execute(_FIND, asked)
            for row, link in await decode_rows(self._engine, _TABLE, rows, asked, _read_with_row):
                if link.expires_at <= now:
                    continue
                session = begun(link)
                if link.kind is SessionKind.UNUSED_LINK:
                    await change_row(self._engine, transaction, _TABLE, row, {"kind": str(SessionKind.USED_LINK)})
                    await self._add(transaction, session, id_hash, replaces)
                    return session
                if link.kind is SessionKind.USED_LINK:
                    values = {"principal": session.principal, "credential": session.credential}
                    await transaction.execute(_END_OF, values)
        return None

    async def end(self, id_hash: str) -> None:
        """End one session."""
        async with self._engine.transaction() as transaction:
            await transaction.execute(_END, {"id_hash": id_hash})

    async def end_all(self, principal: str, *, credential: str | None = None) -> None:
        """End the sessions of a principal: all of them, or those that were begun with one credential."""
        values = {"principal": principal}
        async with self._engine.transaction() as transaction:
            if credential is None:
                await transaction.execute(_END_ALL, values)
            else:
                await transaction.execute(_END_OF, {**values, "credential": credential})

    async def _add(self, transaction: Transaction, session: Session, id_hash: str, replaces: str) -> None:
        columns = _columns(session, id_hash)
        seal = RowCipher(self._engine.cipher, _TABLE, session.id).seal_row(columns)
        await transaction.execute(_PURGE, {"now": session.created_at})
        await transaction.execute(_END, {"id_hash": replaces})
        await transaction.execute(_ADD, {"uid": session.id, **columns, SEAL: seal})
        kept = {"principal": session.principal, "uid": session.id, "kept": KEPT_SESSIONS}
        await transaction.execute(_FORGET_OLD, kept)


def _columns(session: Session, id_hash: str) -> Columns:
    return {
        "id_hash": id_hash,
        "kind": str(session.kind),
        "principal": session.principal,
        "credential": session.credential,
        "scopes": " ".join(sorted(session.scopes)),
        "created_at": session.created_at,
        "expires_at": session.expires_at,
    }


def _read(row: Row, cipher: RowCipher) -> Session:
    return Session(
        id=row["uid"],
        kind=SessionKind(row["kind"]),
        principal=row["principal"],
        credential=row["credential"],
        scopes=frozenset(map(Scope, row["scopes"].split())),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )


def _read_with_row(row: Row, cipher: RowCipher) -> tuple[Row, Session]:
    return row, _read(row, cipher)
