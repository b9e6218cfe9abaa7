"""Warn about servers that can't be used, at a bounded rate."""

import logging
import time

from mcp_auth_proxy.observability.trace import log_extra

logger = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds between two warnings about one server: in an outage every request fails, and its client gets the reason."""


class OutageLog:
    """Warn about servers; each at most once per ``INTERVAL``."""

    def __init__(self) -> None:
        self._warned_at: dict[str, float] = {}

    def warn(self, server: str, reason: str, *, trace_id: str | None = None) -> None:
        """Log a warning about a configured server, unless the last one is less than ``INTERVAL`` seconds old.

        ``trace_id`` is that of the request that failed.
        """
        if self.is_due(server):
            self._warned_at[server] = time.monotonic()
            logger.warning("server %s: %s", server, reason, extra=log_extra(trace_id))

    def is_due(self, server: str) -> bool:
        """Return whether ``warn`` would log a warning about a server."""
        last = self._warned_at.get(server)
        return last is None or time.monotonic() - last >= INTERVAL

    def forget(self, server: str) -> None:
        """Forget a server that was removed or changed: the next failure is logged at once."""
        self._warned_at.pop(server, None)
