"""Limit how often the user is asked again for permission that was requested before.

``ChallengeHistory`` bounds this within one request. But if requests are answered at once with a link, a server that is
never satisfied would make the user consent again for each request of the client.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from mcp_auth_proxy.errors import AuthorizationDenied, excerpt

MAX_AUTHORIZATIONS = 3
"""Authorizations for the same scopes, including the first: more do not help (MCP, scope challenge handling)."""

REMEMBERED = 600.0
"""Seconds after which a server may ask for the same scopes again."""


@dataclass(slots=True)
class _Repeated:
    times: int
    last: float


class StepUpLimiter:
    """Count, over all requests, consecutive authorizations that ask for no new scope."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._repeated: dict[Hashable, _Repeated] = {}

    def count(self, key: Hashable, *, server: str, requested: Iterable[str], already: Iterable[str]) -> None:
        """Record that ``requested`` will be authorized in addition to ``already``.

        Raises AuthorizationDenied if the limit is reached.
        """
        requested, now = tuple(requested), self._clock()
        if not set(requested) <= set(already):
            self._repeated.pop(key, None)
            return
        before = self._repeated.get(key)
        times = before.times if before is not None and now - before.last < REMEMBERED else 0
        if times + 1 >= MAX_AUTHORIZATIONS:
            raise step_up_limit(server, requested)
        self._repeated[key] = _Repeated(times + 1, now)


def step_up_limit(server: str, requested: Iterable[str]) -> AuthorizationDenied:
    """Return the error for a server that keeps asking for more."""
    return AuthorizationDenied(
        f"Server {server} keeps asking for more permission after {MAX_AUTHORIZATIONS} authorizations "
        f"(insufficient_scope, RFC 6750 §3.1). The scopes it asked for last: {excerpt(' '.join(requested)) or 'none'}. "
        f"Check what the account may grant there; it can be asked again in {REMEMBERED / 60:.0f} minutes.",
        "insufficient_scope",
    )
