"""Credentials that do not hold: how many an address may present to the API, the MCP endpoints and the sign-in together.

A credential that holds is accepted however many others from its address did not: several users may share one.
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from mcp_auth_proxy.net.peers import IPAddress, limit_key, parse_address
from mcp_auth_proxy.web.api.limits import FAILED_CREDENTIALS, RateLimit

MAX_WAITING = 5
"""Requests of one address whose answer waits for the next second."""

_LEAST = 0.01
"""Seconds that are waited in any case: timers are not exact."""

TOO_MANY = "Too many credentials from this address did not hold."


class FailedCredentials:
    """Count them. ``clock`` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._limit = RateLimit(FAILED_CREDENTIALS, clock=clock)
        self._waiting: Counter[IPAddress | str] = Counter()

    def count(self, client: str) -> float:
        """Count a credential that does not hold; return the seconds until the next if there were too many, else 0.

        ``client``: an address, or "CLIENT through PEER" (see ``net.peers``).
        """
        return self._limit.take(_counted(client))

    async def pace(self, client: str) -> float:
        """Do as ``count``, but wait until it can be counted: MCP clients have to see the 401 of a token that has ended.

        Only if too many from this address wait already, return the seconds to wait.
        """
        counted = _counted(client)
        seconds = self._limit.take(counted)
        if not seconds or self._waiting[counted] >= MAX_WAITING:
            return seconds
        self._waiting[counted] += 1
        try:
            for _ in range(MAX_WAITING + 1):
                await asyncio.sleep(seconds + _LEAST)
                if not (seconds := self._limit.take(counted)):
                    break
        finally:
            self._waiting[counted] -= 1
            if not self._waiting[counted]:
                del self._waiting[counted]
        return seconds


def _counted(client: str) -> IPAddress | str:
    """Return what is counted by: an address, or a network for IPv6."""
    address = client.partition(" through ")[0]
    try:
        return limit_key(parse_address(address))
    except ValueError:
        return address
