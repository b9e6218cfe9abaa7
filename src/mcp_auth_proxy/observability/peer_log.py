"""Warn about clients that attack or misbehave, at a bounded rate: the log must not be what they fill."""

import time

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
