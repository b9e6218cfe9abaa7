"""The time of the server, which all processes on one store share."""

import time

_BOOT = getattr(time, "CLOCK_BOOTTIME", None)
_PRECISE = 0.1
"""Seconds that an answer takes at most for its time to be believed at once."""

_LONGEST = 30.0
"""Seconds for which a precise measurement is preferred to a later one that is less precise."""


def boot_time() -> float:
    """Return seconds that nobody sets, and that go on while the machine is suspended."""
    return time.clock_gettime(_BOOT) if _BOOT is not None else time.monotonic()


class ServerClock:
    """The server's clock as this process knows it."""

    def __init__(self) -> None:
        self._offset: float | None = None
        self._took = 0.0
        self._measured_at = 0.0

    def measured(self, server: float, *, asked_at: float, answered_at: float) -> None:
        """Note the server's time (Unix seconds), which was asked for between two readings of ``boot_time``."""
        took, old = answered_at - asked_at, answered_at - self._measured_at > _LONGEST
        if self._offset is None or old or took <= max(_PRECISE, self._took):
            self._offset = server - (asked_at + answered_at) / 2
            self._took, self._measured_at = took, answered_at

    def now(self) -> float:
        """Return the Unix seconds of the server; this machine's until they are known."""
        return time.time() if self._offset is None else boot_time() + self._offset
