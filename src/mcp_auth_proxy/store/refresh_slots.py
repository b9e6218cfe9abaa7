"""When refreshes may be sent to each authorization server: a schedule that all processes on one store share.

A row of ``meta`` for each issuer has the times of its last refreshes, those that are reserved for the next moments, and
the end of a pause that the server has asked for (``Retry-After``). Between a refresh and the one that comes ``burst``
later at least ``window`` seconds pass. So after a quiet second a burst goes at once, and what has to wait goes at even
intervals. The upsert is also the lock that puts processes one after the other.
"""

import json
import math
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

from mcp_auth_proxy.store.engine import Engine, Transaction

SLACK = 1.1
"""Share of a second that counts as one: requests that leave a second apart may arrive closer to each other."""

MAX_AHEAD = 5.0
"""Seconds from now beyond which no refresh is ever reserved: the clock was set back, and the row is begun anew."""

LONGEST_PAUSE = 3600.0
"""Seconds of a pause beyond which the same holds."""

KEPT_SECONDS = 3600.0
"""Seconds after which the row of an issuer that is not used is deleted."""

_PREFIX = "refresh_rate:"
_FREE = b""
# The value stays as it is; the row is locked until the transaction ends.
_LOCK = """
    INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = meta.value
    RETURNING value
"""
_SET = "UPDATE meta SET value = :value WHERE name = :name"
_FIND = "SELECT value FROM meta WHERE name = :name"
_ALL = "SELECT name, value FROM meta WHERE substr(name, 1, :length) = :prefix"


class Pace(NamedTuple):
    """At most ``burst`` refreshes in any ``window`` seconds."""

    burst: int
    window: float

    @property
    def interval(self) -> float:
        """Seconds between two refreshes if many wait."""
        return self.window / self.burst

    @classmethod
    def of(cls, rate: float) -> "Pace":
        """Return the pace for ``rate`` refreshes in a second: a whole number, or less than 1."""
        return cls(max(1, int(rate)), SLACK * max(1.0, 1.0 / rate))


class Reserved(NamedTuple):
    """Times in Unix seconds."""

    times: list[float]
    """When a refresh may be sent, one for each."""
    next_at: float
    """The next time that could be reserved."""
    paused_until: float
    """0 if the server has asked for no pause."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The row of an issuer. Times are Unix seconds, in ascending order."""

    times: tuple[float, ...] = ()
    paused_until: float = 0.0

    @property
    def last(self) -> float:
        """The end of what it is about."""
        return max(self.paused_until, self.times[-1] if self.times else 0.0)

    def at(self, now: float) -> "Schedule":
        """Return it without what can't be true now."""
        times = () if self.times and self.times[-1] > now + MAX_AHEAD else self.times
        until = self.paused_until if now < self.paused_until <= now + LONGEST_PAUSE else 0.0
        return Schedule(times, until)

    def next_at(self, pace: Pace, now: float, *, spaced: bool) -> float:
        """Return when the next refresh may be sent. ``spaced``: at an interval from the last one in any case."""
        at = max(now, self.paused_until)
        if len(self.times) >= pace.burst:
            at = max(at, self.times[-pace.burst] + pace.window)
        if self.times and (spaced or at > now):
            at = max(at, self.times[-1] + pace.interval)
        return max(at, self.times[-1]) if self.times else at

    def reserve(self, pace: Pace, now: float, *, count: int, ahead: float, spaced: bool) -> tuple["Schedule", Reserved]:
        """Reserve at most ``count`` times that are at most ``ahead`` seconds from now."""
        times: list[float] = []
        schedule = self.at(now)
        at = schedule.next_at(pace, now, spaced=spaced)
        while len(times) < count and at <= now + ahead:
            times.append(at)
            schedule = replace(schedule, times=(*schedule.times[-pace.burst :], at))
            at = schedule.next_at(pace, now, spaced=spaced)
        return schedule, Reserved(times, at, schedule.paused_until)


class RefreshSlots:
    """The schedules in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def reserve(self, issuer: str, pace: Pace, *, now: float, count: int, ahead: float, spaced: bool) -> Reserved:
        """Reserve times for refreshes, as ``Schedule.reserve`` does. Nothing is written if there is none yet."""
        name = _name(issuer)
        row = await self._engine.fetch_one(_FIND, {"name": name})
        before = _read(row["value"] if row is not None else _FREE)
        _, reserved = before.reserve(pace, now, count=count, ahead=ahead, spaced=spaced)
        if not reserved.times:
            return reserved
        async with self._engine.transaction() as transaction:
            before = await _locked(transaction, name)
            schedule, reserved = before.reserve(pace, now, count=count, ahead=ahead, spaced=spaced)
            if reserved.times:
                await transaction.execute(_SET, {"name": name, "value": _value(schedule)})
        return reserved

    async def pause(self, issuer: str, *, until: float, now: float) -> None:
        """Let no process send a refresh before ``until``."""
        name = _name(issuer)
        async with self._engine.transaction() as transaction:
            schedule = (await _locked(transaction, name)).at(now)
            if schedule.paused_until < until:
                schedule = replace(schedule, paused_until=min(until, now + LONGEST_PAUSE))
                await transaction.execute(_SET, {"name": name, "value": _value(schedule)})

    async def purge(self, now: float) -> None:
        """Delete the rows of issuers that are not used any more."""
        asked = {"length": len(_PREFIX), "prefix": _PREFIX}
        old = [
            row["name"]
            for row in await self._engine.fetch_all(_ALL, asked)
            if abs(now - _read(row["value"]).last) > KEPT_SECONDS
        ]
        if old:
            async with self._engine.transaction() as transaction:
                for name in old:
                    await transaction.execute("DELETE FROM meta WHERE name = :name", {"name": name})


def _name(issuer: str) -> str:
    return _PREFIX + sha256(issuer.encode()).hexdigest()


async def _locked(transaction: Transaction, name: str) -> Schedule:
    rows = await transaction.execute(_LOCK, {"name": name, "value": _FREE})
    return _read(rows[0]["value"] if rows else _FREE)


def _value(schedule: Schedule) -> bytes:
    times = [round(at, 3) for at in schedule.times]
    return json.dumps({"times": times, "paused_until": schedule.paused_until}).encode()


def _read(value: object) -> Schedule:
    """Return the schedule in a row; an empty one if there is none, or if something else has written it."""
    try:
        found = json.loads(value if isinstance(value, bytes) else b"")
        times, until = sorted(map(float, found["times"])), float(found["paused_until"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Schedule()
    return Schedule(tuple(times), until) if all(map(math.isfinite, [*times, until])) else Schedule()
