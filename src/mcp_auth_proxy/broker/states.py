"""The state of each grant and connection, in one place for commands, pages and the API.

=============================================  ========  ==========  =============
situation                                      state     health      word
=============================================  ========  ==========  =============
token good                                     active    fresh       connected
refresh under way                              active    refreshing  connected
last refresh failed for a reason that passes   active    retrying    retrying
token good, cannot be renewed                  degraded  degraded    degraded
token dead, renewable, nothing scheduled       expired   expired     expired
only a person can mend it                      ended     ended       ended
never connected, or disconnected by the user                         needs consent
flow open                                                            authorizing
a request could not connect                                          unreachable
=============================================  ========  ==========  =============

``store.grant_summaries`` has the states as conditions in SQL.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from mcp_auth_proxy.models import Grant, RenewalHealth
from mcp_auth_proxy.store.grant_summaries import GrantState, GrantSummary

EXPIRED = "The token has expired, and can't be renewed."

NOT_RENEWABLE = "The authorization server gave no refresh token, so the token can't be renewed."

REJECTED_PAUSE = 3.0
"""Seconds between two renewals, however many requests wait, if a person has to mend something first."""

REJECTED_LONGEST = 300.0
"""Maximum seconds between two renewals in the background then."""

LAPSES_SOON = 86_400.0
"""Seconds before the end of a refresh token from which on that is told."""


class Health(StrEnum):
    """How the renewal of a grant goes."""

    FRESH = "fresh"
    REFRESHING = "refreshing"
    RETRYING = "retrying"
    DEGRADED = "degraded"
    EXPIRED = "expired"
    ENDED = "ended"


class Word(StrEnum):
    """The state of a connection in one or two words, for a user. As ``data-state``, with a hyphen for the space."""

    CONNECTED = "connected"
    RETRYING = "retrying"
    DEGRADED = "degraded"
    EXPIRED = "expired"
    ENDED = "ended"
    NEEDS_CONSENT = "needs consent"
    AUTHORIZING = "authorizing"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class GrantStatus:
    """The state and health of a grant."""

    state: GrantState
    health: Health
    reason: str = ""
    """Why it has ended, or can't be renewed, or why its last renewal failed; of a fresh one, what it may die of."""
    since: float | None = None
    """Since when it is so, in Unix seconds."""
    next_try: float | None = None
    """When its renewal is tried again, in Unix seconds; None if nothing is scheduled."""
    is_retried: bool = False
    """Whether the renewal of a degraded grant is tried again while its token works: a person may have mended it."""


def background_retry(health: RenewalHealth) -> float | None:
    """Return when the renewal is tried again if nobody asks for it before, in Unix seconds; None if that is open."""
    if health.rejected_since is None or health.next_try_at is None:
        return health.next_try_at
    failed_at = health.next_try_at - REJECTED_PAUSE
    delay = (failed_at - health.rejected_since) / 2
    return failed_at + min(max(delay, REJECTED_PAUSE), REJECTED_LONGEST)


def lapses_soon(refresh_expires_at: float | None, obtained_at: float, now: float) -> bool:
    """Return whether a refresh token lapses soon: within a day, or after two thirds of the time since it was used."""
    if refresh_expires_at is None:
        return False
    left = refresh_expires_at - now
    return left <= max(LAPSES_SOON, (refresh_expires_at - obtained_at) / 3)


def _warning(summary: GrantSummary, now: float) -> str:
    ends = summary.refresh_expires_at
    if not summary.has_refresh_token or ends is None or not lapses_soon(ends, summary.obtained_at, now):
        return ""
    at = f"{datetime.fromtimestamp(ends, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if ends <= now:
        return f"Its refresh token has lapsed at {at}, as the authorization server said: authorize again."
    return (
        f"Its refresh token lapses at {at}, unless a renewal before then brings a longer one. If not, authorize again."
    )


def grant_status(grant: GrantSummary | Grant, *, now: float) -> GrantStatus:
    """Return the state of a grant at ``now`` (Unix seconds)."""
    summary = GrantSummary.of(grant) if isinstance(grant, Grant) else grant
    ends, health = summary.expires_at, summary.health
    dead = ends is not None and ends <= now
    renewable = summary.has_refresh_token or summary.grant_type.unattended
    if summary.ended_at is not None:
        return GrantStatus(GrantState.ENDED, Health.ENDED, summary.ended_reason, summary.ended_at)
    if not renewable:
        if dead:
            return GrantStatus(GrantState.ENDED, Health.ENDED, EXPIRED, ends)
        return GrantStatus(GrantState.DEGRADED, Health.DEGRADED, NOT_RENEWABLE, summary.obtained_at)
    if health.refused_at is not None and not dead:
        # Once the token is dead, the renewal is tried once more.
        return GrantStatus(GrantState.DEGRADED, Health.DEGRADED, health.failure, health.refused_at, ends)
    if health.failing_since is not None:
        retry = background_retry(health)
        # One that is past comes with the next request.
        retry = retry if retry is not None and retry > now else None
        if health.rejected_since is not None and not dead:
            since = health.rejected_since
            return GrantStatus(GrantState.DEGRADED, Health.DEGRADED, health.failure, since, retry, is_retried=True)
        return GrantStatus(GrantState.ACTIVE, Health.RETRYING, health.failure, health.failing_since, retry)
    if summary.refresh_begun_at is not None:
        return GrantStatus(GrantState.ACTIVE, Health.REFRESHING, since=summary.refresh_begun_at)
    if dead:
        return GrantStatus(GrantState.EXPIRED, Health.EXPIRED, health.failure, ends)
    return GrantStatus(GrantState.ACTIVE, Health.FRESH, _warning(summary, now), summary.obtained_at)


def word(status: GrantStatus | None, *, authorizing: bool = False, unreachable: bool = False) -> Word:
    """Return the word for a connection, whose grant has this status; None if it has no grant.

    ``authorizing``: a flow waits for its user. It does not hide that the grant can still be used.
    """
    if unreachable:
        return Word.UNREACHABLE
    usable = status is not None and status.state in (GrantState.ACTIVE, GrantState.DEGRADED)
    if authorizing and not usable:
        return Word.AUTHORIZING
    if status is None:
        return Word.NEEDS_CONSENT
    if status.health in (Health.FRESH, Health.REFRESHING):
        return Word.CONNECTED
    return Word(status.health.value)
