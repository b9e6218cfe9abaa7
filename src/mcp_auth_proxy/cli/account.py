"""``login``, ``logout`` and ``status``: they work on the store, beside a running proxy or without one."""

import json
import logging
import os
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any

import click
import httpx2

from mcp_auth_proxy.app import Application, lifespan, reachable
from mcp_auth_proxy.broker.pending import ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.broker.renewal import renewable
from mcp_auth_proxy.cli.listener import bind, listening
from mcp_auth_proxy.config.settings import Address, ServerSettings, Settings
from mcp_auth_proxy.errors import AddressInUse, ConfigError, ConfigurationError, McpAuthProxyError, without_query_values
from mcp_auth_proxy.models import LOCAL, AccessToken, Account, Flow, Grant
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.probe import probe
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.web import browser


async def login(settings: Settings, name: str) -> int:
    """Authorize one server and list its tools through the proxy. Returns the exit code; raises ProxyError.

    Where a proxy runs already, its callback finishes the flow; the store tells us. Else we listen ourselves.
    """
    server = server_of(settings, name)
    # The others have no secrets here: their grants are left to the proxy that has them.
    settings = replace(settings, servers={server.name: server})
    async with AsyncExitStack() as stack:
        try:
            sock, address = bind(settings.listen)
        except AddressInUse:
            sock, address = None, settings.listen
            await _require_our_proxy(address)
        application = await stack.enter_async_context(
            lifespan(settings, address, announce=_say_nothing, announce_key=_say)
        )
        if sock is not None:
            stack.enter_context(sock)
            await stack.enter_async_context(listening(application, sock))
        token = await _authorize(application, server)
        click.echo(f"{server.name} is connected." if token else f"{server.name} asks for no authorization.")
        await _list_tools(server, f"http://{reachable(address)}/{server.name}/mcp")
    return 0


async def _authorize(application: Application, server: ServerSettings) -> AccessToken | None:
    broker = application.broker
    used = await broker.token(Account(LOCAL, server.name))
    if used is not None:
        click.echo(f"A login for {server.name} is stored already; `mcp-auth-proxy logout {server.name}` forgets it.")
        return used
    route = routes.build({server.name: server})[f"/{server.name}/mcp".encode()]
    status, challenge = await probe(application.forwarder.upstream, route)
    if status not in (401, 403):
        return None
    outcome = await broker.challenged(
        Account(LOCAL, server.name), status=status, challenge=challenge, used=None, trail=ChallengeHistory()
    )
    if not isinstance(outcome, PendingAuthorization):
        return outcome
    click.echo(_invitation(server.name, outcome))
    opens = browser.should_open(application.settings.authorization.open_browser, loopback=True, environ=os.environ)
    if opens:
        browser.open_link(outcome.link)
    token = await outcome.wait(max(0.0, outcome.flow.expires_at - time.time()))
    if token is None:
        raise McpAuthProxyError("The link was not used in time. Run login again for a new one.")
    return token


def _invitation(server: str, pending: PendingAuthorization) -> str:
    """What the user is to do; a code is for any device, so that the terminal's machine needs no browser (RFC 8628)."""
    device = pending.flow.device
    if device is None:
        return f"Open this link to authorize {server}:\n\n  {pending.link}\n"
    lines = [f"To authorize {server}, open on any device", device.verification_uri, "and enter", device.user_code]
    if device.verification_uri_complete:
        lines += ["or open this address, and see that it shows the same code:", device.verification_uri_complete]
    return "\n".join(f"\n  {line}\n" if number % 2 else line for number, line in enumerate(lines))


async def _list_tools(server: ServerSettings, url: str) -> None:
    """Use the server as any client would, so that success means what it says. Raises ProxyError."""
    # The SDK takes 0.6 s to import: only the commands that use it pay for that.
    from mcp import Client

    # The SDK logs what it meets on its way with tracebacks; what matters is told below.
    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    try:
        async with Client(url) as client:
            tools = (await client.list_tools()).tools
    except Exception as error:  # the SDK raises groups of whatever went wrong in its tasks
        raise McpAuthProxyError(
            f"The tools of {server.name} could not be listed: {_first(error)}. Is {server.url} its MCP endpoint?"
        ) from None
    names = ", ".join(sorted(tool.name for tool in tools))
    click.echo(f"It offers {len(tools)} tool{'s'[: len(tools) != 1]}{': ' if names else ''}{names}")


def _first(error: BaseException) -> str:
    """Return the text of the first error in a group of them, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


async def logout(settings: Settings, name: str, *, forget_client: bool) -> int:
    """Forget what is held for a server, and revoke it upstream. Returns the exit code; raises ProxyError.

    It is forgotten also where the error says that it could not be revoked.
    """
    server = server_of(settings, name)
    async with lifespan(settings, settings.listen, background=False, announce_key=_say) as application:
        done, failed = await application.broker.logout(Account(LOCAL, server.name), server, forget_client=forget_client)
    for line in done:
        click.echo(line)
    if failed:
        raise McpAuthProxyError(" ".join(failed))
    if not done:
        click.echo(f"{server.name}: nothing was connected.")
    return 0


async def status(settings: Settings, name: str | None, *, as_json: bool) -> int:
    """Print what is connected, since when, until when, of one server or all. Returns the exit code; raises ProxyError.

    Whether something is connected or not is no matter of the exit code.
    """
    servers = list(settings.servers.values()) if name is None else [server_of(settings, name)]
    grants: list[Grant] = []
    if settings.store.path.exists():
        database = await open_store(settings.store)
        try:
            grants = await Grants(database).all()
        finally:
            await database.close()
    rows = [_row(server, grants) for server in servers]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["server"]) for row in rows)
    for row in rows:
        click.echo(f"{row['server']:<{width}}  {_in_words(row)}")
    return 0


def _row(server: ServerSettings, grants: list[Grant]) -> dict[str, Any]:
    url = without_query_values(server.url)
    of_server = [grant for grant in grants if grant.key.account.server == server.name]
    if not of_server:
        return {"server": server.name, "url": url, "state": "not connected"}
    grant = max(of_server, key=lambda grant: (grant.ended_at is None, grant.granted_at))
    return {
        "server": server.name,
        "url": url,
        "state": "connected" if grant.ended_at is None else "ended",
        "issuer": grant.key.issuer,
        "since": _iso(grant.granted_at),
        "token_until": _iso(grant.tokens.expires_at),
        "renews_itself": renewable(grant),
        "scopes": list(grant.tokens.scopes),
        "reason": grant.ended_reason,
    }


def _in_words(row: dict[str, Any]) -> str:
    if row["state"] == "not connected":
        # Only the store is read: whether a server asks for authorization is found out when it is used.
        return "no grant: not connected yet, or a server that asks for no authorization"
    if row["state"] == "ended":
        return f"ended, it needs a new authorization: {row['reason']}"
    until = f"token until {row['token_until']}" if row["token_until"] else "token without a stated end"
    renews = "renews itself" if row["renews_itself"] else "can't be renewed"
    scopes = f", scopes {' '.join(row['scopes'])}" if row["scopes"] else ""
    return f"connected since {row['since']} by {row['issuer']}, {until}, {renews}{scopes}"


def _iso(moment: float | None) -> str | None:
    return None if moment is None else datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


def server_of(settings: Settings, name: str) -> ServerSettings:
    """Return the server of that name, or the only one where a URL was given."""
    if "://" in name:
        return next(iter(settings.servers.values()))
    try:
        return settings.servers[name]
    except KeyError:
        known = ", ".join(sorted(settings.servers))
        raise ConfigurationError([ConfigError("", f"There is no server {name!r}. Configured: {known}.")]) from None


async def _require_our_proxy(address: Address) -> None:
    """Refuse to send a user to a callback that some other program would answer."""
    try:
        async with httpx2.AsyncClient(trust_env=False, timeout=5) as client:
            answer = (await client.get(f"http://{reachable(address)}/healthz")).json()
    except (httpx2.HTTPError, ValueError):
        answer = None
    if not isinstance(answer, dict) or answer.get("service") != "mcp-auth-proxy":
        raise AddressInUse(f"{address} is taken by another program, so the callback could not be received there.")


def _say(line: str) -> None:
    click.echo(line, err=True)


def _say_nothing(flow: Flow, link: str) -> None:
    """The link is printed by the command itself."""
