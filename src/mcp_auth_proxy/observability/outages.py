"""Warn about servers that can't be used, at a bounded rate."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from mcp_auth_proxy.observability.trace import log_extra

logger = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds between two warnings about one server: in an outage every request fails, and its client gets the reason."""


CallLater = Callable[[float, Callable[[], None]], object]


@dataclass(slots=True)
class _Warned:
    """The last line about a server, and the failures since. ``at`` is a time of the monotonic clock."""

    at: float
    more: int = 0
    reason: str = ""


def _call_later(delay: float, callback: Callable[[], None]) -> object:
    return asyncio.get_running_loop().call_later(delay, callback)


class OutageLog:
    """Warn about servers; each at most once per ``INTERVAL``. What is left out is counted, and logged later."""

    def __init__(self, call_later: CallLater = _call_later) -> None:
        self._call_later = call_later
        self._warned: dict[str, _Warned] = {}
        self.unreachable: set[str] = set()
        """The servers to which the last request could not connect."""
        self._reasons: dict[str, str] = {}
        self.failing: set[str] = set()
        """The servers with which the last request failed, those that could not be connected to included."""
        self.on_reached: Callable[[str], None] | None = None
        """Called with a server of these with which a request has succeeded."""

    def warn(self, server: str, reason: str, *, trace_id: str | None = None, level: int = logging.WARNING) -> None:
        """Log a warning about a configured server, or count it if the last one is less than ``INTERVAL`` seconds old.

        ``trace_id`` is that of the request that failed.
        """
        if self.is_due(server):
            self._warned[server] = _Warned(time.monotonic())
            logger.log(level, "server %s: %s", server, reason, extra=log_extra(trace_id))
            return
        last = self._warned[server]
        if not last.more:
            self._call_later(last.at + INTERVAL - time.monotonic(), lambda: self._sum_up(server, last))
        last.more += 1
        last.reason = reason

    def note_unreachable(self, server: str, reason: str) -> None:
        """Note that a request could not connect to a server."""
        self.unreachable.add(server)
        self.failing.add(server)
        self._reasons[server] = reason

    def reached(self, server: str) -> None:
        """Note that a request has succeeded."""
        if server not in self.failing:
            return
        self.failing.discard(server)
        self.unreachable.discard(server)
        self._reasons.pop(server, None)
        if self.on_reached is not None:
            self.on_reached(server)

    def unreachable_reason(self, server: str) -> str | None:
        """Return why the last request could not connect to a server; None if it could."""
        return self._reasons.get(server, "") if server in self.unreachable else None

    def is_due(self, server: str) -> bool:
        """Return whether ``warn`` would log at once."""
        last = self._warned.get(server)
        return last is None or (not last.more and time.monotonic() - last.at >= INTERVAL)

    def _sum_up(self, server: str, last: _Warned) -> None:
        """Log how many failures were left out, if there has not been a line about the server since."""
        if self._warned.get(server) is last:
            self._warned[server] = _Warned(time.monotonic())
            logger.warning("server %s: %d more failures, the last: %s", server, last.more, last.reason)

    def forget(self, server: str) -> None:
        """Forget a server that was removed or changed: the next failure is logged at once."""
        self._warned.pop(server, None)
        self.failing.discard(server)
        self.unreachable.discard(server)
        self._reasons.pop(server, None)
