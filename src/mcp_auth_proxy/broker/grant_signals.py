"""Say in the log what becomes of grants, before a request fails: ready, about to end, not renewed now.

Each line is written once for a grant and a change of its state, never for each request.
"""

import logging
from collections.abc import Callable
from datetime import datetime

from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Account, Grant
from mcp_auth_proxy.observability.outages import OutageLog

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 10_000
"""Servers and grants that are remembered to have been told of; beyond it, all are forgotten."""


def local_time(moment: float) -> str:
    """Return a time for a user, with the offset of this machine's zone."""
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


class GrantSignals:
    """Log changes of grants. ``clock`` returns Unix seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.says_ready = False
        """Whether a line says that a server is ready: for a proxy that serves it, not for commands."""
        self._ready: set[str] = set()
        self._warned: set[tuple[int, float]] = set()

    def usable(self, grant: Grant, *, renewable: bool) -> None:
        """Note a grant whose token can be used: its server is ready, though maybe not for long."""
        server = grant.key.account.server
        if self.says_ready and server not in self._ready:
            if len(self._ready) >= MAX_REMEMBERED:
                self._ready.clear()
            self._ready.add(server)
            logger.info("server %s is ready", server)
        ends = grant.tokens.expires_at
        if renewable or ends is None or ends <= self._clock() or (grant.id, ends) in self._warned:
            return
        if len(self._warned) >= MAX_REMEMBERED:
            self._warned.clear()
        self._warned.add((grant.id, ends))
        logger.warning(
            "server %s: its grant can't be renewed, and ends at %s. Authorize it again before then: "
            "mcp-auth-proxy login %s",
            server,
            local_time(ends),
            _name(grant.key.account),
        )

    def not_renewed(self, grant: Grant, reason: str, retry_at: float | None, outages: OutageLog) -> None:
        """Note the first of the renewals that fail for a reason that passes."""
        again = "" if retry_at is None else f", and is tried again from {local_time(retry_at)} on"
        ends = grant.tokens.expires_at
        until = f"; its token is good until {local_time(ends)}" if ends is not None and ends > self._clock() else ""
        # There it counts as the line about the server, of which its requests would write another.
        outages.warn(grant.key.account.server, f"its grant can't be renewed now{again}{until}: {reason}")

    def renewed_again(self, grant: Grant) -> None:
        """Note that a grant was renewed after that had failed."""
        logger.info("server %s: its grant could be renewed again", grant.key.account.server)


def _name(account: Account) -> str:
    return account.server if account.name == DEFAULT_ACCOUNT else f"{account.server}@{account.name}"
