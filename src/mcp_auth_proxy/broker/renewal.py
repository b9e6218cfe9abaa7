"""When to renew a grant, and how: one renewal at a time, intent written before anything is sent."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from mcp_auth_proxy.broker.planning import Authorizer
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    StoreUnavailable,
    TokenRefused,
)
from mcp_auth_proxy.models import Grant, TokenSet
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

MARGIN_SHARE = 0.2
"""Share of a token's lifetime that is left when it is renewed."""

MARGIN_MAX = 240.0
"""Seconds: the most that is left when it is renewed."""

BACKOFF_FIRST = 1.0
BACKOFF_MAX = 300.0
"""Seconds between attempts after a failure that passes, doubling; a server's own Retry-After may prolong them."""

REQUEST_GATE = 5.0
"""Seconds: a request with a dead token does not wait out a longer pause than this before it tries again."""

SAVE_DELAYS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to store tokens that were already renewed."""

ENDING_ERRORS = frozenset({"invalid_grant", "invalid_client"})
"""Token errors after which the grant can't be renewed any more (RFC 6749 §5.2)."""


class GrantEnded(Exception):
    """A signal within the broker: the grant is over, and a new authorization is needed."""


def renewable(grant: Grant) -> bool:
    """Whether new tokens can be had without a user."""
    return grant.grant_type.repeatable or grant.tokens.refresh_token is not None


def renew_at(tokens: TokenSet) -> float | None:
    """Return when to renew, in Unix seconds: a fifth of the lifetime ahead, at most 4 minutes, with jitter."""
    if tokens.expires_at is None:
        return None
    lifetime = max(0.0, tokens.expires_at - tokens.obtained_at)
    margin = min(lifetime * MARGIN_SHARE, MARGIN_MAX)
    # Jitter only moves it earlier: replicas and servers that share a lifetime should not renew in step.
    return tokens.expires_at - margin * (1 + 0.2 * random.random())


@dataclass(slots=True)
class _Backoff:
    """What is remembered after a renewal that failed for a reason that passes."""

    failures: int
    failed_at: float
    error: AuthorizationServerUnavailable

    @property
    def seconds(self) -> float:
        return float(min(max(BACKOFF_FIRST * 2 ** (self.failures - 1), self.error.asked_pause), BACKOFF_MAX))


class Renewer:
    """Renews grants. Whoever calls makes sure that one grant is renewed once at a time."""

    def __init__(self, *, authorizer: Authorizer, grants: Grants, clock: Callable[[], float]) -> None:
        self._authorizer = authorizer
        self._grants = grants
        self._clock = clock
        self._pauses: dict[int, _Backoff] = {}
        self._owner = lease.new_owner()

    async def renew(self, server: ServerSettings, grant: Grant) -> Grant:
        """Return the grant with new tokens, durable already.

        Raises GrantEnded when it is over, AuthorizationServerUnavailable when the server is to be asked later, and
        StoreUnavailable before anything is sent when the result could not be kept.
        """
        self._check_backoff(grant)
        current = await self._grants.get(grant.id)
        if current is None or current.ended_at is not None:
            raise GrantEnded
        if current.version != grant.version:
            return current
        if not await self._grants.begin_refresh(
            current.id, version=current.version, owner=self._owner, now=self._clock()
        ):
            return await self._renewed_by_another(current)
        try:
            tokens = await self._authorizer.refresh(server, current)
        except TokenRefused as refused:
            return await self._refused(current, refused)
        except AuthorizationError as failure:
            raise await self._failed(current, failure) from None
        self._pauses.pop(current.id, None)
        stored = await self._save_with_retry(current, tokens)
        if stored is None:
            # Fenced off: another process took the lease over. What it stored is what counts.
            return await self._renewed_by_another(current)
        metrics.refreshes.labels(server.name, "renewed").inc()
        logger.info("renewed the grant of server %s", server.name)
        return stored

    async def _save_with_retry(self, grant: Grant, tokens: TokenSet) -> Grant | None:
        """Store the new tokens before anyone uses them; the old ones are spent, so a store in trouble is waited for."""
        for delay in SAVE_DELAYS:
            try:
                return await self._grants.renewed(grant.id, version=grant.version, owner=self._owner, tokens=tokens)
            except StoreUnavailable as failure:
                logger.error(
                    "the renewed tokens of server %s can't be stored yet: %s", grant.key.account.server, failure
                )
                await asyncio.sleep(delay)
        return await self._grants.renewed(grant.id, version=grant.version, owner=self._owner, tokens=tokens)

    def retry_in(self, grant: Grant) -> float | None:
        """Return the seconds until the next attempt after a failure that passes; None where there was none."""
        pause = self._pauses.get(grant.id)
        return pause.seconds * (1 + 0.2 * random.random()) if pause else None

    def _check_backoff(self, grant: Grant) -> None:
        pause = self._pauses.get(grant.id)
        if pause is None:
            return
        left = pause.failed_at + min(pause.seconds, REQUEST_GATE) - self._clock()
        # A clock that was set back must not make the pause longer than it is.
        if 0 < left <= REQUEST_GATE:
            raise AuthorizationServerUnavailable(str(pause.error), retry_after=max(left, 1.0))

    async def _failed(self, grant: Grant, failure: AuthorizationError) -> AuthorizationServerUnavailable:
        """Remember a failure that passes, and return it as what a request is told."""
        passing = failure if isinstance(failure, AuthorizationServerUnavailable) else None
        error = AuthorizationServerUnavailable(
            str(failure),
            retry_after=max(1.0, passing.retry_after if passing else 5.0),
            asked_pause=passing.asked_pause if passing else 0.0,
        )
        before = self._pauses.get(grant.id)
        self._pauses[grant.id] = _Backoff(before.failures + 1 if before else 1, self._clock(), error)
        # Where the answer is missing, the intent stays: the refresh token may be spent, and the next try should know.
        if passing is None or not passing.maybe_processed:
            await self._grants.release_refresh(grant.id, version=grant.version, owner=self._owner)
        metrics.refreshes.labels(grant.key.account.server, "failed").inc()
        logger.warning("the grant of server %s can't be renewed now: %s", grant.key.account.server, error)
        return error

    async def _refused(self, grant: Grant, refused: TokenRefused) -> Grant:
        """End the grant where the refusal says so (RFC 6749 §5.2), unless another process has renewed it since."""
        if refused.error not in ENDING_ERRORS:
            raise await self._failed(grant, refused) from None
        if refused.error == "invalid_client":
            await self._authorizer.forget_client(grant.registration)
        reason = str(refused)
        if grant.refresh_begun_at is not None:
            reason = f"a renewal was cut short before its result was stored. {reason}"
        self._pauses.pop(grant.id, None)
        if not await self._grants.end(grant.id, version=grant.version, reason=reason, now=self._clock()):
            newer = await self._grants.get(grant.id)
            if newer is not None and newer.ended_at is None:
                return newer
        metrics.refreshes.labels(grant.key.account.server, "ended").inc()
        logger.warning("the grant of server %s has ended: %s", grant.key.account.server, reason)
        raise GrantEnded

    async def _renewed_by_another(self, grant: Grant) -> Grant:
        """Wait, bounded, for the process that holds the lease; return what it stored."""
        for _ in range(100):
            current = await self._grants.get(grant.id)
            if current is None or current.ended_at is not None:
                raise GrantEnded
            if current.version != grant.version:
                return current
            if current.refresh_begun_at is None:
                break
            await asyncio.sleep(0.1)
        raise AuthorizationServerUnavailable(
            f"Another process is renewing the grant of server {grant.key.account.server} and has not finished.",
            retry_after=2.0,
        )
