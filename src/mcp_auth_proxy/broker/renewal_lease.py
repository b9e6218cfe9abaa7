"""Begin the renewal of a grant in one process at a time; the others wait for its result, or take it over."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mcp_auth_proxy.errors import AuthorizationServerUnavailable
from mcp_auth_proxy.models import Grant
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.lease import LONGEST

ATTEMPT_SECONDS = 15.0
"""Seconds for one renewal with everything that it sends. The rest of the lease (``lease.LONGEST``) is for storing."""

LONGEST_WAIT = 29.0
"""Seconds that a renewal waits for one of another process; a request gets an error then."""

TAKEOVER_AHEAD = 5.0
"""Seconds before the end of a token in which the renewal of a process that may be alive is taken over."""

LOOK_INTERVALS = (0.1, 0.5)
"""Seconds between two looks at the renewal of another process: at first, and after a while."""


class GrantEnded(Exception):
    """Signal within the broker: the grant is over, and a new authorization is needed."""


class HeldElsewhere(AuthorizationServerUnavailable):
    """Another process has not finished its renewal in time, but may live, and the token still works."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A renewal that is recorded as begun: at ``at`` by the clock of the store, at ``begun_at`` by the event loop's."""

    at: float
    begun_at: float
    clock: Callable[[], float]

    def seconds_left(self) -> float:
        """Return how long something may still be sent. Another process may take over soon after that.

        By both clocks: one may be set, the other one stands still while the machine sleeps.
        """
        passed = asyncio.get_running_loop().time() - self.begun_at
        return ATTEMPT_SECONDS - max(passed, abs(self.clock() - self.at))


async def begin_renewal(
    grants: Grants,
    grant_id: int,
    *,
    owner: str,
    clock: Callable[[], float],
    needed: Callable[[], bool],
    is_done: Callable[[Grant], bool],
    settled: Callable[[], bool],
    take_turn: Callable[[], Awaitable[None]] | None = None,
) -> tuple[Grant, Attempt | None]:
    """Record that a renewal begins, once no other process renews the grant.

    Return the grant as it is stored, with None if it ``is_done``: it has newer tokens already, or is not to be
    renewed. ``needed``: see ``Demand``; ``settled``: see ``Renewer``; ``take_turn`` is awaited once nobody else renews
    it, and then all is looked at again. Raises GrantEnded, HeldElsewhere, AuthorizationServerUnavailable,
    StoreUnavailable, and what ``is_done`` raises.
    """
    loop = asyncio.get_running_loop()
    first_look = loop.time()
    while True:
        current = await grants.get(grant_id)
        if current is None or current.ended_at is not None:
            raise GrantEnded
        if is_done(current):
            return current, None
        attempt, is_needed, is_settled = Attempt(clock(), loop.time(), clock), needed(), settled()
        # The look alone writes nothing, and locks nothing.
        if grants.may_begin_refresh(current, owner=owner, now=attempt.at, needed=is_needed, settled=is_settled):
            if take_turn is not None:
                await take_turn()
                take_turn, first_look = None, loop.time()
                continue
            if await grants.begin_refresh(
                current.id,
                version=current.version,
                owner=owner,
                now=attempt.at,
                needed=is_needed,
                settled=is_settled,
            ):
                return current, attempt
        waited = attempt.begun_at - first_look
        over = current.refresh_begun_at is not None and abs(attempt.at - current.refresh_begun_at) > LONGEST
        if waited > LONGEST_WAIT or (over and not is_needed):
            raise (AuthorizationServerUnavailable if is_needed else HeldElsewhere)(
                f"Another process is renewing the grant of server {current.key.account.server} and has not finished.",
                retry_after=2.0,
            )
        first, later = LOOK_INTERVALS
        await asyncio.sleep(min(first + waited / 10, later))
