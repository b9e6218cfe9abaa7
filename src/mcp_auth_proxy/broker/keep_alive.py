"""Refresh grants that nobody uses, in the background: a refresh token that is never used lapses at many servers.

All processes on a store look; one of them refreshes a grant (``Grants.begin_refresh``). Grants are read one by one, in
the order of pages of ids, so memory does not grow with their number.
"""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from mcp_auth_proxy.broker.matching import matches
from mcp_auth_proxy.broker.refusals import ENDS_AFTER
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import McpAuthProxyError, StoreError
from mcp_auth_proxy.models import Grant
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.unused_grants import UnusedGrants

logger = logging.getLogger(__name__)

PAGE = 50
"""Grants that are looked up at once."""

FIRST_DELAY = 5.0
"""Seconds from the start to the first look."""

SHORTEST_DELAY, LONGEST_DELAY = 0.5, 300.0
"""Seconds between two looks: until the next grant is due, but within these."""

FAILED_DELAY = 30.0
"""Seconds to the next look at least, if something was due and could not be refreshed."""


MAX_FAILURES = 3
"""Failures at one issuer after which the rest of its grants wait for the next look."""


class IdleRenewal(Protocol):
    """The part of ``TokenCache`` that is needed here."""

    async def renew_idle(self, grant: Grant) -> None:
        """Renew a grant that no request waits for. Raises McpAuthProxyError."""


class KeepAlive:
    """Refresh what has not been refreshed for ``period`` seconds; 0: nothing. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        database: Engine,
        tokens: IdleRenewal,
        period: float,
        clock: Callable[[], float],
    ) -> None:
        """``servers`` may change at any time."""
        self._servers = servers
        self._grants = Grants(database)
        self._unused = UnusedGrants(database)
        self._tokens = tokens
        self._clock = clock
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.period = period

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run())

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def configure(self, period: float) -> None:
        """Change after how many seconds a grant is refreshed."""
        if period != self.period:
            self.period = period
            self._changed.set()

    async def _run(self) -> None:
        delay = min(FIRST_DELAY, self.period / 2) if self.period else FIRST_DELAY
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._changed.wait()
            self._changed.clear()
            try:
                delay = await self._look()
            except StoreError as error:
                logger.debug("grants that are not used can't be looked up now: %s", error)
                delay = FAILED_DELAY

    async def _look(self) -> float:
        """Refresh what is due; return the seconds to the next look. Raises StoreError."""
        await self._end_unmended()
        if not self.period:
            return LONGEST_DELAY
        failures: Counter[tuple[str, str]] = Counter()
        after: int | None = 0
        while after is not None:
            due = await self._unused.due(keep_alive=self.period, now=self._clock(), after=after, count=PAGE)
            after = due[-1].id if len(due) == PAGE else None
            # Each process in an order of its own: two that look together do not wait for each other.
            for each in random.sample(due, len(due)):
                issuer = (each.server, each.issuer)
                if each.server in self._servers and failures[issuer] < MAX_FAILURES:
                    failures[issuer] += not await self._refresh(each.id)
        now = self._clock()
        next_due = await self._unused.next_due(keep_alive=self.period, now=now)
        delay = LONGEST_DELAY if next_due is None else min(max(next_due - now, SHORTEST_DELAY), LONGEST_DELAY)
        return max(delay, FAILED_DELAY) if failures.total() else delay

    async def _end_unmended(self) -> None:
        """Try once more what only a person could mend, and what nobody has mended for a day: that ends it."""
        now, after = self._clock(), 0
        while ids := await self._unused.unmended(before=now - ENDS_AFTER, now=now, after=after, count=PAGE):
            for grant_id in ids:
                await self._refresh(grant_id)
            after = ids[-1]

    async def _refresh(self, grant_id: int) -> bool:
        """Refresh one grant, unless it is no longer due; return False if that fails. Raises StoreError."""
        grant = await self._grants.get(grant_id)
        if grant is None or grant.ended_at is not None or grant.refresh_begun_at is not None:
            return True
        server = self._servers.get(grant.key.account.server)
        if server is None or not matches(grant, server):
            return True
        try:
            await self._tokens.renew_idle(grant)
        except StoreError:
            raise
        except McpAuthProxyError as error:
            logger.debug("an unused grant of server %s was not refreshed: %s", grant.key.account.server, error)
            return False
        return True
