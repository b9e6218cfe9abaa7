"""Small authenticators that believe the field ``X-Test-Caller``: tables of callers, which a test may change."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from mcp_auth_proxy.errors import CallerRefused, McpAuthProxyError
from mcp_auth_proxy.identity import Fields
from mcp_auth_proxy.models import ALL_SCOPES, Caller, Principal, Role, Scope

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

    def identify_nowait(self, fields: Fields, peer: str) -> Caller | None:
        self.peers.add(peer)
        return self._caller(fields) if self.cached else None

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

    def change(self, name: str, **changes: object) -> None:
        """Change fields of a caller, such as ``jwt`` or ``scopes``."""
        self.callers[name.encode()] = replace(self.callers[name.encode()], **changes)  # type: ignore[arg-type]

    def disable(self, name: str) -> None:
        """Refuse a caller from now on, and say so."""
        caller = self.callers.pop(name.encode())
        for callback in self._callbacks:
            callback(caller.principal.id)


def caller(
    name: str, role: Role = Role.MEMBER, *, project: str = "default", scopes: Iterable[Scope] = ALL_SCOPES
) -> Caller:
    """Return a caller with a key, whose principal has its name for an id."""
    principal = Principal(id=name, name=name, role=role, project_id=project)
    return Caller(principal=principal, credential=f"key:{name}", scopes=frozenset(scopes))


class TableAuthenticator:
    """An ``Authenticator`` that believes the field ``X-Test-Caller``, if the table has that name."""

    anonymous = False
    credential_fields = frozenset({FIELD})

    def __init__(self, *callers: Caller) -> None:
        self.callers = {each.principal.name: each for each in callers}
        self._callbacks: list[Callable[[str], None]] = []

    def identify_nowait(self, fields: Fields, peer: str) -> Caller | None:
        return self._find(fields)

    async def identify(self, fields: Fields, peer: str) -> Caller:
        found = self._find(fields)
        if found is None:
            raise CallerRefused("No caller of that name.")
        return found

    def on_refused(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def refuse(self, name: str) -> None:
        """Let a caller call no longer."""
        refused = self.callers.pop(name)
        for callback in self._callbacks:
            callback(refused.principal.id)

    def _find(self, fields: Fields) -> Caller | None:
        names = [value.decode("latin-1") for name, value in fields if name == FIELD]
        return self.callers.get(names[0]) if len(names) == 1 else None
