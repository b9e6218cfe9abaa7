"""An authenticator with a table of callers, for tests of what they may do: a request names one of them."""

from collections.abc import Callable, Iterable

from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity import Fields
from mcp_auth_proxy.models import ALL_SCOPES, Caller, Principal, Role, Scope

FIELD = b"x-test-caller"


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
