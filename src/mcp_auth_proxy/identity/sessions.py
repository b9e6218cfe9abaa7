"""The sessions of browsers: begun at sign-in, with a new secret each time, and ended for a reason.

A session is a row in the store. The browser has a secret of 256 random bits, in a cookie; the row has its hash.
"""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import NamedTuple

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.identity.callers import Callers
from mcp_auth_proxy.models import ALL_SCOPES, LOCAL, LOCAL_PRINCIPAL, Caller, Principal, Session, SessionKind
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.sealed_rows import new_uid
from mcp_auth_proxy.store.sessions import Sessions

LIFETIME = 12 * 3600.0
"""Seconds that a session lasts at most. Using it does not prolong it."""

LINK_LIFETIME = 300.0
"""Seconds that the link of ``dashboard`` can be used, once."""

_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")

FindPrincipal = Callable[[str], Awaitable[Principal | None]]
"""Return the principal with an id as it is now. Raises StoreError."""

KeyHolds = Callable[[str], Awaitable[bool]]
"""Return whether the API key with an id may still be used. Raises StoreError."""

_KEY = "key:"
"""What ``Caller.credential`` starts with for an API key."""


class SessionCookie(NamedTuple):
    """What a browser is given: the secret of its session, and the seconds that it lasts."""

    value: str
    max_age: int


class BrowserSessions:
    """Begin, look up and end sessions. A secret may be any text from a browser. Every method raises StoreError."""

    def __init__(
        self,
        *,
        sessions: Sessions,
        find_principal: FindPrincipal,
        key_holds: KeyHolds,
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._find_principal = find_principal
        self._key_holds = key_holds
        self._clock = clock

    async def begin(self, caller: Caller, *, replaces: str = "") -> SessionCookie:
        """Begin the session of a caller who has signed in.

        Its secret is new, whatever the browser had: nobody can have planted it (T54). ``replaces`` is what the browser
        had; that session ends.
        """
        now, value = self._clock(), _new_secret()
        session = Session(
            id=new_uid(),
            kind=SessionKind.BROWSER,
            principal=caller.principal.id,
            credential=caller.credential,
            scopes=caller.scopes,
            created_at=now,
            expires_at=now + LIFETIME,
        )
        await self._sessions.add(session, _hash(value), replaces=_hash(replaces))
        return SessionCookie(value, _seconds(session))

    async def caller(self, value: str) -> Caller | None:
        """Return who has the session with this secret; None if there is none, or it has ended."""
        session = await self._find(value)
        if session is None:
            return None
        principal = await self._find_principal(session.principal)
        if principal is None:
            return None
        if not principal.is_active:
            await self._sessions.end_all(session.principal)
            return None
        key = session.credential.removeprefix(_KEY) if session.credential.startswith(_KEY) else ""
        if key and not await self._key_holds(key):
            await self._sessions.end_all(session.principal, credential=session.credential)
            return None
        return Caller(principal=principal, credential=f"session:{session.id}", scopes=session.scopes, key=key)

    async def end(self, value: str) -> None:
        """End a session, because its user signs out."""
        await self._sessions.end(_hash(value))

    async def end_all(self, principal: str) -> None:
        """End all sessions of a principal, and its links."""
        await self._sessions.end_all(principal)

    async def open_link(self, secret: str, *, replaces: str = "") -> SessionCookie | None:
        """Begin the session of a single-use link; None if it can't be used.

        If a link is opened twice, somebody else may have been first: then the session that it began ends, and nobody
        has one (as with codes, RFC 6749 §4.1.2).
        """
        now, value = self._clock(), _new_secret()
        session = await self._sessions.open_link(
            _hash(secret), lambda link: _of_link(link, now), _hash(value), replaces=_hash(replaces), now=now
        )
        return None if session is None else SessionCookie(value, _seconds(session))

    async def has_opened(self, secret: str, value: str) -> bool:
        """Return whether the browser with this session has opened this link before: then it may open it again."""
        session = await self._find(value)
        link = await self._sessions.find(_hash(secret), self._clock())
        return session is not None and link is not None and session.credential == _credential(link)

    async def _find(self, value: str) -> Session | None:
        session = await self._sessions.find(_hash(value), self._clock())
        return session if session is not None and session.kind in _SESSIONS else None


_SESSIONS = (SessionKind.BROWSER, SessionKind.LINK)
"""The kinds that are not links themselves."""


def _of_link(link: Session, now: float) -> Session:
    return replace(
        link,
        id=new_uid(),
        kind=SessionKind.LINK,
        credential=_credential(link),
        created_at=now,
        expires_at=now + LIFETIME,
    )


def _credential(link: Session) -> str:
    return f"link:{link.id}"


def _seconds(session: Session) -> int:
    return max(1, int(session.expires_at - session.created_at))


def make_sessions(callers: Callers, *, database: Engine, clock: Callable[[], float]) -> BrowserSessions:
    """Return the sessions of a running proxy. In mode ``none``, only those of ``local`` count."""
    directory, keys = callers.directory, ApiKeys(database)

    async def find_principal(principal_id: str) -> Principal | None:
        if callers.anonymous:
            return LOCAL_PRINCIPAL if principal_id == LOCAL else None
        found = directory.principal(principal_id)
        if found is None:
            # Another process may have made it a moment ago.
            await directory.heed_changes()
            found = directory.principal(principal_id)
        return found

    async def key_holds(key_id: str) -> bool:
        key = await keys.get(key_id)
        return key is not None and (key.expires_at is None or key.expires_at > clock())

    return BrowserSessions(sessions=Sessions(database), find_principal=find_principal, key_holds=key_holds, clock=clock)


async def new_link(sessions: Sessions, *, principal: str = LOCAL, now: float) -> str:
    """Store a link for one session of a principal, and return its secret. Raises StoreError."""
    secret = _new_secret()
    link = Session(
        id=new_uid(),
        kind=SessionKind.UNUSED_LINK,
        principal=principal,
        credential="link",
        scopes=ALL_SCOPES,
        created_at=now,
        expires_at=now + LINK_LIFETIME,
    )
    await sessions.add(link, _hash(secret))
    return secret


def _new_secret() -> str:
    secret = secrets.token_urlsafe(32)
    secret_values.remember(secret)
    return secret


def _hash(secret: str) -> str:
    """Return the hash to look a secret up by; that of nothing for what can't be one, so that no row has it."""
    return hashlib.sha256(secret.encode("ascii")).hexdigest() if _SECRET.fullmatch(secret) else ""
