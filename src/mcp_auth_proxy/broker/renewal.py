"""Renew grants: when to renew, one renewal at a time, with the intent stored before anything is sent."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace

from mcp_auth_proxy.broker.backoff import Backoff, Subject, of_grant, of_issuer, of_tokens
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal, authorize_again, moment
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    ClientNotActive,
    StoreUnavailable,
    TokenRefused,
)
from mcp_auth_proxy.models import Grant, TokenSet
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

MARGIN_SHARE = 0.2
"""A token is renewed when this share of its lifetime is left."""

MARGIN_MAX = 240.0
"""Maximum seconds that are left when a token is renewed."""

JITTER = 0.2
"""Share by which times are varied at random, so that replicas and servers with one lifetime do not renew in step."""

SAVE_DELAYS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to store tokens that have been issued."""

ENDING_ERRORS = frozenset({"invalid_grant", "invalid_client"})
"""Errors of the token endpoint after which a grant can't be renewed any more (RFC 6749 §5.2)."""


MAX_FAILURES = 1000
"""Failed renewals that are remembered."""


class GrantEnded(Exception):
    """Signal within the broker: the grant is over, and a new authorization is needed."""


def renewable(grant: Grant) -> bool:
    """Return whether new tokens can be obtained without a user."""
    return grant.grant_type.repeatable or grant.tokens.refresh_token is not None


def renew_at(tokens: TokenSet) -> float | None:
    """Return when to renew, in Unix seconds: a fifth of the lifetime before expiry, at most 4 minutes.

    None if the lifetime is unknown.
    """
    if tokens.expires_at is None:
        return None
    lifetime = max(0.0, tokens.expires_at - tokens.obtained_at)
    margin = min(lifetime * MARGIN_SHARE, MARGIN_MAX)
    return tokens.expires_at - margin * (1 + JITTER * random.random())


class Renewer:
    """Renew grants. The caller makes sure that one grant is renewed only once at a time in this process."""

    def __init__(
        self,
        *,
        token_client: TokenClient,
        registrar: ClientRegistrar,
        grants: Grants,
        backoff: Backoff,
        outages: OutageLog,
        journal: ConnectionJournal,
        clock: Callable[[], float],
    ) -> None:
        self._token_client = token_client
        self._journal = journal
        self._registrar = registrar
        self._grants = grants
        self._backoff = backoff
        self._outages = outages
        self._clock = clock
        self._owner = lease.new_owner()
        self.failures: dict[int, str] = {}
        """Why the last renewal of a grant failed, by the grant's id, if it did for a reason that passes."""

    async def renew(self, server: ServerSettings, grant: Grant) -> Grant:
        """Return the grant with new tokens, which are stored already. Nothing is sent during a pause.

        Raises GrantEnded if the grant is over; AuthorizationServerUnavailable if the server has to be asked later;
        StoreUnavailable, before anything is sent, if the result could not be stored.
        """
        self._backoff.check(*_subjects(grant), of_tokens(grant.key.account))
        current = await self._grants.get(grant.id)
        if current is None or current.ended_at is not None:
            raise GrantEnded
        if current.version != grant.version:
            self.failures.pop(current.id, None)
            return current
        if not await self._grants.begin_refresh(
            current.id, version=current.version, owner=self._owner, now=self._clock()
        ):
            return await self._renewed_by_another(current)
        try:
            tokens = await self._token_client.refresh(server, current)
        except TokenRefused as refused:
            return await self._refused(server, current, refused)
        except ClientNotActive as gone:
            await self._grants.end(current.id, version=current.version, reason=str(gone), now=self._clock())
            self._journal.ended(current.key.account, str(gone))
            raise GrantEnded from None
        except AuthorizationError as failure:
            raise await self._failed(current, failure) from None
        self._backoff.succeeded(*_subjects(current))
        self.failures.pop(current.id, None)
        self._journal.renewed(current.key.account)
        stored = await self._save_with_retry(current, tokens)
        if stored is None:
            # Fenced off: another process took over the lease, so its result is the one to use.
            return await self._renewed_by_another(current)
        metrics.refreshes.labels(metrics.server_label(server.name), "renewed").inc()
        logger.info("renewed the grant of server %s", server.name)
        return stored

    def retry_at(self, grant: Grant) -> float | None:
        """Return when a renewal may be tried again, in Unix seconds; None if the last one did not fail."""
        ends = self._backoff.retry_at(*_subjects(grant), of_tokens(grant.key.account))
        # Not all grants of an issuer at once: the first failure is a pause for the others.
        return None if ends is None else ends + (ends - self._clock()) * JITTER * random.random()

    async def _save_with_retry(self, grant: Grant, tokens: TokenSet) -> Grant | None:
        """Store new tokens before anyone uses them.

        The old refresh token may be invalid already, so a store that fails is tried again and again.
        """
        for delay in SAVE_DELAYS:
            try:
                return await self._grants.renewed(grant.id, version=grant.version, owner=self._owner, tokens=tokens)
            except StoreUnavailable as failure:
                logger.error(
                    "the renewed tokens of server %s can't be stored yet: %s", grant.key.account.server, failure
                )
                await asyncio.sleep(delay)
        return await self._grants.renewed(grant.id, version=grant.version, owner=self._owner, tokens=tokens)

    async def _failed(self, grant: Grant, failure: AuthorizationError) -> AuthorizationServerUnavailable:
        """Remember a temporary failure; return the error for requests that need the token."""
        unavailable = failure if isinstance(failure, AuthorizationServerUnavailable) else None
        error = AuthorizationServerUnavailable(str(failure), server_retry_after=failure.server_retry_after)
        first = grant.id not in self.failures
        self.failures[grant.id] = str(error)
        if len(self.failures) > MAX_FAILURES:
            del self.failures[next(iter(self.failures))]
        issuer, own = _subjects(grant)
        self._backoff.failed(issuer if unavailable else own, error)
        # If the response was lost, the intent stays stored: the refresh token may be used up, and the next try
        # should know.
        keep = unavailable is not None and unavailable.maybe_processed
        health = replace(
            grant.health,
            failing_since=grant.health.failing_since or self._clock(),
            failure=str(error),
            next_try_at=self.retry_at(grant),
        )
        await self._grants.note_failure(grant.id, version=grant.version, owner=self._owner, health=health, keep=keep)
        metrics.refreshes.labels(metrics.server_label(grant.key.account.server), "failed").inc()
        self._warn(grant, error, first=first)
        self._journal.not_renewed(grant.key.account, str(error))
        return error

    def _warn(self, grant: Grant, error: AuthorizationServerUnavailable, *, first: bool) -> None:
        """Log a failed renewal: the first of each grant, and those that follow at a bounded rate."""
        account, ends, retry_at = grant.key.account, grant.tokens.expires_at, self.retry_at(grant)
        after = f" It is tried again at {moment(retry_at)}." if retry_at is not None else ""
        until = (
            "" if ends is None else f" Its token {'ends' if ends > self._clock() else 'has ended'} at {moment(ends)}."
        )
        reason = f"its grant can't be renewed now: {error}{after}{until}"
        if first and not self._outages.is_due(account.server):
            logger.warning("server %s: %s", account.shown, reason)
        else:
            self._outages.warn(account.server, reason)

    async def _refused(self, server: ServerSettings, grant: Grant, refused: TokenRefused) -> Grant:
        """End the grant if the error says so (RFC 6749 §5.2), unless another process has renewed it since."""
        if refused.error not in ENDING_ERRORS:
            raise await self._failed(grant, refused) from None
        if refused.error == "invalid_client":
            await self._registrar.forget(grant.registration)
        reason = str(refused)
        if grant.refresh_begun_at is not None:
            reason = f"a renewal was interrupted before its result was stored. {reason}"
        self._backoff.succeeded(of_grant(grant))
        self.failures.pop(grant.id, None)
        if not await self._grants.end(grant.id, version=grant.version, reason=reason, now=self._clock()):
            newer = await self._grants.get(grant.id)
            if newer is not None and newer.ended_at is None:
                return newer
        metrics.refreshes.labels(metrics.server_label(grant.key.account.server), "ended").inc()
        todo = authorize_again(grant.key.account, server)
        logger.warning("the grant of server %s has ended: %s %s", grant.key.account.shown, reason, todo)
        self._journal.ended(grant.key.account, reason)
        raise GrantEnded

    async def _renewed_by_another(self, grant: Grant) -> Grant:
        """Wait at most 10 seconds for the process that holds the lease; return what it stored."""
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


def _subjects(grant: Grant) -> tuple[Subject, Subject]:
    """Return what a failed renewal pauses: its issuer, if that can't be used now, or else the grant."""
    return of_issuer(grant.key.account.server, grant.key.issuer), of_grant(grant)
