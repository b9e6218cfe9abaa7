"""Notice what other processes have changed in the store, and delete old flows."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

from mcp_auth_proxy.broker.flows import PendingFlows
from mcp_auth_proxy.broker.pending import PendingAuthorization
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, StoreError
from mcp_auth_proxy.models import Account, FlowStatus, Grant
from mcp_auth_proxy.store import comparison
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.flows import CANCELLED, Flows
from mcp_auth_proxy.store.leases import Leases

WATCH_INTERVAL = 0.5
"""Seconds between checks whether another process has written to the store."""

SETTLED_SECONDS = 5.0
"""Seconds after an outage of the store in which nobody takes over what another process may be about to store. It also
counts as one if this process has not looked for as long, or has just begun to look."""

PURGE_INTERVAL = 3600.0
"""Seconds between deletions of old flows."""

CHECKED_AT_ONCE = 50
"""Grants, and flows, that are read as a whole after each change, in turn: so what was changed without the key shows."""

T = TypeVar("T")


class StoreReader(Protocol):
    """What has read something of the store, and keeps it."""

    async def reload(self) -> None:
        """Read what another process may have written. Raises StoreError."""

    async def purge(self) -> None:
        """Delete what is too old. Raises StoreError."""


class StoreWatch:
    """Keep the token cache, the pending flows and ``readers`` in step with the store."""

    def __init__(
        self,
        *,
        database: Engine,
        leases: Leases,
        flows: Flows,
        tokens: TokenCache,
        pending: PendingFlows,
        clock: Callable[[], float],
        readers: tuple[StoreReader, ...] = (),
    ) -> None:
        self._readers = readers
        self._database = database
        self._leases = leases
        self._flows = flows
        self._tokens = tokens
        self._pending = pending
        self._clock = clock
        self._others_renew = True
        """Whether other processes renew grants, as of the last look: they may die."""
        self._unchecked: list[Account] = []
        self._unchecked_flows: list[str] = []
        self._looked_at = self._settling_since = -math.inf
        """When the last look ended, and since when all have succeeded, by the clock of the event loop."""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the store was in reach for a while, so that whoever has something to store could do so."""
        now = asyncio.get_running_loop().time()
        return now - self._looked_at <= SETTLED_SECONDS <= now - self._settling_since

    def add_reader(self, reader: StoreReader) -> None:
        """Tell one more reader what other processes write."""
        self._readers += (reader,)

    async def start(self) -> None:
        """Delete old flows, then begin to watch. Raises StoreError."""
        await self._purge()
        await self._database.changed()
        self._looked_at = self._settling_since = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._watch())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        purged_at, loop = self._clock(), asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            if loop.time() - self._looked_at > SETTLED_SECONDS:
                # This process stood still, maybe during an outage.
                self._settling_since = loop.time()
            # Store failures are reported by /readyz and by the requests that need the store.
            try:
                changed = await self._database.changed()
                if changed:
                    await self.reload()
                # Also right after an outage: its server accepts the refresh token of a dead process for seconds only.
                if changed or self._others_renew:
                    self._others_renew = await self._tokens.resume_interrupted()
            except StoreError:
                self._settling_since, self._others_renew = loop.time(), True
            self._looked_at = loop.time()
            now = self._clock()
            # The absolute difference: the clock may have been set back.
            if abs(now - purged_at) >= PURGE_INTERVAL:
                purged_at = now
                with contextlib.suppress(StoreError):
                    await self._purge()

    async def _purge(self) -> None:
        # Flows later: whether one is done says that a server was connected.
        for reader in self._readers:
            await reader.purge()
        await self._flows.purge(self._clock())
        await self._leases.purge(self._clock())

    async def reload(self) -> None:
        """Apply what ``login`` or ``logout`` in another process has stored or deleted.

        Raises StoreError.
        """
        for reader in self._readers:
            await reader.reload()
        self._tokens.clear_negative()
        for account in await comparison.granted(self._database, self._tokens.awaited()):
            # If the server was removed just now, nobody waits for its grant.
            with contextlib.suppress(AuthorizationError):
                await self._tokens.load(account)
        await self._reload_cached()
        await self._reload_pending()

    async def _reload_cached(self) -> None:
        """Read the grants that are not as they are in the cache, and some that seem to be."""
        known = self._tokens.versions()
        changed = await comparison.changed_grants(self._database, known)
        looked_at = changed | known.keys() & _some(self._unchecked, known)
        found = await comparison.current_grants(self._database, looked_at)
        for account in looked_at:
            cached, grant = self._tokens.get(account), found.get(account)
            if cached is None or (cached.grant.id, cached.grant.version) != known.get(account):
                # It has changed here meanwhile, and is newer than what was read.
                continue
            if grant is None or not self._tokens.is_usable(grant):
                self._tokens.evict(account)
            elif not self._tokens.is_renewing(account):
                # If the server was removed or reconfigured just now, the grant is not for it any more.
                with contextlib.suppress(AuthorizationError):
                    self._tokens.put(account, grant)

    async def _reload_pending(self) -> None:
        """Let those go on who wait for a consent that was given elsewhere, and those whose flow has ended."""
        pending = {waiting.flow.key.account: waiting for waiting in self._pending.all()}
        if not pending:
            return
        flows = {waiting.flow.id for waiting in pending.values()}
        decided = await comparison.decided_flows(self._database, flows) | _some(self._unchecked_flows, flows)
        grants = await comparison.current_grants(
            self._database, await comparison.granted(self._database, pending.keys())
        )
        for account, waiting in pending.items():
            grant = grants.get(account)
            if grant is not None and self._tokens.is_usable(grant):
                # If the server was removed or reconfigured just now, the grant is not for it any more.
                with contextlib.suppress(AuthorizationError):
                    await self._activate_if_new(waiting, grant, decided=waiting.flow.id in decided)
            if waiting.flow.id in decided and self._pending.get(account) is waiting:
                await self._drop_if_ended(waiting)

    async def _activate_if_new(self, pending: PendingAuthorization, grant: Grant, *, decided: bool) -> None:
        # The consent may also have come by an earlier link, or by one of another process.
        new = grant.granted_at > pending.flow.created_at
        if not new and decided:
            flow = await self._flows.get(pending.flow.id)
            new = flow is not None and flow.status is FlowStatus.DONE
        account = grant.key.account
        if new and self._pending.get(account) is pending and not self._tokens.is_renewing(account):
            self._pending.activate(grant, elsewhere=True)

    async def _drop_if_ended(self, pending: PendingAuthorization) -> None:
        flow = await self._flows.get(pending.flow.id)
        if flow is None or flow.status is FlowStatus.FAILED:
            self._pending.drop(pending.flow, AuthorizationDenied(flow.reason if flow else CANCELLED))


def _some(unchecked: list[T], known: Collection[T]) -> set[T]:
    """Return some of what is known: in time all, as ``unchecked`` has what is left of the last round."""
    if not unchecked:
        unchecked.extend(known)
    some = set(unchecked[-CHECKED_AT_ONCE:])
    del unchecked[-CHECKED_AT_ONCE:]
    return some
