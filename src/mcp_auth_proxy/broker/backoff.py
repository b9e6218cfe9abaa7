"""Pauses after failures, so that the requests of clients cause no storm of authorizations.

What is paused is as narrow as what failed, so that one caller, whose grant may be bad, denies nothing to others:

- ``of_server``: discovery, which has to be done before the issuer is known, and whatever fails after it;
- ``of_issuer``: registrations, token requests and renewals at one issuer that is down, broken or limits rates;
- ``of_account``: an authorization that was refused with an OAuth error (RFC 6749 §5.2), such as invalid_grant;
- ``of_tokens``: the renewals for a server that refuses the fresh tokens of this account;
- ``of_grant``: the renewals of a grant that fail for a reason of its own.
"""

import random
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import ceil
from typing import NamedTuple

from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, ConfigHint, Pause, TokenRefused
from mcp_auth_proxy.models import Account, Grant

FIRST = 1.0
"""Seconds of the first pause, and up to twice as many at random: servers and replicas do not retry in step."""

LONGEST = 300.0
"""Seconds at which a pause is no longer doubled. A server's own Retry-After may be longer."""

REMEMBERED = 600.0
"""Seconds after the end of a pause until its failures are forgotten."""

MAX_PAUSES = 1000
"""Number of pauses that are kept; beyond it, the one that ends first is dropped."""


_NONE = Pause(0.0, 0.0, "")


class Subject(NamedTuple):
    """What is paused, at one server."""

    server: str
    kind: str
    detail: Hashable = None


def of_server(server: str) -> Subject:
    return Subject(server, "server")


def of_issuer(server: str, issuer: str) -> Subject:
    # The hash, because a hostile server may name issuers that take much memory.
    return Subject(server, "issuer", hash(issuer))


def of_account(account: Account, token: str | None = None) -> Subject:
    """Return the authorizations of an account; those on behalf of a caller only as long as it has the same token."""
    return Subject(account.server, "account", account if token is None else (account, hash(token)))


def of_tokens(account: Account) -> Subject:
    return Subject(account.server, "tokens", account)


def of_grant(grant: Grant) -> Subject:
    return Subject(grant.key.account.server, "grant", grant.id)


@dataclass(slots=True)
class _State:
    """The last failure and its pause. Times are Unix seconds."""

    first: float
    """Seconds of the first pause."""
    failures: int = 0
    """In a row."""
    began: float = 0.0
    ends: float = 0.0
    asked: float = 0.0
    """The end of the server's own Retry-After; 0 if there was none."""
    told: Pause = _NONE
    """What clients are told; it ends later than ``ends`` if something narrower is paused for longer."""
    hint: ConfigHint | None = None
    unavailable: bool = False

    def is_over(self, now: float) -> bool:
        """Return whether the pause has ended; if the clock was set back, nobody waits longer for that."""
        return now >= self.ends or now < self.began

    def error(self, now: float) -> AuthorizationError:
        """Return the error for an attempt during the pause."""
        error = (AuthorizationServerUnavailable if self.unavailable else AuthorizationError)(_text(self.told, now))
        error.hint = self.hint
        error.retry_after = self.told.ends - now
        error.pause = self.told
        return error


class Backoff:
    """The pauses of all servers. ``clock`` returns Unix seconds. Belongs to one event loop."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.failures: dict[Subject, _State] = {}
        """The last failure of each subject; empty if nothing failed, as the fast path asks."""

    # Before an attempt

    def check(self, *subjects: Subject) -> None:
        """Raise the error of the last failure, with the time to wait, if one of the subjects is paused.

        That is AuthorizationServerUnavailable if the last one was, else AuthorizationError.
        """
        now = self._clock()
        paused = [state for state in map(self.failures.get, subjects) if state is not None and not state.is_over(now)]
        if paused:
            raise max(paused, key=lambda state: state.told.ends).error(now)

    def check_asked(self, *subjects: Subject) -> None:
        """Raise as ``check`` does, but only while a server's own Retry-After runs: it holds for people too."""
        now = self._clock()
        for state in map(self.failures.get, subjects):
            if state is not None and state.began <= now < state.asked:
                raise state.error(now)

    def is_paused(self, subject: Subject) -> bool:
        state = self.failures.get(subject)
        return state is not None and not state.is_over(self._clock())

    def has_failed(self, subject: Subject) -> bool:
        """Return whether there was a failure that no success has followed, paused or not."""
        state = self.failures.get(subject)
        return state is not None and self._clock() <= state.ends + REMEMBERED

    def last_failure(self, *subjects: Subject) -> tuple[str, ConfigHint | None] | None:
        """Return the newest failure of these that no success has followed, and the key that would allow it."""
        states = [self.failures[subject] for subject in subjects if self.has_failed(subject)]
        newest = max(states, key=lambda state: state.began, default=None)
        return None if newest is None else (newest.told.reason, newest.hint)

    def retry_at(self, *subjects: Subject) -> float | None:
        """Return when all these pauses have ended; None if none of them is paused."""
        return max((self.failures[subject].ends for subject in subjects if self.is_paused(subject)), default=None)

    def person_begins(self, server: str) -> None:
        """End the pauses of a server, because a person begins something there, but not the server's own."""
        now = self._clock()
        for subject, state in self.failures.items():
            if subject.server == server:
                state.ends = max(state.asked, min(state.ends, now))
                state.told = replace(state.told, ends=state.ends)

    # After an attempt

    @contextmanager
    def attempt(self, subject: Subject) -> Iterator[None]:
        """Run requests that may fail, unless they are paused; begin a pause if they fail. Raises as ``check`` does.

        An OAuth error is no failure here: it concerns one grant or client, and says that the server works.
        """
        self.check(subject)
        try:
            yield
        except TokenRefused:
            raise
        except AuthorizationError as error:
            self.failed(subject, error)
            raise

    def failed(self, subject: Subject, error: AuthorizationError, *, pause: float | None = None) -> None:
        """Pause after a failure, and let the error say when to try again.

        Attempts that were running when the pause began do not prolong it, unless the server asks for more time. If
        something narrower is paused already, as the error says, this pause does not outlast it. ``pause``: its seconds,
        if it does not grow with each failure.
        """
        now, narrower = self._clock(), error.pause
        state = self.failures.get(subject)
        if state is None or now > state.ends + REMEMBERED:
            state = self._add(subject)
        if state.is_over(now):
            state.failures += 1
            state.began, state.asked = now, 0.0
            growing = min(state.first * 2 ** min(state.failures - 1, 20), LONGEST)
            state.ends = now + (growing if pause is None else pause)
        if narrower is not None:
            state.ends = min(state.ends, narrower.ends)
        elif error.server_retry_after:
            state.asked = max(state.asked, now + error.server_retry_after)
            state.ends = max(state.ends, state.asked)
        state.told = narrower or Pause(state.ends, state.asked, str(error))
        state.hint = error.hint
        state.unavailable = isinstance(error, AuthorizationServerUnavailable)
        error.retry_after = state.told.ends - now
        error.pause = state.told

    def with_time(self, error: AuthorizationError) -> AuthorizationError:
        """Return an error for a person: it says until when, if the server itself has asked for a pause."""
        now = self._clock()
        if error.pause is None or error.pause.asked <= now:
            return error
        return AuthorizationServerUnavailable(_text(error.pause, now), retry_after=error.pause.ends - now)

    def succeeded(self, *subjects: Subject) -> None:
        """Forget the failures: the next pause is a first one again."""
        for subject in subjects:
            self.failures.pop(subject, None)

    def accepted(self, subject: Subject) -> None:
        """Note that a server has accepted a token of which it refused others.

        The pause becomes a first one, and is not ended before: a server that refuses every second token would be
        asked without any pause.
        """
        state = self.failures.get(subject)
        if state is None:
            return
        state.failures = 0
        state.ends = min(state.ends, state.began + state.first)
        state.told = replace(state.told, ends=state.ends)
        if state.is_over(self._clock()):
            del self.failures[subject]

    def forget(self, servers: Collection[str]) -> None:
        """Forget the failures of servers that were removed or changed."""
        for subject in [subject for subject in self.failures if subject.server in servers]:
            del self.failures[subject]

    def clear(self) -> None:
        """Forget all failures."""
        self.failures.clear()

    def _add(self, subject: Subject) -> _State:
        if subject not in self.failures and len(self.failures) >= MAX_PAUSES:
            del self.failures[min(self.failures, key=lambda other: self.failures[other].ends)]
        self.failures[subject] = state = _State(FIRST * (1 + random.random()))
        return state


def _text(pause: Pause, now: float) -> str:
    asked = ", as the server asks (Retry-After)" if pause.asked >= pause.ends else ""
    return (
        f"It can be tried again in {ceil(max(pause.ends - now, 0))} s, at "
        f"{datetime.fromtimestamp(pause.ends, UTC):%H:%M:%S} UTC{asked}. The last attempt failed: {pause.reason}"
    )
