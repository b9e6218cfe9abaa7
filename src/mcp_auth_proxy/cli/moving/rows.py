"""How a grant that moves is shown."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from mcp_auth_proxy.models import LOCAL, Grant, Principal


def owner_names(principals: Iterable[Principal]) -> Mapping[str, str]:
    """Return the names of principals by their ids."""
    return {principal.id: principal.name for principal in principals}


def grant_text(grant: Grant, names: Mapping[str, str]) -> str:
    """Return which login a grant is, in words: ``linear@work of anna, since …``."""
    owner = _owner(grant, names)
    return f"{grant.key.account.shown}{f' of {owner}' if owner != LOCAL else ''}, since {_iso(grant.granted_at)}"


def grant_row(grant: Grant, names: Mapping[str, str]) -> dict[str, Any]:
    """Return which login a grant is, for ``--json``."""
    account = grant.key.account
    return {
        "server": account.server,
        "account": account.name,
        "principal": _owner(grant, names),
        "principal_id": account.principal,
        "issuer": grant.key.issuer,
        "granted_at": _iso(grant.granted_at),
    }


def _owner(grant: Grant, names: Mapping[str, str]) -> str:
    principal = grant.key.account.principal
    return "shared" if principal.startswith("project:") else names.get(principal, principal)


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")
