"""Notice what other processes have changed in the store, and delete old flows."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from mcp_auth_proxy.broker.flows import PendingFlows
from mcp_auth_proxy.broker.pending import PendingAuthorization
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, StoreError
from mcp_auth_proxy.models import Account, FlowStatus, Grant
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.flows import CANCELLED, Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.leases import Leases

WATCH_INTERVAL = 0.5
"""Seconds between checks whether another process has written to the store."""

PURGE_INTERVAL = 3600.0
"""Seconds between deletions of old flows."""


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
        grants: Grants,
        tokens: TokenCache,
        pending: PendingFlows,
        clock: Callable[[], float],
        readers: tuple[StoreReader, ...] = (),
    ) -> None:
        self._readers = readers
        self._database = database
        self._leases = leases
        self._flows = flows
        self._grants = grants
        self._tokens = tokens
        self._pending = pending
        self._clock = clock
        self._others_renew = True
        """Whether other processes renew grants, as of the last look: they may die."""
        self._task: asyncio.Task[None] | None = None

    def add_reader(self, reader: StoreReader) -> None:
        """Tell one more reader what other processes write."""
        self._readers += (reader,)

    async def start(self) -> None:
        """Delete old flows, then begin to watch. Raises StoreError."""
        await self._purge()
        await self._database.changed()
        self._task = asyncio.create_task(self._watch())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        purged_at = self._clock()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            # Store failures are reported by /readyz and by the requests that need the store.
            with contextlib.suppress(StoreError):
                changed = await self._database.changed()
                if changed:
                    await self.reload()
                if changed or self._others_renew:
                    self._others_renew = await self._tokens.resume_interrupted()
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
        awaited = self._tokens.awaited()
        for account in awaited & await self._grants.accounts() if awaited else ():
            # If the server was removed just now, nobody waits for its grant.
            with contextlib.suppress(AuthorizationError):
                await self._tokens.load(account)
        for account in {*self._tokens.accounts(), *(pending.flow.key.account for pending in self._pending.all())}:
            grant = await self._tokens.stored(account)
            if grant is None:
                self._tokens.evict(account)
            elif not self._tokens.is_renewing(account):
                # If the server was removed or reconfigured just now, the grant is not for it any more.
                with contextlib.suppress(AuthorizationError):
                    await self._activate_if_new(account, grant)
        for pending in self._pending.all():
            await self._drop_if_ended(pending)

    async def _activate_if_new(self, account: Account, grant: Grant) -> None:
        pending = self._pending.get(account)
        if pending is None:
            self._tokens.put(account, grant)
            return
        flow = await self._flows.get(pending.flow.id)
        # The consent may also have come by an earlier link, or by one of another process.
        if grant.granted_at > pending.flow.created_at or (flow is not None and flow.status is FlowStatus.DONE):
            self._pending.activate(grant, elsewhere=True)

    async def _drop_if_ended(self, pending: PendingAuthorization) -> None:
        flow = await self._flows.get(pending.flow.id)
        if flow is None or flow.status is FlowStatus.FAILED:
            self._pending.drop(pending.flow, AuthorizationDenied(flow.reason if flow else CANCELLED))
