"""Keep in the store what commands and other processes have to see of connections, and warn before one fails.

Notes and events are written in the background, together, when a state changes, and else at most once a minute.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress

from mcp_auth_proxy.broker.connection_notes import (
    ConnectionJournal,
    ConnectionNotes,
    Happening,
    ToldFailures,
    authorize_again,
    moment,
)
from mcp_auth_proxy.broker.renewal import renewable
from mcp_auth_proxy.broker.states import lapses_soon
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import MAX_MESSAGE, StoreError, excerpt
from mcp_auth_proxy.models import DEFAULT_PROJECT, Account, Grant
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store.connection_notes import StoredNotes
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.events import Event, Events

logger = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds between two writes, unless a state changes."""

USED_INTERVAL = 3600.0
"""Seconds between two notes of when an account was used."""

MAX_WAITING = 1000
"""Accounts with notes, and events, that wait to be written. If the store can't be written, what is more is dropped."""

CREDENTIAL = "proxy"
"""What stands in an event for whoever did it: the proxy itself."""

_ACTIONS = {
    Happening.CONNECTED: "grants.connect",
    Happening.DISCONNECTED: "grants.disconnect",
    Happening.NOT_RENEWED: "grants.renew",
    Happening.RENEWED: "grants.recover",
    Happening.DEGRADED: "grants.degrade",
    Happening.ENDED: "grants.end",
}
"""The actions of events. What is not here leaves none."""

_OUTCOMES = {Happening.NOT_RENEWED: "failed", Happening.DEGRADED: "failed", Happening.ENDED: "ended"}

_REACHED = {"failure": "", "remedy": "", "failed_at": None, "unreachable_since": None}
_WORKS = {**_REACHED, "retrying_since": None}

_ENDING = "ending"
_LAPSING = "lapsing"
_DEAD = "dead"


class ConnectionRecords:
    """Write what the journal and the outages tell. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        database: Engine,
        tokens: TokenCache,
        journal: ConnectionJournal,
        outages: OutageLog,
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._notes = StoredNotes(database)
        self._trail = Events(database)
        self._tokens = tokens
        self._journal = journal
        self._outages = outages
        self._clock = clock
        self._changes: dict[Account, dict[str, object] | None] = {}
        """What is to be written of each account; None: its note is to be deleted."""
        self._events: deque[Event] = deque(maxlen=MAX_WAITING)
        self._used: dict[Account, float] = {}
        """When an account was used, as far as it was written."""
        self._failing: dict[Account, Happening] = {}
        """The accounts that do not work, as far as is known, and why."""
        self._unrenewed = ToldFailures(clock)
        self._signalled: dict[Account, tuple[float, str]] = {}
        """The last warning about each grant ahead of its end: when the grant was given, and what it was."""
        self._urgent = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        journal.listen(self._heard)
        outages.on_reached = self._reached
        tokens.on_connected(self._put)

    async def start(self) -> None:
        """Take over what an earlier process has noted, and begin to write. Raises StoreError."""
        for account, note in (await self._notes.all()).items():
            if note.used_at is not None:
                self._used[account] = note.used_at
            if note.unreachable_since is not None:
                self._outages.note_unreachable(account.server, note.failure)
            if note.failure and account.server in self._outages.unreachable:
                self._failing[account] = Happening.UNREACHABLE
            elif note.failure:
                self._failing[account] = Happening.FAILED
                self._outages.failing.add(account.server)
            error, remedy = note.failure or None, note.remedy or None
            self._journal.restore(account, ConnectionNotes(last_used_at=note.used_at, last_error=error, remedy=remedy))
        self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        """Write what is left."""
        if self._task is not None:
            # Not cancelled: what is being written would be lost, or written twice.
            self._closing = True
            self._urgent.set()
            await self._task
            self._note_use(at_end=True)
        await self._write()

    # What others tell

    def _heard(self, account: Account, happening: Happening, reason: str) -> None:
        untold = False
        if happening is Happening.NEEDS_CONSENT:
            # The flow is in the store already.
            return
        if happening is Happening.NOT_RENEWED:
            untold = not self._unrenewed.failed(account)
        elif happening is Happening.RENEWED:
            untold = not self._unrenewed.over(account)
        elif happening in _ACTIONS and happening is not Happening.DEGRADED:
            self._unrenewed.forget(account)
        if happening in (Happening.CONNECTED, Happening.RENEWED):
            self._failing.pop(account, None)
            self._change(account, dict(_WORKS), urgent=True)
        elif happening is Happening.DISCONNECTED:
            for known in (self._failing, self._used, self._signalled):
                known.pop(account, None)
            self._change(account, None, urgent=True)
        else:
            self._note_failure(account, happening, reason)
        if happening in _ACTIONS and not untold:
            self._add_event(account, happening)

    def _note_failure(self, account: Account, happening: Happening, reason: str) -> None:
        before, now = self._failing.get(account), self._clock()
        if happening is Happening.DEGRADED and before is Happening.NOT_RENEWED:
            # Its reason has been noted, and that it is tried again.
            return
        if before is None and len(self._failing) >= MAX_WAITING:
            return
        fields: dict[str, object] = {
            "failed_at": now,
            "failure": excerpt(reason, MAX_MESSAGE),
            "remedy": remedy_of(happening, account, self._servers.get(account.server), reason),
        }
        if happening is Happening.UNREACHABLE and before is not happening:
            fields["unreachable_since"] = now
        elif happening is Happening.FAILED:
            # Whatever it answered: it could be connected to.
            fields["unreachable_since"] = None
            self._outages.unreachable.discard(account.server)
        if happening is Happening.NOT_RENEWED and before is not happening:
            fields["retrying_since"] = now
        elif happening is Happening.ENDED:
            fields["retrying_since"] = None
        self._failing[account] = happening
        if happening in (Happening.FAILED, Happening.UNREACHABLE):
            self._outages.failing.add(account.server)
        self._change(account, fields, urgent=before is not happening)

    def _reached(self, server: str) -> None:
        """Note that a request has reached a server again."""
        for account, happening in list(self._failing.items()):
            if account.server == server and happening in (Happening.FAILED, Happening.UNREACHABLE):
                del self._failing[account]
                self._change(account, dict(_REACHED), urgent=True)

    def _put(self, account: Account) -> None:
        """Look at a grant that is used for the first time: maybe it will die."""
        cached = self._tokens.get(account)
        if cached is not None:
            self._signal(account, cached.grant)

    def _change(self, account: Account, fields: dict[str, object] | None, *, urgent: bool) -> None:
        before = self._changes.get(account)
        if account not in self._changes and len(self._changes) >= MAX_WAITING:
            return
        self._changes[account] = fields if fields is None or before is None else {**before, **fields}
        if urgent:
            self._urgent.set()

    def _add_event(self, account: Account, happening: Happening) -> None:
        server = self._servers.get(account.server)
        event = Event(
            at=self._clock(),
            project_id=server.project if server is not None else DEFAULT_PROJECT,
            principal=account.principal,
            credential=CREDENTIAL,
            action=_ACTIONS[happening],
            target=account.name,
            server=server.server_id if server is not None else "",
            server_name=account.server,
            outcome=_OUTCOMES.get(happening, "ok"),
            address="",
            request_id="",
        )
        self._events.append(event)
        self._urgent.set()

    # In the background

    async def _run(self) -> None:
        while not self._closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await self._urgent.wait()
            self._urgent.clear()
            self._note_use()
            for account in self._tokens.accounts():
                self._put(account)
            await self._write()

    def _note_use(self, *, at_end: bool = False) -> None:
        for account in self._tokens.accounts():
            used, noted = self._tokens.last_used_at(account), self._used.get(account, 0.0)
            # The absolute difference: the clock may have been set back.
            if used is not None and (abs(used - noted) >= USED_INTERVAL or (at_end and used > noted)):
                self._used[account] = used
                self._change(account, {"used_at": used}, urgent=False)

    async def _write(self) -> None:
        changes, self._changes = self._changes, {}
        try:
            if changes:
                await self._notes.change(changes)
            while self._events:
                await self._trail.add(self._events[0])
                self._events.popleft()
        except StoreError as error:
            # They are written with the next ones, and newer changes win.
            logger.warning("the state of connections can't be written to the store: %s", error)
            for account, fields in changes.items():
                newer = self._changes.get(account, {})
                if newer is not None and account in self._changes:
                    self._changes[account] = {**(fields or {}), **newer}
                elif account not in self._changes:
                    self._changes[account] = fields

    # Signals before failure

    def _signal(self, account: Account, grant: Grant) -> None:
        """Warn, once for each grant and state, that nothing but a new authorization keeps a connection alive."""
        ends, now = grant.tokens.expires_at, self._clock()
        if renewable(grant):
            lapses = grant.tokens.refresh_expires_at
            if lapses is None or not lapses_soon(lapses, grant.tokens.obtained_at, now):
                return
            ends, state = lapses, _LAPSING
        elif ends is None:
            return
        else:
            state = _ENDING if ends > now else _DEAD
        if self._signalled.get(account) == (grant.granted_at, state):
            return
        if len(self._signalled) >= MAX_WAITING:
            del self._signalled[next(iter(self._signalled))]
        self._signalled[account] = (grant.granted_at, state)
        name, todo = account.shown, authorize_again(account, self._servers.get(account.server))
        if state is _LAPSING:
            logger.warning(
                "server %s: its refresh token lapses at %s, unless a renewal before then brings a longer one. %s",
                name,
                moment(ends),
                todo,
            )
        elif state is _ENDING:
            logger.warning("server %s: its token can't be renewed, and ends at %s. %s", name, moment(ends), todo)
        else:
            logger.warning("server %s: its token has ended at %s, and can't be renewed. %s", name, moment(ends), todo)


def remedy_of(happening: Happening, account: Account, server: ServerSettings | None, reason: str) -> str:
    """Return what to do about a failure, beside what its ``reason`` says."""
    match happening:
        case Happening.UNREACHABLE:
            return "Check that the server runs, and that its URL is right. The next request tries again."
        case Happening.FAILED:
            return "The next request tries again."
        case Happening.NOT_RENEWED:
            # Until it is over, requests get an error and no link.
            again = authorize_again(account, server, by_link=False)
            return f"It is tried again by itself.{'' if again in reason else f' If that goes on for long: {again}'}"
        case _:
            return authorize_again(account, server)
