"""Bounds on asking again for permission that was asked for already.

One request can't go on for ever by itself; but where requests are answered at once with a link, a server that is never
satisfied would have the user consent anew for each request of the client.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from mcp_auth_proxy.errors import AuthorizationError

MAX_AUTHORIZATIONS = 3
"""Authorizations for the same scopes, the first one included: more are of no use (MCP, scope challenge handling)."""

REMEMBERED = 600.0
"""Seconds after which a server may ask for the same once more."""


@dataclass(slots=True)
class _Repeated:
    times: int
    last: float


class StepUpLimiter:
    """Counts, over all requests, the authorizations in a row that ask for nothing new."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._repeated: dict[Hashable, _Repeated] = {}

    def count(self, key: Hashable, *, server: str, asked: Iterable[str], already: Iterable[str]) -> None:
        """Note that ``asked`` is to be authorized on top of ``already``. Raises AuthorizationError at the bound."""
        asked, now = tuple(asked), self._clock()
        if not set(asked) <= set(already):
            self._repeated.pop(key, None)
            return
        before = self._repeated.get(key)
        times = before.times if before is not None and now - before.last < REMEMBERED else 0
        if times + 1 >= MAX_AUTHORIZATIONS:
            raise step_up_limit(server, asked)
        self._repeated[key] = _Repeated(times + 1, now)


def step_up_limit(server: str, asked: Iterable[str]) -> AuthorizationError:
    """Return the error for a server that goes on asking."""
    return AuthorizationError(
        f"Server {server} goes on asking for more permission after {MAX_AUTHORIZATIONS} authorizations "
        f"(insufficient_scope, RFC 6750 §3.1). The scopes it asked for last: {' '.join(asked) or 'none'}. "
        f"Look at what the account may grant there; it can be asked again in {REMEMBERED / 60:.0f} minutes."
    )
