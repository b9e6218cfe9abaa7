"""The rate of refreshes at each authorization server, and who is next.

All processes on one store share the rate (``store.refresh_slots``). In each process a lane per issuer has those that
wait. Requests go first, in their order, and reserve times further ahead than the background does: so they go first in
other processes too. In the background, the token that expires first is renewed first, and one that has expired already
last: its next request renews it anyway.

Between its turn and its sending a refresh is written to the store, and a connection is opened: what took long there
comes together. So the turns are counted once more when they are sent, in this process.
"""

import asyncio
import contextlib
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable
from math import ceil, inf

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, McpAuthProxyError, RefreshRateExceeded, StoreError
from mcp_auth_proxy.store.refresh_slots import LONGEST_PAUSE, SLACK, Pace, RefreshSlots

DEFAULT_RATE = 10.0
"""Refreshes in a second at one authorization server."""

LONGEST_WAIT = 28.0
"""Seconds that a request waits for its turn: less than for the whole renewal (``renewal_lease.LONGEST_WAIT``)."""

AHEAD = 0.5
"""Seconds from now for which times are reserved while requests wait."""

BACKGROUND_AHEAD = 0.2
"""The same if only the background does. Less than what is left of ``AHEAD`` when more is reserved."""

REFILL = 0.2
"""Seconds of reserved times that are reserved together, if as many wait; half of it in the background."""

LONGEST_SLEEP = 5.0
"""Maximum seconds until a lane looks at the store again."""

SENDING_SLACK = 1.05
"""Share of a second that counts as one when refreshes are sent. Less than that of the turns, so that whatever has come
together is sent in the end."""

LOOK_AGAIN = 0.1
"""Seconds until the next turn while too many that have had theirs wait to be sent."""

MANY = 100
"""Those that do not want their turn any more that are dropped before others have theirs on the event loop."""

Begin = Callable[[], bool]
"""Take a turn, at once; False if it is not wanted any more."""


class RefreshRate:
    """Give turns to refreshes. Belongs to one event loop; ``clock`` returns Unix seconds."""

    def __init__(self, *, slots: RefreshSlots, clock: Callable[[], float], rate: float = DEFAULT_RATE) -> None:
        self.slots = slots
        self.rate = rate
        self.clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._sendings: dict[str, _Sending] = {}
        self._closed = False

    async def turn(
        self, issuer: str, *, key: Hashable = None, background: bool = False, expires_at: float = inf
    ) -> None:
        """Wait until a refresh may be sent to an issuer. ``key`` is for ``promote``.

        Raises RefreshRateExceeded after ``LONGEST_WAIT``, or at once if it would take longer, but not in the
        background; AuthorizationServerUnavailable if the proxy shuts down, and StoreUnavailable.
        """
        if self._closed:
            raise _shutting_down()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane = self._lane(issuer)
        if background:
            key = object() if key is None else key
            lane.add_background(waiter, key, expires_at)
        else:
            lane.add_request(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.unused(issuer)
            raise
        finally:
            lane.forget(key)

    def later(self, issuer: str, expires_at: float, begin: Begin) -> None:
        """Call ``begin`` in the background when its turn has come; nothing is awaited until then."""
        if not self._closed:
            self._lane(issuer).add(begin, expires_at)

    def promote(self, issuer: str, key: Hashable) -> None:
        """Let a turn that waits in the background go with the requests from now on: one waits for it."""
        lane = self._lanes.get(issuer)
        if lane is not None:
            lane.promote(key)

    def unused(self, issuer: str) -> None:
        """Give back a turn: nothing was sent."""
        lane = self._lanes.get(issuer)
        if lane is not None:
            lane.give_back()

    async def sending(self, issuer: str) -> None:
        """Wait until this process may send one more refresh to an issuer, which has had its turn; it is sent at once
        then. Raises RefreshRateExceeded if a pause has begun since its turn."""
        sending = self._sending(issuer)
        await sending.wait(max(1, int(self.rate)))
        if (left := sending.paused_until - self.clock()) > 0:
            raise _paused(left)

    async def pause(self, issuer: str, seconds: float) -> None:
        """Send nothing for a time that the server has asked for: at once in this process, then in the others too.

        If the store fails, the others do not hear of it.
        """
        now = self.clock()
        self._sending(issuer).paused_until = now + min(seconds, LONGEST_PAUSE)
        with contextlib.suppress(StoreError):
            await self.slots.pause(issuer, until=now + seconds, now=now)
        lane = self._lanes.get(issuer)
        if lane is not None:
            lane.drop_reserved()

    async def aclose(self) -> None:
        """End all waiting."""
        self._closed = True
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.fail(_shutting_down(), background=True)
            lane.task.cancel()
        await asyncio.gather(*(lane.task for lane in lanes), return_exceptions=True)

    def set_rate(self, rate: float) -> None:
        """Change the rate, also for those that wait."""
        self.rate = rate
        for lane in self._lanes.values():
            lane.look_again()

    # StoreReader

    async def reload(self) -> None:
        """Nothing of the store is kept."""

    async def purge(self) -> None:
        """Delete what is kept of issuers that are not used. Raises StoreError."""
        now = asyncio.get_running_loop().time()
        over = [issuer for issuer, sending in self._sendings.items() if sending.is_over(now, self.clock())]
        for issuer in set(over) - set(self._lanes):
            del self._sendings[issuer]
        await self.slots.purge(self.clock())

    def _sending(self, issuer: str) -> "_Sending":
        return self._sendings.setdefault(issuer, _Sending())

    def _lane(self, issuer: str) -> "_Lane":
        lane = self._lanes.get(issuer)
        if lane is None:
            lane = self._lanes[issuer] = _Lane(self, issuer, self._sending(issuer), lambda: self._lanes.pop(issuer))
        return lane


class _Sending:
    """When this process has sent the last refreshes to one issuer, and those that wait to be sent."""

    def __init__(self) -> None:
        self.waiting = 0
        self.paused_until = 0.0
        """Unix seconds. The store may be slow, and those that have had their turns do not look there again."""
        self._turn = asyncio.Lock()
        self._sent: deque[float] = deque()

    async def wait(self, burst: int) -> None:
        """Wait until one more of ``burst`` in a second may be sent: one after the other, in their order."""
        loop = asyncio.get_running_loop()
        self.waiting += 1
        try:
            async with self._turn:
                if len(self._sent) >= burst:
                    await asyncio.sleep(self._sent[-burst] + SENDING_SLACK - loop.time())
                self._sent.append(loop.time())
                while len(self._sent) > burst:
                    self._sent.popleft()
        finally:
            self.waiting -= 1

    def is_over(self, now: float, unix_now: float) -> bool:
        """Return whether nothing has to be known of it any more; the first time is the event loop's."""
        quiet = not self._sent or self._sent[-1] + SENDING_SLACK < now
        return quiet and not self.waiting and self.paused_until <= unix_now


class _Lane:
    """Those that wait for one issuer, and the task that gives them their turns; it ends when nobody waits."""

    def __init__(self, rate: RefreshRate, issuer: str, sending: _Sending, on_end: Callable[[], object]) -> None:
        self._rate = rate
        self._issuer = issuer
        self._sending = sending
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._requests: deque[asyncio.Future[None]] = deque()
        self._background: list[tuple[float, int, Begin]] = []
        self._expired: deque[Begin] = deque()
        self._promotable: dict[Hashable, asyncio.Future[None]] = {}
        self._times: deque[float] = deque()
        """Reserved turns, by the clock of the event loop."""
        self._sent: deque[float] = deque()
        """The last turns that were given: a store that is slow must not bring those of two seconds together."""
        self._reserve_at = 0.0
        """When more may be reserved, by the same clock."""
        self._woken = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    # Those that wait

    def add_request(self, waiter: asyncio.Future[None]) -> None:
        if len(self._requests) / self._rate.rate >= LONGEST_WAIT:
            waiter.set_exception(self._exceeded())
            return
        if not self._requests:
            self._reserve_at = 0.0
        self._requests.append(waiter)
        expiry = self._loop.call_later(LONGEST_WAIT, self._expire, waiter)
        waiter.add_done_callback(lambda _: expiry.cancel())
        self._woken.set()

    def add_background(self, waiter: asyncio.Future[None], key: Hashable, expires_at: float) -> None:
        self._promotable[key] = waiter
        self.add(lambda: _resolve(waiter), expires_at)

    def add(self, begin: Begin, expires_at: float) -> None:
        heapq.heappush(self._background, (expires_at, next(self._numbers), begin))
        self._woken.set()

    def promote(self, key: Hashable) -> None:
        waiter = self._promotable.pop(key, None)
        if waiter is not None and not waiter.done():
            # What it has left in the background is dropped when its turn comes.
            self.add_request(waiter)

    def forget(self, key: Hashable) -> None:
        self._promotable.pop(key, None)

    def give_back(self) -> None:
        if self._sent:
            self._sent.pop()
        self._times.appendleft(self._loop.time())
        self._woken.set()

    def drop_reserved(self) -> None:
        self._times.clear()
        self.look_again()

    def look_again(self) -> None:
        """Look at the store again: something has changed."""
        self._reserve_at = 0.0
        self._woken.set()

    def fail(self, error: McpAuthProxyError, *, background: bool = False) -> None:
        """Let those that wait fail; those of the background only if ``background``."""
        waiters = [*self._requests, *(self._promotable.values() if background else ())]
        self._requests.clear()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def _expire(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            waiter.set_exception(self._exceeded())

    def _exceeded(self) -> RefreshRateExceeded:
        waiting = sum(not waiter.done() for waiter in self._requests)
        return RefreshRateExceeded(
            f"Too many tokens are being renewed: an authorization server is sent at most {self._rate.rate:g} refreshes "
            "a second (limits.refresh_rate).",
            retry_after=_whole_seconds(max(1, waiting) / self._rate.rate),
        )

    # Turns

    async def _run(self) -> None:
        try:
            while self._waiting:
                self._woken.clear()
                if not self._hand_out():
                    await asyncio.sleep(0)
                    continue
                try:
                    await self._reserve()
                except StoreError as failure:
                    self.fail(failure)
                    self._reserve_at = self._loop.time() + 1.0
                if self._waiting:
                    await self._sleep()
        finally:
            self._on_end()

    @property
    def _waiting(self) -> int:
        return len(self._requests) + len(self._background) + len(self._expired)

    @property
    def _wanted(self) -> int:
        """How many turns are to be reserved. What the background needs is looked at when no request waits."""
        return (len(self._requests) or self._waiting) - len(self._times)

    def _hand_out(self) -> bool:
        """Give the turns that have come. Return False if there is more to do at once."""
        self._requests = deque(waiter for waiter in self._requests if not waiter.done())
        burst, window = Pace.of(self._rate.rate)
        dropped = 0
        while self._times and self._times[0] <= (now := self._loop.time()):
            if len(self._sent) >= burst and (earliest := self._sent[-burst] + window / SLACK) > now:
                self._times[0] = earliest
                break
            if self._sending.waiting >= burst or self._sending.paused_until > self._rate.clock():
                # Some have come together, or a server wants its requests twice: first those have to leave. Or a pause
                # is not in the store yet.
                self._times[0] = now + LOOK_AGAIN
                break
            begin = self._next()
            if begin is None:
                break
            if begin():
                self._times.popleft()
                self._sent.append(now)
                while len(self._sent) > burst:
                    self._sent.popleft()
            elif (dropped := dropped + 1) >= MANY:
                return False
        return True

    def _next(self) -> Begin | None:
        while self._requests:
            waiter = self._requests.popleft()
            if not waiter.done():
                return lambda: _resolve(waiter)
        now = self._rate.clock()
        while self._background:
            expires_at, _, begin = heapq.heappop(self._background)
            if expires_at > now:
                return begin
            self._expired.append(begin)
        return self._expired.popleft() if self._expired else None

    async def _reserve(self) -> None:
        """Reserve turns if some are needed, and may be had soon."""
        started, wanted, pace = self._loop.time(), self._wanted, Pace.of(self._rate.rate)
        if wanted <= 0 or started < self._reserve_at:
            return
        spaced = not self._requests
        ahead, refill = (BACKGROUND_AHEAD, REFILL / 2) if spaced else (AHEAD, REFILL)
        # Somebody new, or a pause, sets it anew meanwhile.
        self._reserve_at = inf
        now = self._rate.clock()
        reserved = await self._rate.slots.reserve(self._issuer, pace, now=now, count=wanted, ahead=ahead, spaced=spaced)
        self._times.extend(started + at - now for at in reserved.times)
        self._reserve_at = min(self._reserve_at, started + reserved.next_at - now - ahead + refill)
        if reserved.paused_until - now > LONGEST_WAIT:
            self.fail(_paused(reserved.paused_until - now))

    async def _sleep(self) -> None:
        """Wait for the next turn, for the time to reserve more, or for somebody new."""
        until = self._loop.time() + LONGEST_SLEEP
        if self._times:
            until = min(until, self._times[0])
        if self._wanted > 0:
            until = min(until, self._reserve_at)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._woken.wait()


def _resolve(waiter: asyncio.Future[None]) -> bool:
    if waiter.done():
        return False
    waiter.set_result(None)
    return True


def _paused(seconds: float) -> RefreshRateExceeded:
    """Return the error for a refresh in a pause that ends in ``seconds``."""
    left = _whole_seconds(seconds)
    return RefreshRateExceeded(
        f"The authorization server has asked for a pause (Retry-After), which ends in {left:.0f} s.", retry_after=left
    )


def _whole_seconds(seconds: float) -> float:
    return float(ceil(min(max(seconds, 1.0), LONGEST_PAUSE)))


def _shutting_down() -> AuthorizationServerUnavailable:
    return AuthorizationServerUnavailable("The proxy is shutting down.")
