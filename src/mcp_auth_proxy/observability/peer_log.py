"""Warn about clients that attack or misbehave, at a bounded rate: the log must not be what they fill."""

import logging
import time
from collections import defaultdict

logger = logging.getLogger(__name__)

INTERVAL = 60.0
"""Seconds in which one client is named once."""

MAX_PEERS = 5
"""Clients that are named in ``INTERVAL``: an attack from many addresses takes few lines too."""


class PeerLog:
    """Warn about one kind of behavior; each client at most once per ``INTERVAL``, and few of them."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._since = 0.0

    def may_warn(self, peer: str) -> bool:
        """Return whether a warning about this client is due, and count it."""
        now = time.monotonic()
        if now - self._since >= INTERVAL:
            self._warned.clear()
            self._since = now
        if peer in self._warned or len(self._warned) >= MAX_PEERS:
            return False
        self._warned.add(peer)
        return True


class RefusalLog:
    """Warn about requests that break a rule: for each kind of refusal, what ``PeerLog`` allows."""

    def __init__(self) -> None:
        self._kinds: defaultdict[str, PeerLog] = defaultdict(PeerLog)

    def warn(self, client: str, status: int, reason: str, *, kind: str = "") -> None:
        """Log why a request of a client is refused. ``kind``: one of few texts; by default the reason is one."""
        if self._kinds[kind or reason].may_warn(client):
            logger.warning("client %s sent a request that is refused: %s (%d)", client, reason.rstrip("."), status)
