"""What is known of a connection beside its grant: when it was used, what went wrong last, and what helps.

The journal is in memory. ``broker.connection_records`` keeps what commands and other processes see of it in the store.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from mcp_auth_proxy.broker.states import Word
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import ConfigHint
from mcp_auth_proxy.models import Account

MAX_ACCOUNTS = 1000
"""Accounts of which something is remembered; beyond it, the one that was noted first is forgotten."""

MAX_EVENTS = 200
"""Events that are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionNotes:
    """What is known of an account of a server; what is not known is None. Times are Unix seconds."""

    last_used_at: float | None = None
    last_error: str | None = None
    """Why it does not work, or did not the last time; None after it has worked again."""
    remedy: str | None = None
    """What to do about that, in one or two sentences."""
    tools: int | None = None
    """How many tools the server had when it was last asked."""


@dataclass(frozen=True, slots=True)
class ConnectionEvent:
    """Something that has happened to a connection. ``at`` is in Unix seconds; no text in it is a secret."""

    at: float
    account: Account
    text: str
    good: bool


class Happening(StrEnum):
    """What has happened to a connection."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    NOT_AUTHORIZED = "not_authorized"
    NOT_RENEWED = "not_renewed"
    RENEWED = "renewed"
    """After it could not be renewed."""
    DEGRADED = "degraded"
    """A renewal was refused; what there is goes on for a while."""
    ENDED = "ended"
    NEEDS_CONSENT = "needs_consent"
    """A request has begun an authorization, which waits for its user."""
    UNREACHABLE = "unreachable"
    """A request could not connect to the server."""
    FAILED = "failed"
    """A request failed for another reason."""


TOLD_INTERVAL = 600.0
"""Seconds between two events about renewals of one account that fail for a while."""


class ToldFailures:
    """Which renewals that fail for a while leave an event, and so their end one too.

    A server that fails every other time would push all other events out. ``clock`` returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told_at: dict[Account, float] = {}
        self._open: set[Account] = set()

    def failed(self, account: Account) -> bool:
        """Note a failure; return whether it leaves an event."""
        now = self._clock()
        # The absolute difference: the clock may have been set back.
        if account in self._open or abs(now - self._told_at.get(account, float("-inf"))) < TOLD_INTERVAL:
            return False
        if account not in self._told_at and len(self._told_at) >= MAX_ACCOUNTS:
            oldest = next(iter(self._told_at))
            del self._told_at[oldest]
            self._open.discard(oldest)
        self._told_at[account] = now
        self._open.add(account)
        return True

    def over(self, account: Account) -> bool:
        """Note that an account no longer fails; return whether its failure has left an event."""
        was_told = account in self._open
        self._open.discard(account)
        return was_told

    def forget(self, account: Account) -> None:
        """Forget an account whose grant is another one now, or none."""
        self._open.discard(account)
        self._told_at.pop(account, None)


Listener = Callable[[Account, Happening, str], None]
"""Called with what has happened and why. It must not raise or block."""


class ConnectionJournal:
    """Remember what happens to connections. ``clock`` returns Unix seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.began_at = clock()
        """Since when it remembers what happens."""
        self._listeners: list[Listener] = []
        self._told = ToldFailures(clock)
        self._notes: dict[Account, ConnectionNotes] = {}
        self._events: deque[ConnectionEvent] = deque(maxlen=MAX_EVENTS)

    def listen(self, listener: Listener) -> None:
        """Tell one more listener what happens."""
        self._listeners.append(listener)

    def restore(self, account: Account, notes: ConnectionNotes) -> None:
        """Take over what an earlier process has noted."""
        if account not in self._notes and len(self._notes) < MAX_ACCOUNTS:
            self._notes[account] = notes

    def connected(self, account: Account, *, elsewhere: bool = False) -> None:
        """Note a new grant: what went wrong before no longer matters.

        ``elsewhere``: another process has received it, and tells its listeners.
        """
        self._told.forget(account)
        self._keep(account, replace(self.notes(account), last_error=None))
        if not elsewhere:
            self._tell(account, Happening.CONNECTED)
        self._add(account, "connected", good=True)

    def disconnected(self, account: Account) -> None:
        """Note that a grant was deleted; nothing else is remembered of it."""
        self._told.forget(account)
        self._notes.pop(account, None)
        self._tell(account, Happening.DISCONNECTED)
        self._add(account, "disconnected", good=True)

    def not_authorized(self, account: Account, reason: str) -> None:
        """Note that an authorization has failed; a grant that there was is still there."""
        self._keep(account, replace(self.notes(account), last_error=reason))
        self._tell(account, Happening.NOT_AUTHORIZED, reason)
        self._add(account, f"not authorized: {reason}", good=False)

    def ended(self, account: Account, reason: str) -> None:
        """Note that a grant has ended, so that only a person can mend it."""
        self._told.forget(account)
        self._tell(account, Happening.ENDED, reason)
        self._add(account, f"ended: {reason}", good=False)

    def degraded(self, account: Account, reason: str) -> None:
        """Note that a renewal was refused, so that a person should look at it before the grant ends."""
        self._tell(account, Happening.DEGRADED, reason)
        self._add(account, f"degraded: {reason}", good=False)

    def needs_consent(self, account: Account) -> None:
        """Note that a request waits for somebody to authorize; the link is shown elsewhere."""
        self._tell(account, Happening.NEEDS_CONSENT)

    def not_renewed(self, account: Account, reason: str) -> None:
        """Note that a renewal has failed for a reason that passes."""
        self._tell(account, Happening.NOT_RENEWED, reason)
        if self._told.failed(account):
            self._add(account, f"not renewed, is tried again: {reason}", good=False)

    def renewed(self, account: Account, *, recovered: bool) -> None:
        """Note that a grant was renewed; it is only told if that had failed before, in whichever process."""
        if recovered:
            self._tell(account, Happening.RENEWED)
            if self._told.over(account):
                self._add(account, "renewed again", good=True)

    def request_failed(self, account: Account, reason: str, *, unreachable: bool = False) -> None:
        """Note that a request has failed because of its server or authorization. It is no event: there may be many."""
        self._tell(account, Happening.UNREACHABLE if unreachable else Happening.FAILED, reason)

    def note_tools(self, account: Account, count: int) -> None:
        """Note how many tools a server has."""
        self._keep(account, replace(self.notes(account), tools=count))

    def notes(self, account: Account) -> ConnectionNotes:
        """Return what was noted of an account."""
        return self._notes.get(account, ConnectionNotes())

    def events(self) -> list[ConnectionEvent]:
        """Return what has happened, the newest first."""
        return list(reversed(self._events))

    def _tell(self, account: Account, happening: Happening, reason: str = "") -> None:
        for listener in self._listeners:
            listener(account, happening, reason)

    def _keep(self, account: Account, notes: ConnectionNotes) -> None:
        if account not in self._notes and len(self._notes) >= MAX_ACCOUNTS:
            del self._notes[next(iter(self._notes))]
        self._notes[account] = notes

    def _add(self, account: Account, text: str, *, good: bool) -> None:
        last = self._events[-1] if self._events else None
        if last is None or (last.account, last.text) != (account, text):
            self._events.append(ConnectionEvent(self._clock(), account, text, good))


def authorize_again(account: Account, server: ServerSettings | None, *, by_link: bool = True) -> str:
    """Return what to do if only a person can mend a connection. ``server``: None if it is no longer configured.

    ``by_link``: the next request gets a link.
    """
    name = account.shown if server is None or not server.from_url else server.command_name
    link = ", or open the link that the next request gets" if by_link else ""
    return f"To authorize again, run `mcp-auth-proxy login {name}`{link}."


def moment(at: float) -> str:
    """Return a time for a log."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


_SENTENCES = {
    Word.CONNECTED: "Requests are sent with a valid token.",
    Word.RETRYING: "The token could not be renewed the last time. It is tried again by itself.",
    Word.DEGRADED: "It works now, but the token can't be renewed: connect again before it expires.",
    Word.EXPIRED: "The token has expired. It is renewed with the next request.",
    Word.ENDED: "The authorization is over. Nobody but you can give a new one.",
    Word.NEEDS_CONSENT: "Nobody has authorized this account. Connect it, or let your MCP client ask for it.",
    Word.AUTHORIZING: "An authorization has begun, and waits for you.",
    Word.UNREACHABLE: "The last request could not connect to the server.",
}

_REMEDIES = {
    Word.CONNECTED: "The connection works all the same.",
    Word.RETRYING: "You need not do anything. If it goes on for long, reconnect.",
    Word.DEGRADED: "Reconnect before the token expires.",
    Word.ENDED: "Reconnect.",
    Word.NEEDS_CONSENT: "Connect again.",
    Word.AUTHORIZING: "Connect, and finish what your browser shows.",
    Word.UNREACHABLE: "Check that the server runs, and that its URL is right. The next request tries again.",
}


def sentence(word: Word) -> str:
    """Return what a state means, for a user."""
    return _SENTENCES[word]


def remedy(word: Word, hint: ConfigHint | None = None) -> str:
    """Return what to do about an error of a connection. ``hint``: the key that would allow what was refused."""
    if hint is not None:
        value = f" to {hint.value}" if hint.value else ""
        return f"Set {hint.key}{value} in the configuration, if that is what you want."
    return _REMEDIES.get(word, "The next request tries again.")
