"""The tokens in use, by account, and their renewal ahead of expiry.

Everything here can be loaded again from the store.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.broker import dpop
from mcp_auth_proxy.broker.matching import configured, matches, server_reconfigured
from mcp_auth_proxy.broker.renewal import GrantEnded, Renewer, renew_at, renewable
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.models import AccessToken, Account, Grant
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

LONGEST_TIMER = 86_400.0
"""Maximum seconds of a timer. Longer waits take several: the clock may be set in the meantime."""


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
        self._tasks: set[asyncio.Task[None]] = set()

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

    def awaited(self) -> set[Account]:
        """Return the accounts that had no grant when they were last asked for."""
        return set(self._awaited)

    def is_renewing(self, account: Account) -> bool:
        """Return whether a renewal is in progress."""
        return account in self._renewing

    async def stored(self, account: Account) -> Grant | None:
        """Return the stored grant that may be used for an account, if there is one. Raises StoreError."""
        grant = await self._grants.current(account)
        server = self._servers.get(account.server)
        if grant is None or server is None:
            return None
        if matches(grant, server):
            return grant
        logger.warning(
            "the grant of server %s is for another server or issuer than configured; it is not used", account.server
        )
        return None

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

    async def resume_interrupted(self) -> None:
        """Renew the grants whose renewal was interrupted by a crash. Raises StoreError."""
        for grant in await self._grants.interrupted():
            account = grant.key.account
            if account.server not in self._servers:
                continue
            logger.warning("a renewal for server %s was interrupted; it is started again", account.server)
            cached = await self.load(account)
            if cached is not None and renewable(cached.grant):
                self._renew_soon(account, cached)

    async def renew(
        self, account: Account, cached: CachedToken, *, asked: bool = False, background: bool = False
    ) -> CachedToken | None:
        """Return the renewed token; None if the grant has ended. All callers share one renewal.

        It is the same token if the renewal was refused while that works. ``asked``: a person wants the renewal now;
        ``background``: no request waits for it. Raises AuthorizationError, AuthorizationServerUnavailable and
        StoreError.
        """
        return await self._renewing.run(
            account, lambda: self._renew(account, cached, asked=asked, background=background)
        )

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
        try:
            renewed = await self._renewer.renew(configured(self._servers, account.server), grant, background=True)
        except GrantEnded:
            self.evict(account)
            return None
        # A request that has come meanwhile waits for this.
        return self.put(account, renewed) if account in self._cached else None

    async def _renew(
        self, account: Account, cached: CachedToken, *, asked: bool, background: bool
    ) -> CachedToken | None:
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
        try:
            renewed = await self._renewer.renew(
                server, cached.grant, rejected=lambda: cached.rejected, asked=asked, background=background
            )
        except GrantEnded:
            self.evict(account)
            return await self._load(account)
        except McpAuthProxyError:
            # Before this task ends: as soon as no renewal is in progress, a request that finds the token still due
            # would start the next one.
            self._postpone(account, cached)
            raise
        if before != self._invalidations:
            return await self._load(account)
        return self.put(account, renewed)

    def _renew_soon(self, account: Account, cached: CachedToken) -> None:
        """Renew a token in the background."""
        self._spawn(self._renew_in_background(account, cached))

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

    def _postpone(self, account: Account, cached: CachedToken) -> None:
        retry_at = self._renewer.retry_at(cached.grant)
        if retry_at is not None and self._cached.get(account) is cached:
            cached.renew_at = max(cached.renew_at, retry_at)
            # The timer may have been set for a time that is past by now: timers stand still while a machine sleeps.
            self._schedule(account, cached)

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

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
