"""The tokens in use, and their renewal ahead of time.

In memory, for each (principal, server): all of it can be had again from the store.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.broker import dpop
from mcp_auth_proxy.broker.planning import Authorizer
from mcp_auth_proxy.broker.renewal import GrantEnded, Renewer, renew_at, renewable
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.models import AccessToken, Account, Grant
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

LONGEST_TIMER = 86_400.0
"""Seconds: a timer is set anew that often at least, since the clock may be set meanwhile."""


@dataclass(slots=True)
class CachedToken:
    """A grant in use: what the hot path looks at."""

    grant: Grant
    token: AccessToken
    renew_at: float
    dead_at: float
    used: bool = False
    timer: asyncio.TimerHandle | None = None


class TokenCache:
    """See the module. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        grants: Grants,
        authorizer: Authorizer,
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._grants = grants
        self._authorizer = authorizer
        self._renewer = Renewer(authorizer=authorizer, grants=grants, clock=clock)
        self._clock = clock
        self._generations = itertools.count(1)
        self._nonces = dpop.Nonces()
        self._held: dict[Account, CachedToken] = {}
        self._negative: set[Account] = set()
        self._loading: SingleFlight[Account, CachedToken | None] = SingleFlight()
        self._renewing: SingleFlight[Account, CachedToken | None] = SingleFlight()
        self._tasks: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Stop all that runs by itself. A renewal under way is waited for: its refresh token is spent already."""
        for held in self._held.values():
            if held.timer is not None:
                held.timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._renewing.settle(timeout=10.0)
        for flight in (self._loading, self._renewing):
            await flight.aclose()

    # For requests

    async def token(self, account: Account) -> AccessToken | None:
        """Return the token to send, None where there is no grant.

        Raises AuthorizationServerUnavailable where the token is dead and can't be renewed now, and StoreError.
        """
        held = self._held.get(account)
        if held is not None:
            now = self._clock()
            if now < held.dead_at:
                if now >= held.renew_at and account not in self._renewing:
                    self.renew_soon(account, held)
                held.used = True
                return held.token
        elif account in self._negative:
            return None
        return await self._token_from_store(account, held)

    def token_nowait(self, account: Account) -> tuple[bool, AccessToken | None]:
        """Return whether the token to send is known without waiting, and it; None where no grant is known."""
        held = self._held.get(account)
        if held is None:
            return account in self._negative, None
        held.used = True
        now = self._clock()
        return now < held.renew_at and now < held.dead_at, held.token

    # For the broker

    def states(self) -> dict[tuple[str, ...], float]:
        """Return how many cached tokens are valid, renewing or expired."""
        states: dict[tuple[str, ...], float] = {("valid",): 0, ("renewing",): 0, ("expired",): 0}
        now = self._clock()
        for account, held in self._held.items():
            expired = now >= held.dead_at
            states["renewing" if account in self._renewing else "expired" if expired else "valid",] += 1
        return states

    def get(self, account: Account) -> CachedToken | None:
        """Return what is in use, without a look at the store."""
        return self._held.get(account)

    def keys(self) -> set[Account]:
        """Return whose tokens are in use."""
        return set(self._held)

    def clear_negative(self) -> None:
        """Forget which grants there are not: another process may have stored one."""
        self._negative.clear()

    def is_renewing(self, account: Account) -> bool:
        return account in self._renewing

    def renew_soon(self, account: Account, held: CachedToken) -> None:
        """Renew a token in the background."""
        self._spawn(self._renew_in_background(account, held))

    async def _token_from_store(self, account: Account, held: CachedToken | None) -> AccessToken | None:
        if held is None:
            held = await self._loading.run(account, lambda: self.load(account))
            if held is None:
                return None
        held.used = True
        if self._clock() < held.dead_at or not renewable(held.grant):
            # A token that looks dead but can't be renewed is tried all the same: the clock may be what is wrong.
            return held.token
        renewed = await self.renew(account, held)
        return renewed.token if renewed else None

    async def current(self, account: Account) -> Grant | None:
        """Return the stored grant for a server, if it is for what the server is configured to be now."""
        grant = await self._grants.current(account)
        server = self._servers.get(account.server)
        if grant is None or server is None or self._authorizer.serves(grant, server):
            return grant
        logger.warning(
            "the grant of server %s is for another server or issuer than configured; it is not used", account.server
        )
        return None

    async def load(self, account: Account) -> CachedToken | None:
        """Put what the store has in use; None where it has nothing. Raises StoreError."""
        grant = await self.current(account)
        if grant is None:
            self._negative.add(account)
            return None
        return self.put(account, grant)

    def put(self, account: Account, grant: Grant) -> CachedToken:
        """Put a stored grant in use, unless it is in use already."""
        before = self._held.get(account)
        if before is not None:
            if (before.grant.id, before.grant.version) == (grant.id, grant.version):
                return before
            if before.timer is not None:
                before.timer.cancel()
        tokens = grant.tokens
        due = renew_at(tokens) if renewable(grant) else None
        held = CachedToken(
            grant=grant,
            token=dpop.access_token(
                grant, self._servers[account.server], next(self._generations), nonces=self._nonces, clock=self._clock
            ),
            renew_at=float("inf") if due is None else due,
            dead_at=float("inf") if tokens.expires_at is None else tokens.expires_at,
        )
        self._held[account] = held
        self._negative.discard(account)
        if due is not None:
            self._schedule(account, held)
        return held

    def evict(self, account: Account) -> None:
        """Use a token no longer."""
        held = self._held.pop(account, None)
        if held is not None and held.timer is not None:
            held.timer.cancel()

    def _schedule(self, account: Account, held: CachedToken) -> None:
        if held.timer is not None:
            held.timer.cancel()
        delay = min(max(0.0, held.renew_at - self._clock()), LONGEST_TIMER)
        held.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, account, held)

    def _on_timer(self, account: Account, held: CachedToken) -> None:
        """Renew ahead of expiry what has been used since the last renewal; what lies idle waits until it is used."""
        held.timer = None
        if self._held.get(account) is not held:
            return
        if self._clock() < held.renew_at:
            self._schedule(account, held)
        elif held.used:
            self.renew_soon(account, held)

    async def _renew_in_background(self, account: Account, held: CachedToken) -> None:
        try:
            await self.renew(account, held)
        except McpAuthProxyError as error:
            logger.debug("background renewal for server %s: %s", account.server, error)
            delay = self._renewer.retry_in(held.grant)
            if delay is not None and self._held.get(account) is held:
                held.renew_at = max(held.renew_at, self._clock() + delay)
                # The timer may still be set for what is past by now: timers stand still while a machine sleeps.
                self._schedule(account, held)

    async def renew(self, account: Account, held: CachedToken) -> CachedToken | None:
        """Return the renewed grant, None where it has ended; one renewal at a time for everyone who asks."""
        return await self._renewing.run(account, lambda: self._renew_now(account, held))

    async def _renew_now(self, account: Account, held: CachedToken) -> CachedToken | None:
        current = self._held.get(account)
        if current is not None and current.token.generation > held.token.generation:
            return current
        try:
            return self.put(account, await self._renewer.renew(self._servers[account.server], held.grant))
        except GrantEnded:
            self.evict(account)
            return await self.load(account)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
