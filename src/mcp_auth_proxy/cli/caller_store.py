"""What ``api-keys`` and ``principals`` do in the store. A running proxy heeds it within a second."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from mcp_auth_proxy.cli import audit
from mcp_auth_proxy.cli.terminal import complain, say, say_json
from mcp_auth_proxy.config.settings import Settings
from mcp_auth_proxy.errors import LastAdmin, McpAuthProxyError
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, DEFAULT_PROJECT, Identity, Principal, PrincipalStatus, Role, Scope
from mcp_auth_proxy.store import Engine, open_store, open_store_read_only, store_exists
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.principals import Principals, new_principal_id

_MEMBER_SCOPES = frozenset({Scope.MCP, Scope.SELF})


@asynccontextmanager
async def _opened(settings: Settings, *, writes: bool = True) -> AsyncIterator[Engine]:
    engine = await (open_store(settings.store, announce=complain) if writes else open_store_read_only(settings.store))
    try:
        yield engine
    finally:
        await engine.close()


async def create_key(
    settings: Settings,
    name: str,
    *,
    role: str | None,
    project: str | None,
    scopes: frozenset[Scope] | None,
    lifetime: float | None,
    change_role: bool = False,
) -> int:
    """Store a new key of the principal ``name`` and print it. Return 0; raise McpAuthProxyError."""
    async with _opened(settings) as engine:
        now = engine.now()
        principal = await _principal(
            engine, settings, name, role=role, project=project, now=now, scopes=scopes, change_role=change_role
        )
        if scopes is None:
            scopes = ALL_SCOPES if principal.role is Role.ADMIN else _MEMBER_SCOPES
        expires_at = None if lifetime is None else now + lifetime
        key, text = make_key(principal=principal.id, name=name, scopes=scopes, now=now, expires_at=expires_at)
        await ApiKeys(engine).add(key)
        await audit.record(engine, "keys.create", target=key.id, project=principal.project_id)
    until = f", until {_iso(expires_at)}" if expires_at is not None else ""
    complain(f"key {key.id} of {name} ({principal.role}), scopes {', '.join(sorted(scopes))}{until}; shown only now:")
    say(text)
    if Scope.MCP in scopes and "api_key" not in settings.inbound.modes:
        complain("warning: inbound.mode does not have api_key, so this key works at the API only")
    return 0


async def list_keys(settings: Settings, *, as_json: bool) -> int:
    """Print the keys, the oldest first. Return 0; raise McpAuthProxyError."""
    rows: list[dict[str, Any]] = []
    if store_exists(settings.store):
        async with _opened(settings, writes=False) as engine:
            names = {principal.id: principal.name for principal in await Principals(engine).all()}
            rows = [
                {
                    "id": key.id,
                    "name": key.name,
                    "principal": names.get(key.principal, key.principal),
                    "principal_id": key.principal,
                    "scopes": sorted(key.scopes),
                    "created_at": _iso(key.created_at),
                    "expires_at": _iso(key.expires_at),
                    "last_used_at": _iso(key.last_used_at),
                }
                for key in await ApiKeys(engine).all()
            ]
    if as_json:
        say_json(rows)
        return 0
    for row in rows:
        ends = f", until {row['expires_at']}" if row["expires_at"] else ""
        used = f"last used {row['last_used_at']}" if row["last_used_at"] else "never used"
        say(f"{row['id']}  {row['principal']}  {','.join(row['scopes'])}  since {row['created_at']}{ends}, {used}")
    if not rows:
        say("there are no keys: `mcp-auth-proxy api-keys create NAME` makes one")
    return 0


async def revoke_key(settings: Settings, key_id: str) -> int:
    """Delete a key. Return 0; raise McpAuthProxyError if there is none with this id."""
    found = False
    if store_exists(settings.store):
        async with _opened(settings) as engine:
            key = await ApiKeys(engine).get(key_id)
            owner = await Principals(engine).get(key.principal) if key is not None else None
            found = await ApiKeys(engine).delete(key_id)
            if found:
                project = owner.project_id if owner is not None else DEFAULT_PROJECT
                await audit.record(engine, "keys.delete", target=key_id, project=project)
    if not found:
        raise McpAuthProxyError(f"There is no key {key_id!r}. `mcp-auth-proxy api-keys list` shows the ids.")
    say(f"{key_id} is revoked")
    return 0


async def list_principals(settings: Settings, *, as_json: bool) -> int:
    """Print the principals, by name. Return 0; raise McpAuthProxyError."""
    rows: list[dict[str, Any]] = []
    if store_exists(settings.store):
        async with _opened(settings, writes=False) as engine:
            rows = await _principal_rows(engine)
    if as_json:
        say_json(rows)
        return 0
    for row in rows:
        identities = ", ".join(f"{each['source']}={each['subject']}" for each in row["identities"]) or "no identity"
        say(f"{row['name']}  {row['role']}  {row['status']}  {row['id']}  {identities}")
    if not rows:
        say("there are no principals: `mcp-auth-proxy api-keys create NAME` makes one, or its first request")
    return 0


async def _principal_rows(engine: Engine) -> list[dict[str, Any]]:
    identities: dict[str, list[Identity]] = {}
    for key in await ApiKeys(engine).all():
        identities.setdefault(key.principal, []).append(Identity("key", key.id))
    for principal_id, identity in await Principals(engine).all_identities():
        identities.setdefault(principal_id, []).append(identity)
    return [
        {
            "id": principal.id,
            "project_id": principal.project_id,
            "name": principal.name,
            "role": str(principal.role),
            "status": str(principal.status),
            "identities": [identity._asdict() for identity in identities.get(principal.id, [])],
            "created_at": _iso(principal.created_at),
        }
        for principal in await Principals(engine).all()
    ]


async def add_principal(
    settings: Settings,
    name: str,
    identities: Sequence[Identity],
    *,
    role: str | None,
    project: str | None,
    change_role: bool = False,
) -> int:
    """Add a principal, or identities to one that exists. Return 0; raise McpAuthProxyError."""
    async with _opened(settings) as engine:
        now = engine.now()
        store = Principals(engine)
        for identity in identities:
            other = await store.by_identity(identity)
            if other is not None and other.name != name:
                raise McpAuthProxyError(
                    f"{identity.source}={identity.subject} is the principal {other.name!r} already. "
                    f"`mcp-auth-proxy principals enable {other.name}` lets it call."
                )
        principal = await _principal(
            engine, settings, name, role=role, project=project, now=now, change_role=change_role
        )
        for identity in identities:
            await store.add_identity(principal.id, identity, now=now)
        if identities:
            await audit.record(engine, "principals.change", target=principal.id, project=principal.project_id)
    say(f"{name} is a principal ({principal.role}): {principal.id}")
    return 0


async def set_status(settings: Settings, name: str, *, active: bool) -> int:
    """Disable or enable a principal, by name or id. Return 0; raise McpAuthProxyError if there is none."""
    principal = None
    if store_exists(settings.store):
        async with _opened(settings) as engine:
            store = Principals(engine)
            principal = await store.by_name(name) or await store.get(name)
            if principal is not None:
                status = PrincipalStatus.ACTIVE if active else PrincipalStatus.DISABLED
                await _change_admins(settings, store, principal, status=status, listed=True if active else None)
                await audit.record(engine, "principals.change", target=principal.id, project=principal.project_id)
    if principal is None:
        raise McpAuthProxyError(f"There is no principal {name!r}. `mcp-auth-proxy principals list` shows them.")
    say(f"{principal.name} is {'active' if active else 'disabled'}")
    return 0


async def _change_admins(
    settings: Settings,
    store: Principals,
    principal: Principal,
    *,
    role: Role | None = None,
    status: PrincipalStatus | None = None,
    listed: bool | None,
) -> Principal | None:
    """Change a principal, and warn if its project has no admin any more: whoever has this terminal can make one."""
    try:
        # In mode none, ``local`` is an admin.
        keep_admin = bool(settings.inbound.modes)
        return await store.change(principal.id, role=role, status=status, listed=listed, keep_admin=keep_admin)
    except LastAdmin:
        changed = await store.change(principal.id, role=role, status=status, listed=listed)
    complain(
        f"warning: the project {principal.project_id} has no active admin now; "
        f"`mcp-auth-proxy api-keys create NAME --role admin` makes one"
    )
    return changed


async def _principal(
    engine: Engine,
    settings: Settings,
    name: str,
    *,
    role: str | None,
    project: str | None,
    now: float,
    scopes: frozenset[Scope] | None = None,
    change_role: bool,
) -> Principal:
    """Return the principal with a name, made or changed as asked. Raises McpAuthProxyError.

    ``scopes``: those of a key that it will get. ``change_role``: whether one that its own first request has made may
    get another role: names are first come, first served, so it may be somebody else's.
    """
    store = Principals(engine)
    principal = await store.by_name(name)
    wanted = Role(role) if role is not None else principal.role if principal is not None else Role.MEMBER
    if scopes is not None and Scope.ADMIN in scopes and wanted is not Role.ADMIN:
        raise McpAuthProxyError(f"The scope admin is for admins: give {name} the role with --role admin.")
    if principal is None:
        project_id = project or DEFAULT_PROJECT
        principal = Principal(id=new_principal_id(), name=name, project_id=project_id, role=wanted, created_at=now)
        await store.add(principal)
        await audit.record(engine, "principals.create", target=principal.id, project=project_id)
        return principal
    if not principal.is_active:
        raise McpAuthProxyError(f"{name} is disabled: `mcp-auth-proxy principals enable {name}` comes first.")
    if project is not None and project != principal.project_id:
        raise McpAuthProxyError(f"{name} is in the project {principal.project_id}, and stays there.")
    if wanted is not principal.role:
        if not (change_role or principal.listed):
            raise McpAuthProxyError(
                f"There is a principal {name!r} already, since {_iso(principal.created_at)}: its first request has "
                f"made it, and its role is {principal.role}. `mcp-auth-proxy principals list` shows who it is; add "
                f"--change-role to make it {wanted}."
            )
        complain(f"{name} was {principal.role}, and is {wanted} now")
    changed = await _change_admins(settings, store, principal, role=wanted, listed=True) or principal
    if changed != principal:
        await audit.record(engine, "principals.change", target=principal.id, project=principal.project_id)
    return changed


def _iso(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")
