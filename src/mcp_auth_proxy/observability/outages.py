"""What keeps requests from their servers, told in the log."""

import logging
import time

logger = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds between two lines about one server: in an outage every request fails, and says so to its client."""


class OutageLog:
    """Knows when which server was told of last."""

    def __init__(self) -> None:
        self._outage_logged: dict[str, float] = {}

    def warn(self, server: str, reason: str) -> None:
        """Write a line about a configured server, unless there was one just before."""
        now = time.monotonic()
        last = self._outage_logged.get(server)
        if last is not None and now - last < INTERVAL:
            return
        self._outage_logged[server] = now
        logger.warning("server %s: %s", server, reason)
