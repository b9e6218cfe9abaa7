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
from mcp_auth_proxy.broker.authorize import Authorizer
from mcp_auth_proxy.broker.renew import GrantEnded, Renewer, renew_at, renewable
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import ProxyError
from mcp_auth_proxy.models import AccessToken, Grant
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

LONGEST_TIMER = 86_400.0
"""Seconds: a timer is set anew that often at least, since the clock may be set meanwhile."""

Key = tuple[str, str]
"""(principal, server)"""


@dataclass(slots=True)
class Held:
    """A grant in use: what the hot path looks at."""

    grant: Grant
    token: AccessToken
    renew_at: float
    dead_at: float
    used: bool = False
    timer: asyncio.TimerHandle | None = None


class Tokens:
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
        self._held: dict[Key, Held] = {}
        self._absent: set[Key] = set()
        self._loading: SingleFlight[Key, Held | None] = SingleFlight()
        self._renewing: SingleFlight[Key, Held | None] = SingleFlight()
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

    async def token(self, key: Key) -> AccessToken | None:
        """Return the token to send, None where there is no grant.

        Raises AuthorizationServerUnavailable where the token is dead and can't be renewed now, and StoreError.
        """
        held = self._held.get(key)
        if held is not None:
            now = self._clock()
            if now < held.dead_at:
                if now >= held.renew_at and key not in self._renewing:
                    self.renew_soon(key, held)
                held.used = True
                return held.token
        elif key in self._absent:
            return None
        return await self._token_from_store(key, held)

    def at_hand(self, key: Key) -> tuple[bool, AccessToken | None]:
        """Return whether the token to send is known without waiting, and it; None where no grant is known."""
        held = self._held.get(key)
        if held is None:
            return key in self._absent, None
        held.used = True
        now = self._clock()
        return now < held.renew_at and now < held.dead_at, held.token

    # For the broker

    def get(self, key: Key) -> Held | None:
        """Return what is in use, without a look at the store."""
        return self._held.get(key)

    def keys(self) -> set[Key]:
        """Return whose tokens are in use."""
        return set(self._held)

    def look_again(self) -> None:
        """Forget which grants there are not: another process may have stored one."""
        self._absent.clear()

    def is_renewing(self, key: Key) -> bool:
        return key in self._renewing

    def renew_soon(self, key: Key, held: Held) -> None:
        """Renew a token in the background."""
        self._spawn(self._renew_in_background(key, held))

    async def _token_from_store(self, key: Key, held: Held | None) -> AccessToken | None:
        if held is None:
            held = await self._loading.run(key, lambda: self.load(key))
            if held is None:
                return None
        held.used = True
        if self._clock() < held.dead_at or not renewable(held.grant):
            # A token that looks dead but can't be renewed is tried all the same: the clock may be what is wrong.
            return held.token
        renewed = await self.renew(key, held)
        return renewed.token if renewed else None

    async def current(self, key: Key) -> Grant | None:
        """Return the stored grant for a server, if it is for what the server is configured to be now."""
        grant = await self._grants.current(*key)
        server = self._servers.get(key[1])
        if grant is None or server is None or self._authorizer.serves(grant, server):
            return grant
        logger.warning("the grant of server %s is for another server or issuer than configured; it is not used", key[1])
        return None

    async def load(self, key: Key) -> Held | None:
        """Put what the store has in use; None where it has nothing. Raises StoreError."""
        grant = await self.current(key)
        if grant is None:
            self._absent.add(key)
            return None
        return self.hold(key, grant)

    def hold(self, key: Key, grant: Grant) -> Held:
        """Put a stored grant in use, unless it is in use already."""
        before = self._held.get(key)
        if before is not None:
            if (before.grant.id, before.grant.version) == (grant.id, grant.version):
                return before
            if before.timer is not None:
                before.timer.cancel()
        tokens = grant.tokens
        due = renew_at(tokens) if renewable(grant) else None
        held = Held(
            grant=grant,
            token=dpop.access_token(
                grant, self._servers[key[1]], next(self._generations), nonces=self._nonces, clock=self._clock
            ),
            renew_at=float("inf") if due is None else due,
            dead_at=float("inf") if tokens.expires_at is None else tokens.expires_at,
        )
        self._held[key] = held
        self._absent.discard(key)
        if due is not None:
            self._schedule(key, held)
        return held

    def drop(self, key: Key) -> None:
        """Use a token no longer."""
        held = self._held.pop(key, None)
        if held is not None and held.timer is not None:
            held.timer.cancel()

    def _schedule(self, key: Key, held: Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
        delay = min(max(0.0, held.renew_at - self._clock()), LONGEST_TIMER)
        held.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, key, held)

    def _on_timer(self, key: Key, held: Held) -> None:
        """Renew ahead of expiry what has been used since the last renewal; what lies idle waits until it is used."""
        held.timer = None
        if self._held.get(key) is not held:
            return
        if self._clock() < held.renew_at:
            self._schedule(key, held)
        elif held.used:
            self.renew_soon(key, held)

    async def _renew_in_background(self, key: Key, held: Held) -> None:
        try:
            await self.renew(key, held)
        except ProxyError as error:
            logger.debug("background renewal for server %s: %s", key[1], error)
            delay = self._renewer.retry_in(held.grant)
            if delay is not None and self._held.get(key) is held:
                held.renew_at = max(held.renew_at, self._clock() + delay)
                # The timer may still be set for what is past by now: timers stand still while a machine sleeps.
                self._schedule(key, held)

    async def renew(self, key: Key, held: Held) -> Held | None:
        """Return the renewed grant, None where it has ended; one renewal at a time for everyone who asks."""
        return await self._renewing.run(key, lambda: self._renew_now(key, held))

    async def _renew_now(self, key: Key, held: Held) -> Held | None:
        current = self._held.get(key)
        if current is not None and current.token.generation > held.token.generation:
            return current
        try:
            return self.hold(key, await self._renewer.renew(self._servers[key[1]], held.grant))
        except GrantEnded:
            self.drop(key)
            return await self.load(key)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
