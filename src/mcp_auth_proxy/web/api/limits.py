"""How often a principal may call, and how often an address may present a credential that does not hold.

Each limit is a token bucket: so many at once, then so many a second. Only what is not full is kept.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

MAX_BUCKETS = 10_000
"""Buckets that are kept for one limit; beyond it, the one that was used least recently is full again."""


@dataclass(frozen=True, slots=True)
class Rate:
    """``burst`` at once, then ``per_second``."""

    burst: float
    per_second: float


CALLS = Rate(200, 600 / 60)
"""Per principal."""

FLOWS = Rate(10, 10 / 60)
"""Per principal."""

FAILED_CREDENTIALS = Rate(5, 5)
"""Per address; for IPv6 per network (``net.peers.limit_key``)."""


class RateLimit:
    """The buckets of one limit, by whom they are for. ``clock`` returns seconds."""

    def __init__(self, rate: Rate, *, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: dict[Hashable, tuple[float, float]] = {}
        """What is left, and when that was counted; the one used least recently comes first."""

    def wait(self, key: Hashable) -> float:
        """Return the seconds until the next one is possible, 0 if it is possible now."""
        return max(0.0, (1 - self._left(key)) / self._rate.per_second)

    def take(self, key: Hashable) -> float:
        """Count one if it is possible now and return 0; else return the seconds until it is."""
        seconds = self.wait(key)
        if not seconds:
            left = self._left(key) - 1
            self._buckets.pop(key, None)
            self._buckets[key] = (left, self._clock())
            if len(self._buckets) > MAX_BUCKETS:
                del self._buckets[next(iter(self._buckets))]
        return seconds

    def _left(self, key: Hashable) -> float:
        left, counted = self._buckets.get(key, (self._rate.burst, 0.0))
        # The clock may have been set back.
        elapsed = max(0.0, self._clock() - counted)
        return min(self._rate.burst, left + elapsed * self._rate.per_second)


class Limits:
    """The limits of the API; those of ``web.failed_credentials`` are there for others too."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.calls = RateLimit(CALLS, clock=clock)
        self.flows = RateLimit(FLOWS, clock=clock)
