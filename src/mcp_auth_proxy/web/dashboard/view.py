"""What the dashboard shows: cards of accounts, and lines of events, as frozen values that can be compared."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from mcp_auth_proxy.broker import AccountConnection
from mcp_auth_proxy.broker.connection_notes import ConnectionEvent, sentence
from mcp_auth_proxy.broker.connection_records import CREDENTIAL
from mcp_auth_proxy.broker.states import Word
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import excerpt, without_query_values
from mcp_auth_proxy.models import LOCAL, Principal
from mcp_auth_proxy.store.events import Event
from mcp_auth_proxy.web.dashboard.client_setup import ClientSetup, client_setups
from mcp_auth_proxy.web.pages import ScopeList

SHOWN_EVENTS = 20

_ACTIONS = {
    "flows.create": "began to connect",
    "flows.complete": "connected",
    "flows.delete": "cancelled an authorization",
    "connections.delete": "disconnected",
    "connections.forget": "disconnected, and forgot the client",
    "grants.delete": "deleted a grant",
    "grants.refresh": "renewed a grant",
    "grants.connect": "connected",
    "grants.disconnect": "disconnected",
    "grants.renew": "not renewed, is tried again",
    "grants.recover": "renewed again",
    "grants.end": "ended",
    "sessions.create": "signed in",
    "sessions.delete": "signed out",
    "links.create": "made a link to the dashboard",
    "consents.confirm": "confirmed where a link leads",
    "consents.give": "consented",
    "consents.refuse": "did not consent",
    "grants.assign": "assigned grants",
    "servers.create": "added a server",
    "servers.update": "changed a server",
    "servers.delete": "deleted a server",
    "keys.create": "made an API key",
    "keys.delete": "revoked an API key",
    "principals.create": "added a principal",
    "principals.change": "changed a principal",
    "principals.delete_grants": "deleted the grants of a principal",
    "oauth-clients.create": "added an OAuth client",
    "oauth-clients.change": "changed an OAuth client",
    "oauth-clients.delete": "deleted an OAuth client",
}

FindPrincipal = Callable[[str], Principal | None]
"""Return the principal with an id."""


@dataclass(frozen=True, slots=True)
class When:
    """A time: ``iso`` for programs, ``text`` for people."""

    iso: str
    text: str

    @classmethod
    def of(cls, seconds: float) -> "When":
        """Return a time from Unix seconds, to the minute."""
        moment = datetime.fromtimestamp(seconds, UTC)
        return cls(moment.strftime("%Y-%m-%dT%H:%M:00Z"), moment.strftime("%Y-%m-%d %H:%M UTC"))

    @classmethod
    def of_any(cls, seconds: float | None) -> "When | None":
        """Return a time; None stays None."""
        return None if seconds is None else cls.of(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What the user of the page may do with an account."""

    connect: bool
    disconnect: bool
    """Disconnect it, and forget the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One account of a server."""

    name: str
    """``SERVER`` or ``SERVER@ACCOUNT``."""
    account: str
    upstream: str
    address: str
    state: str
    """The word with ``-`` for spaces, for ``data-state``."""
    word: str
    sentence: str
    label: str
    issuer: str
    scopes: tuple[str, ...]
    scopes_left_out: int
    since: When | None
    expires: When | None
    renews: bool
    last_used: When | None
    tools: int | None
    error: str
    remedy: str
    has_grant: bool
    shared: bool
    asks_user: bool
    """Whether a user has to consent."""
    rights: Rights
    setups: tuple[ClientSetup, ...]

    @property
    def id(self) -> str:
        """The id of its element."""
        return f"server-{self.name.replace('@', '.')}"

    @property
    def digest(self) -> str:
        """What tells this card from the same one at another time."""
        return hashlib.sha256(repr(self).encode("utf-8", "replace")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class EventLine:
    """One event."""

    at: float
    when: When
    who: str
    text: str
    server: str
    good: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the page shows at one time."""

    cards: tuple[Card, ...]
    events: tuple[EventLine, ...]


def card(server: ServerSettings, connection: AccountConnection, rights: Rights, *, public_url: str, keys: bool) -> Card:
    """Return the card of an account. ``keys``: whether clients need a credential."""
    name, grant, notes, word = connection.account.shown, connection.grant, connection.notes, connection.word
    address = f"{public_url}/{name}/mcp"
    scopes = ScopeList.of(grant.scopes if grant is not None else ())
    shown = without_query_values(server.url)
    return Card(
        name=name,
        account=connection.account.name,
        upstream=shown,
        address=address,
        state=word.value.replace(" ", "-"),
        word=word.value,
        sentence=_sentence(word, server),
        label=excerpt(grant.label) if grant is not None else "",
        issuer=excerpt(grant.key.issuer) if grant is not None else "",
        scopes=tuple(scopes.shown),
        scopes_left_out=scopes.left_out,
        since=When.of(grant.granted_at) if grant is not None else None,
        expires=When.of_any(grant.expires_at if grant is not None else None),
        renews=grant is not None and (grant.has_refresh_token or grant.grant_type.unattended),
        last_used=When.of_any(notes.last_used_at),
        tools=notes.tools,
        error=excerpt(notes.last_error or ""),
        remedy=notes.remedy or "",
        has_grant=grant is not None,
        shared=server.grant_owner == "shared",
        asks_user=not server.oauth.grant.unattended,
        rights=rights,
        setups=client_setups(name, public_url, keys=keys),
    )


def _sentence(word: Word, server: ServerSettings) -> str:
    if word is Word.NEEDS_CONSENT and server.oauth.grant.unattended:
        return "There is no token yet. The first request gets one without a user."
    return sentence(word)


def event_lines(
    audited: Iterable[Event], happened: Iterable[ConnectionEvent], find_principal: FindPrincipal
) -> tuple[EventLine, ...]:
    """Return the newest events of the audit trail and of the connections, the newest first."""
    # That a user has consented is told by what came of it.
    audited = (event for event in audited if (event.action, event.outcome) != ("consents.give", "ok"))
    lines = [_audited(event, find_principal) for event in audited]
    lines += [
        EventLine(
            event.at,
            When.of(event.at),
            _name(event.account.principal, find_principal),
            excerpt(event.text),
            event.account.shown,
            event.good,
        )
        for event in happened
    ]
    return tuple(sorted(lines, key=lambda line: line.at, reverse=True)[:SHOWN_EVENTS])


def _audited(event: Event, find_principal: FindPrincipal) -> EventLine:
    good = event.outcome == "ok"
    text = _ACTIONS.get(event.action, event.action)
    if not good and event.credential != CREDENTIAL:
        text = f"{text}: refused ({event.outcome})"
    who = _name(event.principal, find_principal)
    return EventLine(event.at, When.of(event.at), who, excerpt(text), excerpt(event.server_name), good)


def _name(principal: str, find_principal: FindPrincipal) -> str:
    """Return what a principal is called; empty for everybody, if callers are not identified."""
    if principal == LOCAL:
        return ""
    found = find_principal(principal)
    return excerpt(principal if found is None else found.name)
