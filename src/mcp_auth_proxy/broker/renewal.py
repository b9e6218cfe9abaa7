"""Renew grants: when to renew, one renewal at a time, with the intent stored before anything is sent."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from math import inf

from mcp_auth_proxy.broker import refusals
from mcp_auth_proxy.broker.backoff import Backoff, Subject, of_grant, of_issuer, of_tokens
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal, authorize_again, moment
from mcp_auth_proxy.broker.refresh_rate import RefreshRate
from mcp_auth_proxy.broker.renewal_lease import ATTEMPT_SECONDS, Attempt, GrantEnded, begin_renewal
from mcp_auth_proxy.broker.states import REJECTED_PAUSE, background_retry
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    ClientNotActive,
    RefreshRateExceeded,
    StoreUnavailable,
    TokenRefused,
    excerpt,
)
from mcp_auth_proxy.models import HEALTHY, Grant, RenewalHealth, TokenSet
from mcp_auth_proxy.net.deadline import patient_timeout
from mcp_auth_proxy.oauth import jwt_expiry
from mcp_auth_proxy.oauth.fetch import paced, sent_only_while
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store.grants import Grants

_INTERRUPTED = "a renewal was interrupted before its result was stored."
logger = logging.getLogger(__name__)

MARGIN_SHARE = 0.2
"""A token is renewed when this share of its lifetime is left."""

MARGIN_MAX = 240.0
"""Maximum seconds that are left when a token is renewed."""

JITTER = 0.2
"""Share by which times are varied at random, so that replicas and servers with one lifetime do not renew in step."""

LONG = 3600.0
"""Seconds of failed renewals after which the log says what a person can do."""

MAX_REJECTIONS = 1000
"""Grants of which it is remembered that a person has to mend something."""

SAVE_SECONDS = 8.0
"""Seconds that a renewal waits until its tokens are stored; a request gets an error then."""

UNSAVED_INTERVAL = 0.2
"""Seconds between attempts to store tokens that have been issued: as soon as the store is back, before another process
takes over, or this one is killed."""


def renewable(grant: Grant) -> bool:
    """Return whether new tokens can be obtained without a user."""
    return grant.grant_type.repeatable or grant.tokens.refresh_token is not None


def renew_at(tokens: TokenSet) -> float | None:
    """Return when to renew, in Unix seconds: a fifth of the lifetime before expiry, at most 4 minutes.

    If the server did not say when the token expires, the token itself may, as a hint. None if neither did.
    """
    expires_at = tokens.expires_at or jwt_expiry.read(tokens.access_token, obtained_at=tokens.obtained_at)
    if expires_at is None:
        return None
    lifetime = max(0.0, expires_at - tokens.obtained_at)
    margin = min(lifetime * MARGIN_SHARE, MARGIN_MAX)
    return expires_at - margin * (1 + JITTER * random.random())


def _always() -> bool:
    return True


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Who wants a renewal, and how much. The functions are asked while it goes on."""

    needed: Callable[[], bool] = _always
    """Whether the token is dead, so that the renewal of a process that may be alive has to be taken over once its lease
    has ended."""
    rejected: Callable[[], bool] = _never
    """Whether the server has answered 401 to the access token."""
    asked: bool = False
    """A person wants it."""
    background: bool = False
    """Nobody waits for it: those that a request waits for have their turns first."""
    has_turn: bool = False
    """It has waited for its turn already."""


_REQUEST = Demand()


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
        rate: RefreshRate,
        clock: Callable[[], float],
        settled: Callable[[], bool] = lambda: True,
    ) -> None:
        """``settled``: whether the store was in reach for a while, so that whoever has new tokens could store them."""
        self._token_client = token_client
        self._journal = journal
        self.rate = rate
        self._registrar = registrar
        self._grants = grants
        self._backoff = backoff
        self._outages = outages
        self._clock = clock
        self._owner = grants.owners.new()
        self.settled = settled
        self._unsaved: dict[int, asyncio.Task[Grant | None]] = {}
        """By the grant's id: new tokens that are being stored."""
        self._rejections: dict[int, RenewalHealth] = {}
        """The grants whose last renewal here was refused with an error that only a person can mend, by id."""

    async def renew(self, server: ServerSettings, grant: Grant, demand: Demand = _REQUEST) -> Grant:
        """Return the grant with new tokens, which are stored already. Nothing is sent during a pause.

        It waits for its turn (``refresh_rate``). If the renewal is refused while the access token works, the grant is
        returned with it, degraded; so it is, without a request, until the token is dead, unless a person has asked.

        Raises GrantEnded if the grant is over; AuthorizationServerUnavailable if the server has to be asked later,
        HeldElsewhere if the renewal is not ``needed`` yet; StoreUnavailable, before anything is sent, if the result
        could not be stored.
        """
        unsaved = self._unsaved.get(grant.id)
        if unsaved is not None and (stored := await self._saved(grant, unsaved)) is not None:
            return stored
        self._backoff.check(*_subjects(grant), of_tokens(grant.key.account))
        self._rejections.pop(grant.id, None)
        current, attempt = await self._begin(grant, demand)
        if attempt is None:
            return current
        try:
            tokens = await self._request(server, current, attempt)
        except TokenRefused as refused:
            return await self._refused(server, current, refused, demand.rejected)
        except ClientNotActive as gone:
            if await self._grants.end(current.id, version=current.version, reason=str(gone), now=self._clock()):
                self._journal.ended(current.key.account, str(gone))
            raise GrantEnded from None
        except RefreshRateExceeded:
            # A pause has begun since its turn, and nothing was sent.
            await self._grants.note_failure(
                current.id, version=current.version, owner=self._owner, health=current.health, keep=False
            )
            raise
        except AuthorizationError as failure:
            raise await self._failed(current, failure) from None
        self._backoff.succeeded(*_subjects(current))
        while (stored := await self._save_with_retry(current, tokens)) is None:
            # Fenced off: another process took over. Its result is the one to use, if it comes to one.
            current, again = await self._take_over(grant, demand)
            if again is None:
                return current
        metrics.refreshes.labels(metrics.server_label(server.name), "renewed").inc()
        recovered = current.health != HEALTHY
        self._journal.renewed(current.key.account, recovered=recovered)
        logger.info(
            "server %s: the renewal works again" if recovered else "renewed the grant of server %s", server.name
        )
        return stored

    async def _begin(self, grant: Grant, demand: Demand) -> tuple[Grant, Attempt | None]:
        """Begin a renewal when its turn has come and no other process renews the grant; see ``begin_renewal``."""
        issuer, has_turn = grant.key.issuer, demand.has_turn
        attempt: Attempt | None = None

        async def take_turn() -> None:
            nonlocal has_turn
            if not has_turn:
                expires_at = grant.tokens.expires_at or inf
                await self.rate.turn(issuer, key=grant.id, background=demand.background, expires_at=expires_at)
                has_turn = True
                # Another grant of the issuer may have begun a pause.
                self._backoff.check(*_subjects(grant), of_tokens(grant.key.account))

        try:
            current, attempt = await self._take_over(grant, demand, take_turn)
            return current, attempt
        finally:
            if has_turn and attempt is None:
                self.rate.unused(issuer)

    async def _take_over(
        self, grant: Grant, demand: Demand, take_turn: Callable[[], Awaitable[None]] | None = None
    ) -> tuple[Grant, Attempt | None]:
        return await begin_renewal(
            self._grants,
            grant.id,
            owner=self._owner,
            clock=self._clock,
            needed=demand.needed,
            settled=self.settled,
            is_done=lambda current: self._is_done(grant, current, demand),
            take_turn=take_turn,
        )

    def _is_done(self, grant: Grant, current: Grant, demand: Demand) -> bool:
        """Return whether there is nothing to renew; raise the error of a moment ago that a person has to mend."""
        same = current.tokens.access_token == grant.tokens.access_token
        if current.version != grant.version and (current.health == HEALTHY or not same):
            return True
        if current.health.refused_at is not None and not demand.asked and self._works(current, demand.rejected):
            return True
        self._check_rejection(current)
        return False

    async def aclose(self) -> None:
        """Stop storing tokens; each save that goes on is tried for a moment more."""
        saving = list(self._unsaved.values())
        if saving:
            await asyncio.wait(saving, timeout=1.0)
            for task in saving:
                task.cancel()
            await asyncio.gather(*saving, return_exceptions=True)

    def _works(self, grant: Grant, rejected: Callable[[], bool]) -> bool:
        return refusals.works(grant, now=self._clock(), rejected=rejected())

    def _check_rejection(self, grant: Grant) -> None:
        """Raise the last error that only a person can mend, whichever process has got it, if it is a moment ago."""
        next_try, now = grant.health.next_try_at, self._clock()
        # If the clock was set back, nobody waits longer for that.
        if grant.health.rejected_since is None or next_try is None:
            return
        if 0 < next_try - now <= REJECTED_PAUSE:
            self._remember(grant.id, grant.health)
            raise AuthorizationServerUnavailable(grant.health.failure, retry_after=next_try - now)

    def _remember(self, grant_id: int, rejection: RenewalHealth) -> None:
        self._rejections[grant_id] = rejection
        if len(self._rejections) > MAX_REJECTIONS:
            del self._rejections[next(iter(self._rejections))]

    def retry_at(self, grant: Grant) -> float | None:
        """Return when a renewal may be tried again, in Unix seconds; None if the last one did not fail."""
        ends = self._backoff.retry_at(*_subjects(grant), of_tokens(grant.key.account))
        rejection = self._rejections.get(grant.id)
        if rejection is not None:
            return max(ends or 0.0, background_retry(rejection) or 0.0)
        # Not all grants of an issuer at once: the first failure is a pause for the others.
        return None if ends is None else ends + (ends - self._clock()) * JITTER * random.random()

    async def _request(self, server: ServerSettings, grant: Grant, attempt: Attempt) -> TokenSet:
        """Request new tokens, in so little time that they are stored before another process may take over."""
        try:
            async with patient_timeout(max(0.0, attempt.seconds_left())):
                issuer = grant.key.issuer
                with (
                    sent_only_while(lambda: attempt.seconds_left() > 0),
                    paced(grant.endpoints.token, lambda: self.rate.sending(issuer)),
                ):
                    return await self._token_client.refresh(server, grant)
        except TimeoutError:
            raise AuthorizationServerUnavailable(
                f"The authorization server {excerpt(grant.key.issuer)} did not answer within {ATTEMPT_SECONDS:.0f} s.",
                maybe_processed=True,
                timed_out=True,
            ) from None

    async def _save_with_retry(self, grant: Grant, tokens: TokenSet) -> Grant | None:
        """Store new tokens before anyone uses them. Return None if another process took over.

        The old refresh token may be invalid already, so a store that fails is tried until it can be used again. Raises
        StoreUnavailable if that takes long; it goes on then.
        """
        saving = asyncio.create_task(self._save(grant, tokens))
        self._unsaved[grant.id] = saving
        saving.add_done_callback(lambda _: self._unsaved.pop(grant.id, None))
        return await self._saved(grant, saving)

    async def _saved(self, grant: Grant, saving: "asyncio.Task[Grant | None]") -> Grant | None:
        await asyncio.wait({saving}, timeout=SAVE_SECONDS)
        if not saving.done():
            server = grant.key.account.server
            raise StoreUnavailable(f"The renewed tokens of server {server} can't be stored now. That is tried again.")
        return saving.result()

    async def _save(self, grant: Grant, tokens: TokenSet) -> Grant | None:
        level = logging.ERROR
        while True:
            try:
                return await self._grants.renewed(grant.id, version=grant.version, owner=self._owner, tokens=tokens)
            except StoreUnavailable as failure:
                server = grant.key.account.server
                logger.log(level, "the renewed tokens of server %s can't be stored yet: %s", server, failure)
                level = logging.DEBUG
            await asyncio.sleep(UNSAVED_INTERVAL)

    async def _failed(self, grant: Grant, failure: AuthorizationError) -> AuthorizationServerUnavailable:
        """Store a failure that passes; return the error for requests that need the token."""
        unavailable = failure if isinstance(failure, AuthorizationServerUnavailable) else None
        error = AuthorizationServerUnavailable(str(failure), server_retry_after=failure.server_retry_after)
        issuer, own = _subjects(grant)
        self._backoff.failed(issuer if unavailable else own, error)
        if unavailable is not None and error.server_retry_after:
            await self.rate.pause(grant.key.issuer, error.server_retry_after)
        health = replace(
            grant.health,
            failing_since=grant.health.failing_since or self._clock(),
            failure=str(error),
            next_try_at=self._backoff.retry_at(issuer, own),
            rejected_since=None,
        )
        # If the response was lost, the intent stays stored: the refresh token may be used up, and the next try
        # should know.
        await self._note_failure(grant, health, error, keep=unavailable is not None and unavailable.maybe_processed)
        return error

    async def _rejected(
        self, server: ServerSettings, grant: Grant, refused: TokenRefused
    ) -> AuthorizationServerUnavailable:
        """Store an error that only a person can mend; return the error for requests that need the token."""
        now = self._clock()
        text = f"{refused} {refusals.remedy(refused.error, grant, server, now=now)}"
        error = AuthorizationServerUnavailable(text)
        self._backoff.failed(of_grant(grant), error, pause=REJECTED_PAUSE)
        health = refusals.after_rejection(grant.health, text, now=now)
        self._remember(grant.id, health)
        await self._note_failure(grant, health, error, keep=False)
        if grant.health.rejected_since is None:
            self._journal.degraded(grant.key.account, text)
        return error

    async def _note_failure(
        self, grant: Grant, health: RenewalHealth, error: AuthorizationServerUnavailable, *, keep: bool
    ) -> None:
        await self._grants.note_failure(grant.id, version=grant.version, owner=self._owner, health=health, keep=keep)
        metrics.refreshes.labels(metrics.server_label(grant.key.account.server), "failed").inc()
        self._warn(grant, error, health)
        self._journal.not_renewed(grant.key.account, str(error))

    def _warn(self, grant: Grant, error: AuthorizationServerUnavailable, health: RenewalHealth) -> None:
        """Log a failed renewal: the first of each grant, and those that follow at a bounded rate."""
        account, ends, retry_at = grant.key.account, grant.tokens.expires_at, background_retry(health)
        after = f" It is tried again at {moment(retry_at)}." if retry_at is not None else ""
        until = (
            "" if ends is None else f" Its token {'ends' if ends > self._clock() else 'has ended'} at {moment(ends)}."
        )
        since = health.failing_since or self._clock()
        if self._clock() - since >= LONG:
            after += f" It has failed since {moment(since)}. {authorize_again(account, None, by_link=False)}"
        reason = f"its grant can't be renewed now: {error}{after}{until}"
        if grant.health.failing_since is None and not self._outages.is_due(account.server):
            logger.warning("server %s: %s", account.shown, reason)
        else:
            self._outages.warn(account.server, reason)

    async def _refused(
        self, server: ServerSettings, grant: Grant, refused: TokenRefused, rejected: Callable[[], bool]
    ) -> Grant:
        """Do what ``broker.refusals`` says about an error; return the grant if it goes on."""
        final = refusals.is_final(grant, refused.error, now=self._clock())
        if refused.error in refusals.REJECTING_ERRORS and not final:
            raise await self._rejected(server, grant, refused) from None
        if refused.error not in refusals.ENDING_ERRORS and not final:
            raise await self._failed(grant, refused) from None
        self._backoff.succeeded(of_grant(grant))
        if not final and self._works(grant, rejected):
            return await self._degraded(server, grant, refused)
        return await self._ended(server, grant, refused)

    async def _degraded(self, server: ServerSettings, grant: Grant, refused: TokenRefused) -> Grant:
        """Keep a grant whose renewal was refused while its token works; return it, marked as such."""
        health = RenewalHealth(refused_at=grant.health.refused_at or self._clock(), failure=_reason(grant, refused))
        noted = await self._grants.note_refusal(grant.id, version=grant.version, owner=self._owner, health=health)
        if noted is None:
            # Fenced off: another process took over.
            newer = await self._grants.get(grant.id)
            if newer is None or newer.ended_at is not None:
                raise GrantEnded
            return newer
        metrics.refreshes.labels(metrics.server_label(server.name), "failed").inc()
        if grant.health.refused_at is None:
            account, ends = grant.key.account, grant.tokens.expires_at
            until = "until the server refuses it" if ends is None else f"until {moment(ends)}"
            logger.warning(
                "server %s: its grant is degraded: %s Its token is used %s, then the renewal is tried once more. %s",
                account.shown,
                refused,
                until,
                authorize_again(account, server, by_link=False),
            )
            self._journal.degraded(account, str(refused))
        return noted

    async def _ended(self, server: ServerSettings, grant: Grant, refused: TokenRefused) -> Grant:
        """End a grant, unless another process has renewed it since: then return that."""
        if refused.error == "invalid_client":
            await self._registrar.forget(grant.registration)
        reason = _reason(grant, refused)
        if not await self._grants.end(grant.id, version=grant.version, reason=reason, now=self._clock()):
            newer = await self._grants.get(grant.id)
            if newer is not None and newer.ended_at is None:
                return newer
            raise GrantEnded
        metrics.refreshes.labels(metrics.server_label(grant.key.account.server), "ended").inc()
        todo = authorize_again(grant.key.account, server)
        logger.warning("the grant of server %s has ended: %s %s", grant.key.account.shown, reason, todo)
        self._journal.ended(grant.key.account, reason)
        raise GrantEnded


def _reason(grant: Grant, refused: TokenRefused) -> str:
    """Return why a grant was refused: maybe because an earlier renewal, also one before the last, was interrupted."""
    if grant.refresh_begun_at is not None or grant.health.failure.startswith(_INTERRUPTED):
        return f"{_INTERRUPTED} {refused}"
    return str(refused)


def _subjects(grant: Grant) -> tuple[Subject, Subject]:
    """Return what a failed renewal pauses: its issuer, if that can't be used now, or else the grant."""
    return of_issuer(grant.key.account.server, grant.key.issuer), of_grant(grant)
