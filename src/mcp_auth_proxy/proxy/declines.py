"""The users who have just declined to authorize a server: they are not asked again for a minute."""

import asyncio
from collections import OrderedDict

SECONDS = 60.0
"""Seconds that requests are answered without a link."""

KEPT = 1000
"""Users and servers that are remembered; the oldest is dropped first."""


class Declines:
    """Who has declined what, by the id of the caller and the name of the server. Belongs to one event loop."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[str, str], float] = OrderedDict()

    def add(self, principal: str, server: str) -> None:
        """Note that a user has declined."""
        self._until[principal, server] = asyncio.get_running_loop().time() + SECONDS
        self._until.move_to_end((principal, server))
        if len(self._until) > KEPT:
            self._until.popitem(last=False)

    def has(self, principal: str, server: str) -> bool:
        """Return whether a user has declined within the last minute."""
        until = self._until.get((principal, server))
        return until is not None and asyncio.get_running_loop().time() < until
