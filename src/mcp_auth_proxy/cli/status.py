"""``status``. It reads the store directly, whether or not a proxy is running, and asks no server."""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mcp_auth_proxy.broker import Connection, ConnectionState, stored_connections, stored_servers
from mcp_auth_proxy.broker.states import GrantStatus, Health, Word
from mcp_auth_proxy.cli.account import server_of
from mcp_auth_proxy.cli.owners import find_principal, in_command, require_owner, split
from mcp_auth_proxy.cli.table import Line, lay_out
from mcp_auth_proxy.cli.terminal import complain, say, say_json, window_width
from mcp_auth_proxy.config.settings import ServerSettings, Settings, StoreSettings, reachable
from mcp_auth_proxy.errors import ConfigError, ConfigurationError
from mcp_auth_proxy.models import Principal, shared_principal
from mcp_auth_proxy.store import Engine, open_store_read_only, serving, store_exists
from mcp_auth_proxy.store.principals import Principals

SHARED = "shared"
"""What stands in place of a principal's name for grants that belong to a project."""

_COLORS = {
    Word.CONNECTED: "green",
    Word.RETRYING: "yellow",
    Word.DEGRADED: "yellow",
    Word.EXPIRED: "yellow",
    Word.ENDED: "red",
    Word.NEEDS_CONSENT: "cyan",
    Word.AUTHORIZING: "cyan",
    Word.UNREACHABLE: "red",
}


async def status(settings: Settings, name: str | None, *, owner: str | None = None, as_json: bool) -> int:
    """Print since when and until when each account is connected. Return 0; raise McpAuthProxyError.

    ``name``: the only server, or account, to show. ``owner``: the principal whose accounts are shown; None for those of
    everybody. Whether something is connected does not affect the exit code.
    """
    servers = settings.servers
    require_owner(settings, None, owner)
    server_name, account = (None, None) if name is None else split(name)
    if server_name is not None:
        server = server_of(settings, server_name)
        servers = {server.name: server}
    identified = bool(settings.inbound.modes)
    database = await open_store_read_only(settings.store) if store_exists(settings.store) else None
    try:
        principals = await Principals(database).all() if database is not None and identified else []
        found = await _connections(servers, database, principals, identified=identified, owner=owner, account=account)
    finally:
        if database is not None:
            await database.close()
    names = {principal.id: principal.name for principal in principals}
    show([_as_named(each, names, servers, identified=identified) for each in found], names, identified, as_json=as_json)
    return 0


async def _connections(
    servers: Mapping[str, ServerSettings],
    database: Engine | None,
    principals: Collection[Principal],
    *,
    identified: bool,
    owner: str | None,
    account: str | None,
) -> list[Connection]:
    now = time.time() if database is None else database.now()
    if not identified:
        return await stored_connections(servers, database, now=now, account=account)
    if owner is None:
        return await stored_connections(servers, database, now=now, owner_of=None, account=account)
    principal = find_principal(principals, owner)
    usable = {name: server for name, server in servers.items() if server.admits(principal)}
    return await stored_connections(
        usable,
        database,
        now=now,
        owner_of=lambda server: server.account(principal).principal,
        account=account,
    )


def _as_named(
    connection: Connection, names: Mapping[str, str], servers: Mapping[str, ServerSettings], *, identified: bool
) -> Connection:
    """Return a connection with the command that authorizes its account."""
    account = connection.account
    owner = names.get(account.principal) if identified else None
    return replace(connection, command_name=in_command(servers[account.server], account.name, owner))


async def status_without_configuration(store: StoreSettings, name: str | None, *, as_json: bool) -> int:
    """Print as ``status`` does what is in the store of ``serve URL``. Return 0; raise McpAuthProxyError."""
    database = await open_store_read_only(store)
    try:
        servers = await stored_servers(database)
        server, account = (None, None) if name is None else split(name)
        if server is not None and server not in servers:
            known = ", ".join(sorted(servers)) or "none"
            unknown = (
                f"There is no server {server!r}: no configuration was found (name one with --config FILE), and these "
                f"are known from `mcp-auth-proxy serve URL`: {known}"
            )
            raise ConfigurationError([ConfigError("", unknown)])
        connections = await stored_connections(
            {each: found for each, found in servers.items() if server in (None, each)},
            database,
            now=database.now(),
            account=account,
        )
    finally:
        await database.close()
    complain(f"no configuration was found; this is the store of `mcp-auth-proxy serve URL`: {store.shown}")
    for address in serving.addresses(store):
        complain(f"a proxy serves it at http://{reachable(address)}")
    if connections or as_json:
        show(connections, {}, False, as_json=as_json)
    else:
        say("nothing is connected, and no authorization waits for you")
    return 0


def show(connections: Collection[Connection], names: Mapping[str, str], identified: bool, *, as_json: bool) -> None:
    """Print connections. ``names``: those of principals, by id, which text has only if callers are ``identified``."""
    if as_json:
        say_json([row(connection, names) for connection in connections])
        return
    if not connections:
        say("there is nothing to show: no server is for this principal")
    lines = [
        Line(
            cells=(
                each.account.shown,
                *([_owner_in_words(each.account.principal, names)] if identified else []),
                each.word,
            ),
            prose=_in_words(each),
            colored=1 + identified,
            color=_COLORS[each.word],
        )
        for each in connections
    ]
    headers = ("server", *(["owner"] if identified else []), "state", "details")
    say(*lay_out(lines, width=window_width(), headers=headers))


def _owner_in_words(principal: str, names: Mapping[str, str]) -> str:
    if principal.startswith(shared_principal("")):
        return SHARED
    return names.get(principal, principal) or "-"


def row(connection: Connection, names: Mapping[str, str]) -> dict[str, Any]:
    """Return a connection as ``--json`` shows it. ``names`` are those of principals, by id."""
    principal = connection.account.principal
    return {
        **_state_row(connection),
        "account": connection.account.name,
        "label": connection.grant_label,
        "word": connection.word,
        "health": None if connection.status is None else health(connection.status),
        "principal": names.get(principal, principal) or None,
    }


def health(status: GrantStatus) -> dict[str, Any]:
    """Return how the renewal of a grant goes, as ``--json`` shows it; what is not known is None."""
    return {
        "state": status.health.value,
        "since": _utc(status.since),
        "next_try": _utc(status.next_try),
        "reason": status.reason or None,
    }


def _state_row(connection: Connection) -> dict[str, Any]:
    row = {
        "server": connection.account.server,
        "url": connection.url,
        "state": connection.state.value,
        "needs_authorization": connection.needs_authorization,
    }
    if connection.link:
        row["authorization_url"] = connection.link
    if connection.user_code:
        row["user_code"] = connection.user_code
    reason = connection.reason or connection.failure
    if connection.state is ConnectionState.NOT_CONNECTED:
        return {**row, "reason": reason} if reason else row
    return {
        **row,
        "issuer": connection.issuer,
        "since": _iso(connection.granted_at),
        "token_until": _iso(connection.token_expires_at),
        "renews_itself": connection.renews_itself,
        "scopes": list(connection.scopes),
        "reason": reason,
    }


def _in_words(connection: Connection) -> str:
    """Return what there is to say beside the word for the state."""
    needs = _needs_in_words(connection)
    state = "" if connection.state is ConnectionState.NOT_CONNECTED and needs else _state_in_words(connection)
    return "; ".join(filter(None, (state, needs, _trouble_in_words(connection))))


def _trouble_in_words(connection: Connection) -> str:
    """Return what goes wrong though nobody has to authorize."""
    trouble = connection.trouble
    if trouble is None or (connection.needs_authorization and not trouble.unreachable):
        return ""
    since = "" if trouble.since is None else f" since {_iso(trouble.since)}"
    again = "" if trouble.retry_at is None else f", the next try is at {_iso(trouble.retry_at)}"
    remedy = f". {trouble.remedy}" if trouble.remedy else ""
    return f"{trouble.what}{since}{again}: {trouble.reason.rstrip('.')}{remedy}"


def _needs_in_words(connection: Connection) -> str:
    """Return what the user has to do; empty if there is nothing."""
    if not connection.needs_authorization:
        return ""
    if connection.link:
        code = f", code {connection.user_code}" if connection.user_code else ""
        return f"needs authorization: {connection.link}{code}"
    failed = f"; the last one failed: {connection.failure}" if connection.failure else ""
    if connection.state is ConnectionState.CONNECTED and connection.asked_scopes:
        more = " ".join(connection.asked_scopes)
        return f"needs authorization for more scopes ({more}): repeat the call for a link{failed}"
    return f"needs authorization: run `mcp-auth-proxy login {connection.command_name}`{failed}"


def _state_in_words(connection: Connection) -> str:
    if connection.state is ConnectionState.NOT_CONNECTED:
        # Only the store was read. Whether the server asks for authorization is known when it is used.
        return "no grant: not connected yet, or a server that asks for no authorization"
    if connection.state is ConnectionState.ENDED:
        reason = connection.reason.rstrip(".")
        return reason if connection.word is Word.ENDED else f"ended: {reason}"
    scopes = f", scopes {' '.join(connection.scopes)}" if connection.scopes else ""
    label = f" as {connection.grant_label}" if connection.grant_label else ""
    since = f"since {_iso(connection.granted_at)}{label} by {connection.issuer}"
    return f"{since}, {_token_in_words(connection)}{scopes}{_warning_in_words(connection)}"


def _warning_in_words(connection: Connection) -> str:
    """Return what the grant may die of, though it works now; empty if nothing is known."""
    status = connection.status
    if status is None or not connection.renews_itself or not status.reason or status.health is not Health.FRESH:
        return ""
    return f". {status.reason.rstrip('.')}: `mcp-auth-proxy login {connection.command_name}`"


def _token_in_words(connection: Connection) -> str:
    until, status = _iso(connection.token_expires_at), connection.status
    if status is not None and status.health is Health.DEGRADED and connection.renews_itself:
        end = f"token until {until}" if until else "token without a stated end"
        if status.is_retried:
            # Why is said with the failure.
            return end
        again = "then the renewal is tried once more" if until else "until the server refuses it"
        return (
            f"{end}, {again}: it was refused at {_iso(status.since)}: {status.reason.rstrip('.')}. To be safe, run "
            f"`mcp-auth-proxy login {connection.command_name}` before then"
        )
    if connection.renews_itself:
        expired = connection.word is Word.EXPIRED
        end = f"token {'expired at' if expired else 'until'} {until}" if until else "token without a stated end"
        return f"{end}, renews itself{' with the next request' if expired else ''}"
    if until is None:
        return "token without a stated end, can't be renewed"
    if connection.expired:
        return f"token expired at {until}, can't be renewed"
    return f"token until {until}, can't be renewed: run `mcp-auth-proxy login {connection.command_name}` before then"


def _utc(moment: float | None) -> str | None:
    if moment is None:
        return None
    return datetime.fromtimestamp(round(moment, 3), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _iso(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")
