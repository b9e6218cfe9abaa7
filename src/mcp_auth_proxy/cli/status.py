"""``status``. It reads the store directly, whether or not a proxy is running, and asks no server."""

import time
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from mcp_auth_proxy.broker import Connection, ConnectionState, stored_connections, stored_servers
from mcp_auth_proxy.cli.account import server_of
from mcp_auth_proxy.cli.terminal import complain, say, say_json
from mcp_auth_proxy.config.settings import ServerSettings, Settings, StoreSettings, reachable
from mcp_auth_proxy.errors import ConfigError, ConfigurationError
from mcp_auth_proxy.store import open_store, serving


async def status(settings: Settings, name: str | None, *, as_json: bool) -> int:
    """Print since when and until when one server, or each, is connected. Return 0; raise McpAuthProxyError.

    Whether something is connected does not affect the exit code.
    """
    servers = settings.servers
    if name is not None:
        server = server_of(settings, name)
        servers = {server.name: server}
    _show(await _connections(settings, servers), as_json=as_json)
    return 0


async def status_without_configuration(store: StoreSettings, name: str | None, *, as_json: bool) -> int:
    """Print as ``status`` does what is in the store of ``serve URL``. Return 0; raise McpAuthProxyError."""
    database = await open_store(store)
    try:
        servers = await stored_servers(database)
        if name is not None and name not in servers:
            known = ", ".join(sorted(servers)) or "none"
            unknown = (
                f"There is no server {name!r}: no configuration was found (name one with --config FILE), and these are "
                f"known from `mcp-auth-proxy serve URL`: {known}"
            )
            raise ConfigurationError([ConfigError("", unknown)])
        connections = await stored_connections(
            {each: server for each, server in servers.items() if name in (None, each)}, database, now=time.time()
        )
    finally:
        await database.close()
    complain(f"no configuration was found; this is the store of `mcp-auth-proxy serve URL`: {store.path}")
    for address in serving.addresses(store):
        complain(f"a proxy serves it at http://{reachable(address)}")
    if connections or as_json:
        _show(connections, as_json=as_json)
    else:
        say("nothing is connected, and no authorization waits for you")
    return 0


def _show(connections: Collection[Connection], *, as_json: bool) -> None:
    if as_json:
        say_json([_row(connection) for connection in connections])
        return
    width = max(len(connection.account.server) for connection in connections)
    for connection in connections:
        say(f"{connection.account.server:<{width}}  {_in_words(connection)}")


async def _connections(settings: Settings, servers: Mapping[str, ServerSettings]) -> list[Connection]:
    if not settings.store.path.exists():
        return await stored_connections(servers, None, now=time.time())
    database = await open_store(settings.store)
    try:
        return await stored_connections(servers, database, now=time.time())
    finally:
        await database.close()


def _row(connection: Connection) -> dict[str, Any]:
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
    needs = _needs_in_words(connection)
    if connection.state is ConnectionState.NOT_CONNECTED and needs:
        return needs
    return _state_in_words(connection) + (f"; {needs}" if needs else "")


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
        return f"ended: {connection.reason.rstrip('.')}"
    until = _iso(connection.token_expires_at)
    token = (
        f"token {'expired at' if connection.expired else 'until'} {until}" if until else "token without a stated end"
    )
    renews = "renews itself" if connection.renews_itself else "can't be renewed"
    scopes = f", scopes {' '.join(connection.scopes)}" if connection.scopes else ""
    return f"connected since {_iso(connection.granted_at)} by {connection.issuer}, {token}, {renews}{scopes}"


def _iso(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")
