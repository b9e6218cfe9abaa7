"""The tokens in use, by account, and their renewal ahead of expiry.

Everything here can be loaded again from the store.
"""

import asyncio
import itertools
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mcp_auth_proxy.broker import dpop, early_renewal
from mcp_auth_proxy.broker.matching import configured, matches, server_reconfigured
from mcp_auth_proxy.broker.renewal import Demand, Renewer, renew_at, renewable
from mcp_auth_proxy.broker.renewal_lease import LONGEST_WAIT, TAKEOVER_AHEAD, GrantEnded, HeldElsewhere
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, McpAuthProxyError
from mcp_auth_proxy.models import AccessToken, Account, Grant
from mcp_auth_proxy.store.comparison import GrantVersion
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

LONGEST_TIMER = 86_400.0
"""Maximum seconds of a timer. Longer waits take several: the clock may be set in the meantime."""

RETRY_DELAY = 1.0
"""Seconds after which a renewal that failed is tried again if nothing pauses it, and up to as many more."""

LOOK_AHEAD = 15.0
"""Seconds between two looks for tokens that are too many to be renewed within their margins."""

LOOKED_AT = 2_000
"""Tokens that are looked at before others have their turn on the event loop."""

MAX_WITHOUT_GRANT = 10_000
"""Accounts that are remembered to have no grant; beyond it, all are forgotten: a caller may name any account."""


@dataclass(slots=True)
class CachedToken:
    """A grant in use, with what each request needs to know about it. Times are Unix seconds."""

    grant: Grant
    token: AccessToken
    renew_at: float
    expires_at: float
    used: bool = False
    """Whether somebody has asked for the token, or waits for it. An unused one is not renewed ahead of expiry."""
    used_at: float = 0.0
    """When a request was sent with it at once; 0 if none was."""
    used_before: float = 0.0
    """When a request was sent with the tokens before this one; 0 if that is not known."""
    timer: asyncio.TimerHandle | None = None
    rejected: bool = False
    """Whether the server has answered 401 to it."""
    queued: bool = False
    """Whether it waits for a turn to be renewed in the background."""


class TokenCache:
    """Hand out tokens and renew them. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        grants: Grants,
        renewer: Renewer,
        clock: Callable[[], float],
    ) -> None:
        """``servers`` may change at any time; see ``servers_changed``."""
        self._servers = servers
        self._grants = grants
        self._renewer = renewer
        self._clock = clock
        self._generations = itertools.count(1)
        self._nonces = dpop.Nonces()
        self._cached: dict[Account, CachedToken] = {}
        self._negative: set[Account] = set()
        """Accounts that are known to have no grant."""
        self._awaited: set[Account] = set()
        """Accounts that had no grant when they were last asked for: another process may store one."""
        self._callbacks: dict[object, Callable[[Account], None]] = {}
        self._invalidations = 0
        """Incremented by each invalidation. What was read from the store before one is read again."""
        self._loading: SingleFlight[Account, CachedToken | None] = SingleFlight()
        self._renewing: SingleFlight[Account, CachedToken | None] = SingleFlight()
        self._needed: set[Account] = set()
        """Accounts whose renewal somebody waits for, because the token is dead."""
        self._interrupted: dict[Account, float] = {}
        """Renewals that dead processes have begun, and when: those that were looked at already."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking_ahead: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Stop all background work. A renewal in progress may finish: its refresh token may be used up already."""
        for cached in self._cached.values():
            if cached.timer is not None:
                cached.timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._renewing.settle(timeout=10.0)
        for flight in (self._loading, self._renewing):
            await flight.aclose()
        await self._renewer.aclose()

    # For requests

    async def token(self, account: Account) -> AccessToken | None:
        """Return the token to send; None if there is no grant.

        Raises AuthorizationError if the server was removed from the configuration, AuthorizationServerUnavailable if
        the token has expired and can't be renewed now, and StoreError.
        """
        cached = self._cached.get(account)
        if cached is not None:
            now = self._clock()
            if now < cached.expires_at:
                if now >= cached.renew_at and account not in self._renewing:
                    self._renew_soon(account, cached)
                cached.used_at = now
                return cached.token
        elif account in self._negative:
            return None
        return await self._load_or_renew(account, cached)

    def token_nowait(self, account: Account) -> tuple[bool, AccessToken | None]:
        """Return (ready, token). ``ready`` is False if the caller must await ``token()`` instead.

        A token of None with ``ready`` means that there is no grant.
        """
        cached = self._cached.get(account)
        if cached is None:
            return account in self._negative, None
        cached.used_at = now = self._clock()
        return now < cached.renew_at and now < cached.expires_at, cached.token

    async def _load_or_renew(self, account: Account, cached: CachedToken | None) -> AccessToken | None:
        cached = cached or await self.load(account)
        if cached is None:
            return None
        cached.used = True
        cached.used_at = now = self._clock()
        if now < cached.expires_at or not renewable(cached.grant):
            # A token that can't be renewed is tried even if it seems expired: perhaps the clock is wrong.
            if now >= cached.renew_at and account not in self._renewing:
                self._renew_soon(account, cached)
            return cached.token
        renewed = await self.renew(account, cached)
        return renewed.token if renewed else None

    # For the broker

    def on_connected(self, callback: Callable[[Account], None]) -> Callable[[], None]:
        """Subscribe to new grants: see ``Broker.on_connected``."""
        key = object()
        self._callbacks[key] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(key, None)

        return unsubscribe

    def states(self) -> dict[tuple[str, ...], float]:
        """Return how many cached tokens are valid, renewing or expired."""
        states: dict[tuple[str, ...], float] = {("valid",): 0, ("renewing",): 0, ("expired",): 0}
        now = self._clock()
        for account, cached in self._cached.items():
            expired = now >= cached.expires_at
            states["renewing" if account in self._renewing else "expired" if expired else "valid",] += 1
        return states

    def get(self, account: Account) -> CachedToken | None:
        """Return the cached token, without reading the store."""
        return self._cached.get(account)

    def last_used_at(self, account: Account) -> float | None:
        """Return when a request was last sent with a token of an account; None if that is not known."""
        cached = self._cached.get(account)
        return None if cached is None else max(cached.used_at, cached.used_before) or None

    def accounts(self) -> set[Account]:
        """Return the accounts that have a cached token."""
        return set(self._cached)

    def versions(self) -> dict[Account, GrantVersion]:
        """Return which grants are cached."""
        return {
            account: GrantVersion(cached.grant.id, cached.grant.version) for account, cached in self._cached.items()
        }

    def awaited(self) -> set[Account]:
        """Return the accounts that had no grant when they were last asked for."""
        return set(self._awaited)

    def is_renewing(self, account: Account) -> bool:
        """Return whether a renewal is in progress."""
        return account in self._renewing

    async def stored(self, account: Account) -> Grant | None:
        """Return the stored grant that may be used for an account, if there is one. Raises StoreError."""
        grant = await self._grants.current(account)
        return grant if grant is not None and self.is_usable(grant) else None

    def is_usable(self, grant: Grant) -> bool:
        """Return whether a stored grant is for its server as that is configured now."""
        account = grant.key.account
        server = self._servers.get(account.server)
        if server is None or matches(grant, server):
            return server is not None
        logger.warning(
            "the grant of server %s is for another server or issuer than configured; it is not used", account.server
        )
        return False

    async def load(self, account: Account) -> CachedToken | None:
        """Cache the stored grant of an account; return None if there is none.

        Raises AuthorizationError if the server was removed from the configuration, and StoreError.
        """
        return await self._loading.run(account, lambda: self._load(account))

    async def _load(self, account: Account) -> CachedToken | None:
        while True:
            before = self._invalidations
            grant = await self.stored(account)
            if before == self._invalidations:
                break
        configured(self._servers, account.server)
        if grant is not None:
            return self.put(account, grant)
        if account not in self._cached:
            for known in (self._negative, self._awaited):
                if len(known) >= MAX_WITHOUT_GRANT:
                    known.clear()
                known.add(account)
        return self._cached.get(account)

    def put(self, account: Account, grant: Grant) -> CachedToken:
        """Cache a stored grant, unless it is cached already.

        Raises AuthorizationError if the server was removed, or changed so that the grant is not for it.
        """
        server = configured(self._servers, account.server)
        if not matches(grant, server):
            raise server_reconfigured(server.name)
        before = self._cached.get(account)
        if before is not None:
            if (before.grant.id, before.grant.version) == (grant.id, grant.version):
                return before
            if before.timer is not None:
                before.timer.cancel()
        # A refusal to renew is a new version of the grant, but the token is the one that it was.
        same = before is not None and before.grant.tokens.access_token == grant.tokens.access_token
        generation = before.token.generation if before is not None and same else next(self._generations)
        cached = CachedToken(
            grant=grant,
            token=dpop.access_token(grant, server, generation, nonces=self._nonces, clock=self._clock),
            renew_at=self._renew_at(grant),
            expires_at=float("inf") if grant.tokens.expires_at is None else grant.tokens.expires_at,
            used_before=0.0 if before is None else max(before.used_at, before.used_before),
            used=before is not None and same and (before.used or before.used_at > 0),
            rejected=before is not None and same and before.rejected,
        )
        self._cached[account] = cached
        self._negative.discard(account)
        self._awaited.discard(account)
        self._schedule(account, cached)
        if self._looking_ahead is None and self._is_crowded:
            self._looking_ahead = asyncio.create_task(self._look_ahead())
            self._tasks.add(self._looking_ahead)
        if before is None or before.grant.granted_at != grant.granted_at:
            for callback in self._callbacks.values():
                # Soon, so that whoever waits for the grant has it first.
                asyncio.get_running_loop().call_soon(callback, account)
        return cached

    def evict(self, account: Account) -> None:
        """Stop using a token, and stop its timer. Loads and renewals in progress do not bring it back."""
        self._invalidations += 1
        self._negative.discard(account)
        cached = self._cached.pop(account, None)
        if cached is None:
            return
        if cached.timer is not None:
            cached.timer.cancel()
        self._awaited.add(account)

    def clear_negative(self) -> None:
        """Forget which accounts have no grant: another process may have stored one."""
        self._invalidations += 1
        self._negative.clear()

    def servers_changed(self, names: Collection[str]) -> None:
        """Evict the tokens of these servers that no longer match the configuration.

        A stored grant that matches is loaded with the next request.
        """
        for account in {*self._cached, *self._negative}:
            if account.server not in names:
                continue
            server, cached = self._servers.get(account.server), self._cached.get(account)
            if server is None or cached is None or not matches(cached.grant, server):
                self.evict(account)

    # Renewal

    async def resume_interrupted(self) -> bool:
        """Renew the grants whose renewal was interrupted by the death of its process. Raises StoreError.

        Return whether other processes renew grants now: one that dies is noticed by the next call.
        """
        interrupted, others = await self._grants.interrupted(self._clock(), settled=self._renewer.settled())
        before = self._interrupted
        self._interrupted = {account: at for account, at in interrupted.items() if before.get(account) == at}
        for account, begun_at in interrupted.items():
            if account.server not in self._servers or account in self._interrupted:
                continue
            try:
                cached = await self.load(account)
            except AuthorizationError:
                # The server was removed or reconfigured just now.
                continue
            # Not before: if the store fails, it is looked at again.
            self._interrupted[account] = begun_at
            logger.warning("a renewal for server %s was interrupted; it is started again", account.server)
            if cached is not None and renewable(cached.grant):
                # As the dead process did. If it fails or has to wait, it is due all the same, long before its time.
                cached.used = True
                cached.renew_at = min(cached.renew_at, self._clock())
                if cached.timer is not None:
                    # It is for a later time, and would be all that a failure of the store leaves.
                    cached.timer.cancel()
                    cached.timer = None
                self._renew_soon(account, cached)
        return others

    async def renew(
        self, account: Account, cached: CachedToken, *, asked: bool = False, background: bool = False
    ) -> CachedToken | None:
        """Return the renewed token; None if the grant has ended. All callers share one renewal.

        It is the same token if the renewal was refused while that works. ``asked``: a person wants the renewal now;
        ``background``: nobody waits for it. Otherwise the token counts as dead: the renewal does not wait for those of
        the background, and one that another process does not finish is taken over. Raises AuthorizationError,
        AuthorizationServerUnavailable, also if that takes too long, and StoreError.
        """
        if background:
            return await self._start(account, cached, Demand(background=True))
        self._needed.add(account)
        if account in self._renewing:
            self._renewer.rate.promote(cached.grant.key.issuer, cached.grant.id)
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                return await self._start(account, cached, Demand(asked=asked))
        except TimeoutError:
            raise AuthorizationServerUnavailable(
                f"The renewal of the grant of server {account.server} takes longer than {LONGEST_WAIT:.0f} s.",
                retry_after=2.0,
            ) from None

    async def renew_rejected(self, account: Account, cached: CachedToken) -> CachedToken | None:
        """Return a newer token than one that its server has answered 401 to, as ``renew`` does."""
        cached.rejected = True
        renewed = await self.renew(account, cached)
        if renewed is not None and renewed.token.generation == cached.token.generation:
            # It was refused before that 401 was known.
            renewed.rejected = True
            renewed = await self.renew(account, renewed)
        return renewed

    async def renew_idle(self, grant: Grant) -> None:
        """Renew a grant that no request waits for, without caching it. Raises as ``renew`` does."""
        account = grant.key.account
        cached = self._cached.get(account)
        if cached is not None:
            await self.renew(account, cached, background=True)
        else:
            await self._renewing.run(account, lambda: self._renew_idle(account, grant))

    async def _renew_idle(self, account: Account, grant: Grant) -> CachedToken | None:
        server = configured(self._servers, account.server)
        demand = Demand(needed=lambda: account in self._needed, background=True)
        try:
            renewed = await self._renewer.renew(server, grant, demand)
        except GrantEnded:
            self.evict(account)
            return None
        finally:
            self._needed.discard(account)
        # A request that has come meanwhile waits for this.
        return self.put(account, renewed) if account in self._cached else None

    def _start(self, account: Account, cached: CachedToken, demand: Demand) -> Awaitable[CachedToken | None]:
        """Begin to renew at once, unless that has begun; whoever awaits the result may be cancelled."""
        return asyncio.shield(self._renewing.start(account, lambda: self._renew(account, cached, demand)))

    async def _renew(self, account: Account, cached: CachedToken, demand: Demand) -> CachedToken | None:
        try:
            return await self._renew_once(account, cached, demand)
        finally:
            self._needed.discard(account)

    async def _renew_once(self, account: Account, cached: CachedToken, demand: Demand) -> CachedToken | None:
        current = self._cached.get(account)
        if current is not None and current.token.generation > cached.token.generation:
            return current
        if current is not None and current.token.generation == cached.token.generation:
            current.rejected |= cached.rejected
            cached = current
        server = configured(self._servers, account.server)
        if not matches(cached.grant, server):
            # The new secrets of the server must not go to the authorization server of the old one.
            raise server_reconfigured(server.name)
        before = self._invalidations

        def needed() -> bool:
            return account in self._needed or self._clock() >= cached.expires_at - TAKEOVER_AHEAD

        try:
            renewed = await self._renewer.renew(
                server, cached.grant, replace(demand, needed=needed, rejected=lambda: cached.rejected)
            )
        except GrantEnded:
            self.evict(account)
            return await self._load(account)
        except HeldElsewhere:
            # Before the token is dead there is time: the other process may come back with its result.
            cached.renew_at = max(cached.expires_at - TAKEOVER_AHEAD, self._clock() + TAKEOVER_AHEAD)
            if self._cached.get(account) is cached:
                self._schedule(account, cached)
            raise
        except McpAuthProxyError:
            # Before this task ends: as soon as no renewal is in progress, a request that finds the token still due
            # would start the next one.
            self._postpone(account, cached)
            self._try_again_soon(account, cached)
            raise
        if before != self._invalidations:
            return await self._load(account)
        return self.put(account, renewed)

    def _renew_soon(self, account: Account, cached: CachedToken) -> None:
        """Renew a token in the background, when its turn has come."""
        if cached.queued or self._is_paused(account, cached):
            return

        due = cached.renew_at

        def begin() -> bool:
            cached.queued = False
            if self._cached.get(account) is not cached or account in self._renewing or cached.renew_at > due:
                return False
            if self._is_paused(account, cached):
                return False
            # At once: a request that finds the token still due would queue it again.
            demand = Demand(background=True, has_turn=True)
            self._renewing.start(account, lambda: self._renew(account, cached, demand))
            self._spawn(self._renew_in_background(account, cached))
            return True

        cached.queued = True
        self._renewer.rate.later(cached.grant.key.issuer, cached.expires_at, begin)

    async def _renew_in_background(self, account: Account, cached: CachedToken) -> None:
        try:
            await self.renew(account, cached, background=True)
        except McpAuthProxyError as error:
            logger.debug("background renewal for server %s: %s", account.server, error)

    def _renew_at(self, grant: Grant) -> float:
        """Return when to renew a grant in the background: when it is due, but not before a backoff has ended."""
        due = renew_at(grant.tokens) if renewable(grant) else None
        if grant.health.refused_at is not None:
            # Not before the token is dead.
            due = grant.tokens.expires_at
        if due is None:
            return float("inf")
        return max(due, self._renewer.retry_at(grant) or due)

    def _is_paused(self, account: Account, cached: CachedToken) -> bool:
        """Return whether a renewal can't be tried now; then it is postponed."""
        if (self._renewer.retry_at(cached.grant) or 0.0) <= self._clock():
            return False
        self._postpone(account, cached)
        return True

    def _postpone(self, account: Account, cached: CachedToken) -> None:
        retry_at = self._renewer.retry_at(cached.grant)
        if retry_at is not None and self._cached.get(account) is cached:
            cached.renew_at = max(cached.renew_at, retry_at)
            # The timer may have been set for a time that is past by now: timers stand still while a machine sleeps.
            self._schedule(account, cached)

    def _try_again_soon(self, account: Account, cached: CachedToken) -> None:
        """Look at a token again if no pause does that: the renewal of another grant may have ended the pause."""
        if cached.timer is None and self._cached.get(account) is cached:
            delay = RETRY_DELAY * (1 + random.random())
            cached.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, account, cached)

    def _schedule(self, account: Account, cached: CachedToken) -> None:
        if cached.timer is not None:
            cached.timer.cancel()
            cached.timer = None
        if cached.renew_at == float("inf"):
            return
        delay = min(max(0.0, cached.renew_at - self._clock()), LONGEST_TIMER)
        cached.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, account, cached)

    def _on_timer(self, account: Account, cached: CachedToken) -> None:
        """Renew a token that has been used since the last renewal. An unused one waits for its next use."""
        cached.timer = None
        if self._cached.get(account) is not cached:
            return
        if self._clock() < cached.renew_at:
            self._schedule(account, cached)
        elif cached.used or cached.used_at:
            self._renew_soon(account, cached)

    # Many tokens that expire together

    @property
    def _is_crowded(self) -> bool:
        """Whether there are more tokens than can be renewed in a second."""
        return len(self._cached) > self._renewer.rate.rate

    async def _look_ahead(self) -> None:
        while self._is_crowded:
            await asyncio.sleep(LOOK_AHEAD)
            await self.renew_early()
        task, self._looking_ahead = self._looking_ahead, None
        self._tasks.discard(task) if task is not None else None

    async def renew_early(self) -> None:
        """Begin to renew tokens that are used, if so many expire together that their margins are too short."""
        counts: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for each in await self._in_use():
            counts[each.grant.key.issuer][early_renewal.group(each.expires_at)] += 1
        now, rate = self._clock(), self._renewer.rate.rate
        begins = {issuer: early_renewal.begin_at(expiries, rate) for issuer, expiries in counts.items()}
        for each in await self._in_use():
            groups = begins.get(each.grant.key.issuer, {})
            begin = groups.get(early_renewal.group(each.expires_at), each.renew_at)
            if (
                max(begin, early_renewal.earliest(each.grant.tokens)) <= now < each.renew_at
                and self._renewer.retry_at(each.grant) is None
            ):
                self._renew_soon(each.grant.key.account, each)

    async def _in_use(self) -> list[CachedToken]:
        """Return the tokens that are renewed ahead of expiry."""
        found: list[CachedToken] = []
        for number, each in enumerate(list(self._cached.values())):
            if number % LOOKED_AT == LOOKED_AT - 1:
                await asyncio.sleep(0)
            if (each.used or each.used_at) and each.renew_at < each.expires_at < float("inf"):
                found.append(each)
        return found

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
