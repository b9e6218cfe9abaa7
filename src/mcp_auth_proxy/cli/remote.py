"""``status``, ``login`` and ``logout`` of a proxy that runs elsewhere, through its API (``--url``, ``--api-key``)."""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, quote

from mcp_auth_proxy.broker import Connection, ConnectionState
from mcp_auth_proxy.broker.connections import Trouble
from mcp_auth_proxy.broker.states import GrantStatus, Health, Word
from mcp_auth_proxy.cli.invitation import (
    NOT_USED,
    LoginOptions,
    client_line,
    code_lines,
    link_lines,
    needs_waiting,
    not_in_time,
    offer,
    paste_lines,
)
from mcp_auth_proxy.cli.owners import split
from mcp_auth_proxy.cli.paste import Params, PastedLines, read_addresses
from mcp_auth_proxy.cli.remote_proxy import ApiProblem, Json, RemoteProxy
from mcp_auth_proxy.cli.status import show
from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.errors import AddressRefused, ConfigError, ConfigurationError, McpAuthProxyError, excerpt
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Account
from mcp_auth_proxy.store.grant_summaries import GrantState

POLL_SECONDS = 1.0
"""Seconds between two questions whether the user has authorized."""

_OF_OTHERS = "Through the API everybody authorizes for themselves: leave --as out, and use the key of {name}."


async def status(proxy: RemoteProxy, name: str | None, *, owner: str | None, as_json: bool) -> int:
    """Print what the key's principal has connected, as ``status`` does for a store. Return 0; raise McpAuthProxyError.

    ``owner``: another principal, whose grants are shown; for admins.
    """
    server_name, account = (None, None) if name is None else split(name)
    async with proxy:
        me = await proxy.get("/me")
        servers = [each for each in me["servers"] if server_name in (None, each["name"], each["id"])]
        if server_name is not None and not servers:
            raise _no_such_server(server_name, me)
        urls = {each["id"]: each["url"] for each in await proxy.items("/servers")}
        if owner is None:
            accounts = [(server, each) for server in servers for each in server["accounts"]]
        else:
            accounts = await _accounts_of(proxy, owner, servers)
    identified = me["mode"] != "none"
    names = {me["principal"]["id"]: me["principal"]["name"]}
    names |= {each["grant"]["owner"]: each["grant"]["owner_name"] for _, each in accounts if each["grant"]}
    found = [
        _connection(proxy, me, server, each, urls.get(server["id"], ""))
        for server, each in accounts
        if account in (None, each["account"])
    ]
    show(found, {owner: name for owner, name in names.items() if name}, identified, as_json=as_json)
    return 0


async def _accounts_of(proxy: RemoteProxy, owner: str, servers: list[Json]) -> list[tuple[Json, Json]]:
    """Return the accounts that a principal has a grant for, as ``/me`` shows them."""
    by_id = {server["id"]: server for server in servers}
    return [
        (by_id[grant["server"]], {"account": grant["account"], "state": grant["state"], "grant": grant})
        for grant in await proxy.items("/grants", principal=owner)
        if grant["server"] in by_id
    ]


def _connection(proxy: RemoteProxy, me: Json, server: Json, account: Json, url: str) -> Connection:
    grant = account["grant"]
    shared = server["grant_owner"] == "shared" and me["mode"] != "none"
    owner = f"project:{me['principal']['project_id']}" if shared else me["principal"]["id"]
    key = Account(owner if grant is None else grant["owner"], server["name"], account["account"])
    command = f"{key.shown} {proxy.options}"
    waits = account["state"] == "authorizing"
    trouble = _trouble(account)
    if grant is None:
        return Connection(
            account=key, url=url, command_name=command, authorizing=waits, unanswered=waits, trouble=trouble
        )
    ended = grant["state"] == "ended"
    return Connection(
        account=key,
        url=url,
        command_name=command,
        state=ConnectionState.ENDED if ended else ConnectionState.CONNECTED,
        authorizing=waits,
        unanswered=waits,
        issuer=grant["issuer"],
        granted_at=_seconds(grant["granted_at"]),
        token_expires_at=_seconds(grant["expires_at"]),
        renews_itself=grant["state"] in ("active", "expired"),
        scopes=tuple(grant["scopes"]),
        reason=grant["reason"],
        grant_label=grant["label"],
        status=_status(grant),
        trouble=trouble,
    )


def _trouble(account: Json) -> Trouble | None:
    """Return what the proxy says goes wrong, though nobody has to authorize."""
    if account["state"] == Word.UNREACHABLE:
        return Trouble(what="not reached", reason="the last request could not connect to the server", unreachable=True)
    health = account["grant"]["health"] if account["grant"] else None
    if health is None or health["state"] != Health.RETRYING:
        return None
    return Trouble(
        what="not renewed, and tried again",
        reason=health["reason"] or "",
        since=_seconds(health.get("since")),
        retry_at=_seconds(health.get("next_try")),
    )


def _status(grant: Json) -> GrantStatus:
    """Return the state of a grant. A proxy of an earlier version tells less of its health."""
    health = grant["health"]
    return GrantStatus(
        GrantState(grant["state"]),
        Health(health["state"]),
        health["reason"] or "",
        _seconds(health.get("since")),
        _seconds(health.get("next_try")),
    )


async def login(proxy: RemoteProxy, name: str, *, owner: str | None, options: LoginOptions) -> int:
    """Authorize an account of the key's principal and list its tools. Return 0; raise McpAuthProxyError."""
    if owner is not None:
        raise ConfigurationError([ConfigError("", _OF_OTHERS.format(name=owner))])
    server_name, account_name = split(name)
    async with proxy:
        me = await proxy.get("/me")
        server = _server(me, server_name)
        account = Account("", server["name"], account_name or DEFAULT_ACCOUNT)
        shown, path = account.shown, f"/servers/{server['id']}"
        # The link alone is on stdout if nobody waits for the user.
        tell = complain if options.no_wait else say
        tools = await _stored_login(proxy, server, account, tell)
        if tools is not None:
            forget = f"`mcp-auth-proxy logout {shown} {proxy.options}` forgets it"
            tell(f"A login for {shown} is stored already; {forget}.", f"{shown} is connected.")
        else:
            said = await _authorize(proxy, me, server, account, options)
            if said is None:
                return 0
            tools = (await proxy.post(f"{path}/complete", {"account": account.name}))["tools"]
            tell(said)
    if not options.no_wait:
        say(client_line(f"{proxy.url}/{quote(shown, safe='@')}/mcp"), offer(tool["name"] for tool in tools))
    return 0


async def _stored_login(
    proxy: RemoteProxy, server: Json, account: Account, tell: Callable[[str], None]
) -> list[Json] | None:
    """Return the tools if the grant that is stored can be used; None if there is none, or if it can't."""
    stored = next((each for each in server["accounts"] if each["account"] == account.name), None)
    if stored is None or stored["grant"] is None or stored["grant"]["state"] == "ended":
        return None
    try:
        tools: list[Json] = (await proxy.post(f"/servers/{server['id']}/complete", {"account": account.name}))["tools"]
    except ApiProblem as problem:
        if problem.kind == "not-authorized":
            tell(f"{account.shown} no longer accepts the login that is stored.")
            return None
        raise
    return tools


async def _authorize(proxy: RemoteProxy, me: Json, server: Json, account: Account, options: LoginOptions) -> str | None:
    """Begin a flow, print its link, and wait until it ends; return what to say then. Raises McpAuthProxyError.

    None if nobody waits (``no_wait``).
    """
    body = {"account": account.name, **({"mode": "headless"} if options.paste else {})}
    try:
        flow = await proxy.post(f"/servers/{server['id']}/flows", body)
    except ApiProblem as problem:
        if problem.kind == "no-authorization":
            return f"{server['name']} asks for no authorization."
        if problem.kind == "no-user-needed":
            return f"{server['name']} is connected."
        raise
    shown = account.shown
    if options.no_wait:
        if flow["user_code"]:
            raise needs_waiting(server["name"])
        say(flow["connect_url"])
        return None
    expires = _seconds(flow["expires_at"]) or 0.0
    ends = expires if options.wait is None else min(expires, time.time() + options.wait)
    if flow["authorization_url"]:
        flow = await _pasted(proxy, server, shown, flow, ends)
    else:
        opener = "an admin" if server["grant_owner"] == "shared" else me["principal"]["name"]
        if flow["user_code"]:
            say(*code_lines(shown, flow["verification_uri"], flow["user_code"]))
        else:
            say(*link_lines(shown, flow["connect_url"], opener if me["mode"] != "none" else None))
        flow = await _ended(proxy, flow, ends)
    if flow["status"] in ("pending", "expired"):
        raise McpAuthProxyError(NOT_USED) if ends == expires else not_in_time(options.wait)
    if flow["status"] != "connected":
        raise McpAuthProxyError(flow["reason"] or f"The authorization is {flow['status']}.")
    again = _server(await proxy.get("/me"), server["id"])
    grant = next((each["grant"] for each in again["accounts"] if each["account"] == account.name), None)
    label = f" as {grant['label']}" if grant and grant["label"] else ""
    return f"{shown} is connected{label}."


async def _ended(proxy: RemoteProxy, flow: Json, ends: float) -> Json:
    """Return a flow once it has ended, or as it is at the time ``ends`` (Unix seconds)."""
    while flow["status"] == "pending" and ends > time.time():
        await asyncio.sleep(min(POLL_SECONDS, max(0.0, ends - time.time())))
        flow = await proxy.get(f"/flows/{flow['id']}")
    return flow


async def _pasted(proxy: RemoteProxy, server: Json, shown: str, flow: Json, ends: float) -> Json:
    """Print the authorization server's address, read that of the redirect, and return the flow once it has ended."""
    own = {name: values[0] for name, values in parse_qs(flow["authorization_url"].partition("?")[2]).items()}
    say(*paste_lines(shown, flow["authorization_url"], flow["notice"], own["redirect_uri"]))

    async def use(params: Params) -> None:
        given = {name: params[name][0] for name in ("code", "state", "iss") if name in params}
        other = AddressRefused("That address is not ours: it belongs to another authorization.")
        if "error" in params and given["state"] != own["state"]:
            raise other
        if "error" in params:
            await proxy.delete(f"/flows/{flow['id']}")
            raise McpAuthProxyError(f"The authorization server refused: {excerpt(params['error'][0])}.")
        try:
            await proxy.post(f"/servers/{server['id']}/complete", given)
        except ApiProblem as problem:
            if (await proxy.get(f"/flows/{flow['id']}"))["status"] != "pending":
                raise
            # What was used or is too old is told apart from what the API does not know.
            known = given["state"] == own["state"] or problem.kind == "code-refused"
            raise (AddressRefused(str(problem)) if known else other) from None

    reading = asyncio.ensure_future(read_addresses(PastedLines(), own["redirect_uri"], use))
    ending = asyncio.ensure_future(_ended(proxy, flow, ends))
    try:
        await asyncio.wait([reading, ending], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            return ending.result()
        reading.result()
        return await proxy.get(f"/flows/{flow['id']}")
    finally:
        for task in (reading, ending):
            task.cancel()
        await asyncio.gather(reading, ending, return_exceptions=True)


async def logout(proxy: RemoteProxy, name: str, *, owner: str | None) -> int:
    """Delete the grants of an account and revoke them. Return 0; raise McpAuthProxyError if one is not revoked.

    ``owner``: another principal than the key's, for admins.
    """
    server_name, account_name = split(name)
    async with proxy:
        me = await proxy.get("/me")
        server = _server(me, server_name)
        account = Account("", server["name"], account_name or DEFAULT_ACCOUNT)
        whose = owner or me["principal"]["id"]
        if server["grant_owner"] == "shared" and me["mode"] != "none":
            whose = f"project:{me['principal']['project_id']}"
        grants = [
            grant
            for grant in await proxy.items("/grants", principal=whose, server=server["id"])
            if grant["account"] == account.name
        ]
        results = [(grant, await proxy.delete(f"/grants/{grant['id']}")) for grant in grants]
    live = [(grant, result) for grant, result in results if grant["state"] != "ended"]
    failed = [result["detail"] for _, result in live if "could not be revoked" in result["detail"]]
    for grant, result in live:
        if result["detail"] not in failed:
            done = f" and revoked at {grant['issuer']}" if result["revoked_upstream"] else f"; {result['detail']}"
            say(f"{account.shown}: forgotten there{done}")
    if failed:
        raise McpAuthProxyError(f"{account.shown}: {' '.join(failed)}")
    if not live:
        say(f"{account.shown}: nothing was connected.")
    return 0


def _server(me: Mapping[str, Any], name: str) -> Json:
    """Return the server with a name, or an id of the API. Raises ConfigurationError."""
    found: Json | None = next((server for server in me["servers"] if name in (server["name"], server["id"])), None)
    if found is None:
        raise _no_such_server(name, me)
    return found


def _no_such_server(name: str, me: Mapping[str, Any]) -> ConfigurationError:
    known = ", ".join(sorted(server["name"] for server in me["servers"])) or "none"
    problem = f"There is no server {name!r} for {me['principal']['name']}. There are: {known}."
    return ConfigurationError([ConfigError("", problem)])


def _seconds(moment: str | None) -> float | None:
    return None if moment is None else datetime.fromisoformat(moment).timestamp()
