"""What is remembered of MCP sessions."""

from collections import OrderedDict

SESSIONS_REMEMBERED = 10_000

LONGEST_ID = 256
"""Bytes; a session with a longer id (most are UUIDs) counts as one that declared nothing."""


class Sessions:
    """Which MCP sessions declared URL elicitation when they were initialized; bounded, oldest forgotten first."""

    def __init__(self) -> None:
        self._elicits: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def remember(self, server: str, session_id: bytes) -> None:
        if len(session_id) > LONGEST_ID:
            return
        self._elicits[server, session_id] = None
        if len(self._elicits) > SESSIONS_REMEMBERED:
            self._elicits.popitem(last=False)

    def elicits(self, server: str, session_id: bytes | None) -> bool:
        return session_id is not None and (server, session_id) in self._elicits
