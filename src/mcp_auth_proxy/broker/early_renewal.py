"""When to begin with the tokens that expire together: so many of them that the usual margin is too short.

Refreshes have a rate, so tokens that expire in one minute may take many to renew. Counted back from the last, each
group of tokens that expire within ``GROUP`` seconds has a time at which work has to begin so that it, and all that come
after, are renewed in time.
"""

from collections.abc import Mapping

from mcp_auth_proxy.models import TokenSet

GROUP = 10.0
"""Seconds of expiry that count as one."""

RESERVE = 30.0
"""Seconds before the expiry at which a token should be new."""

HEADROOM = 1.25
"""How much longer it takes than the rate alone says: requests go first."""

YOUNGEST = 0.5
"""Share of its lifetime that a token is kept at least."""


def earliest(tokens: TokenSet) -> float:
    """Return before when tokens are not renewed early; they have an expiry."""
    expires_at = tokens.expires_at or tokens.obtained_at
    return tokens.obtained_at + (expires_at - tokens.obtained_at) * YOUNGEST


def group(expires_at: float) -> int:
    return int(expires_at // GROUP)


def begin_at(counts: Mapping[int, int], rate: float) -> dict[int, float]:
    """Return when to begin with each group, in Unix seconds; ``counts``: how many tokens it has."""
    begins: dict[int, float] = {}
    latest = float("inf")
    for number in sorted(counts, reverse=True):
        latest = min(latest, number * GROUP - RESERVE) - counts[number] * HEADROOM / rate
        begins[number] = latest
    return begins
