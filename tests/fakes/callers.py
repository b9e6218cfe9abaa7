"""A small authenticator: a table of callers by the value of ``X-Test-Caller``, which a test may change at any time."""

from collections.abc import Callable
from dataclasses import replace

from mcp_auth_proxy.errors import CallerRefused, McpAuthProxyError
from mcp_auth_proxy.identity import Fields
from mcp_auth_proxy.identity.authenticator import Request
from mcp_auth_proxy.models import Caller, Principal, Role

FIELD = b"x-test-caller"


def principal(name: str, **changes: object) -> Principal:
    """Return a principal whose id is not its name."""
    return replace(Principal(id=f"id-of-{name}", name=name), **changes)  # type: ignore[arg-type]  # any field


def admin(name: str) -> Principal:
    return principal(name, role=Role.ADMIN)


class HeaderCallers:
    """Identify callers by ``X-Test-Caller``; every request whose value is not in ``callers`` is refused."""

    anonymous = False
    credential_fields = frozenset({FIELD, b"authorization", b"x-api-key", b"x-forwarded-user", b"x-proxy-secret"})

    def __init__(self, *principals: Principal) -> None:
        self.callers = {each.name.encode(): Caller(principal=each, credential="key:test") for each in principals}
        self.cached = True
        """False: each request has to wait for its verdict."""
        self.error: McpAuthProxyError | None = None
        """What ``identify`` raises, whoever calls."""
        self.peers: set[str] = set()
        self._callbacks: list[Callable[[str], None]] = []

    def recognize(self, request: Request) -> Caller | None:
        self.peers.add(request.peer)
        return self._caller(request.fields.headers) if self.cached else None

    async def identify(self, fields: Fields, peer: str) -> Caller:
        self.peers.add(peer)
        if self.error is not None:
            raise self.error
        caller = self._caller(fields)
        if caller is None:
            raise CallerRefused("It is not known who calls.")
        return caller

    def _caller(self, fields: Fields) -> Caller | None:
        values = [value for name, value in fields if name == FIELD]
        return self.callers.get(values[0]) if len(values) == 1 else None

    def on_refused(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Do nothing: these callers have no keys."""

    def change(self, name: str, **changes: object) -> None:
        """Change fields of a caller, such as ``jwt`` or ``scopes``."""
        self.callers[name.encode()] = replace(self.callers[name.encode()], **changes)  # type: ignore[arg-type]

    def disable(self, name: str) -> None:
        """Refuse a caller from now on, and say so."""
        caller = self.callers.pop(name.encode())
        for callback in self._callbacks:
            callback(caller.principal.id)
