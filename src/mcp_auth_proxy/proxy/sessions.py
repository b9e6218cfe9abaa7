"""What the proxy remembers of MCP sessions."""

from collections import OrderedDict

from mcp_auth_proxy.models import Account

SESSIONS_REMEMBERED = 10_000

LONGEST_ID = 256
"""Bytes. A session with a longer id (most are UUIDs) is treated as one that declared nothing."""


class Sessions:
    """The sessions that declared URL elicitation when they were initialized. Bounded: the oldest is dropped first."""

    def __init__(self) -> None:
        self._elicits: OrderedDict[tuple[Account, bytes], None] = OrderedDict()

    def remember(self, account: Account, session_id: bytes) -> None:
        """Remember a session that declared URL elicitation, by the id that its client has."""
        if len(session_id) > LONGEST_ID:
            return
        self._elicits[account, session_id] = None
        if len(self._elicits) > SESSIONS_REMEMBERED:
            self._elicits.popitem(last=False)

    def elicits(self, account: Account, session_id: bytes | None) -> bool:
        """Return whether a session declared URL elicitation."""
        return session_id is not None and (account, session_id) in self._elicits
