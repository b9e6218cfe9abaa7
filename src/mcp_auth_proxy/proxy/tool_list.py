"""List the tools of a server as an MCP client would: ``initialize``, then ``tools/list``, with the account's token.

This shows that a server can be used, to whoever has just authorized it.
"""

import asyncio
from collections.abc import Mapping

from mcp_auth_proxy.broker import Broker, ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import NotConnected, UpstreamProtocolError, UpstreamTimeout
from mcp_auth_proxy.models import AccessToken, Account, Tool
from mcp_auth_proxy.proxy.routes import route_to
from mcp_auth_proxy.proxy.server_client import Challenged, ServerClient
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient

DEADLINE = 30.0
"""Seconds for everything."""

MAX_TRIES = 3
"""Requests that are begun again with another token, at most."""


async def list_tools(broker: Broker, upstream: UpstreamClient, server: ServerSettings, account: Account) -> list[Tool]:
    """Return the tools that an account sees.

    Raises NotConnected if its user has to authorize first, AuthorizationError, UpstreamError and StoreError.
    """
    route, history = route_to(server), ChallengeHistory()
    token = await broker.token(account)
    try:
        async with asyncio.timeout(DEADLINE):
            for _ in range(MAX_TRIES):
                try:
                    tools = await _tools(ServerClient(upstream, route, token))
                except Challenged as challenged:
                    token = await _another_token(broker, server, account, challenged, token, history)
                else:
                    broker.accepted(account)
                    return tools
    except TimeoutError:
        raise UpstreamTimeout(f"{server.name} did not list its tools within {DEADLINE:.0f} s.") from None
    raise UpstreamProtocolError("it refuses each token that its authorization server issues.")


async def _another_token(
    broker: Broker,
    server: ServerSettings,
    account: Account,
    challenged: Challenged,
    used: AccessToken | None,
    history: ChallengeHistory,
) -> AccessToken:
    """Return another token than the one that was refused. Raises NotConnected and AuthorizationError."""
    needed = NotConnected(f"{server.name} is not authorized yet.")
    if used is None and not server.oauth.grant.unattended:
        raise needed
    outcome = await broker.challenged(
        account,
        sent_to=server,
        status=challenged.status,
        challenge=challenged.challenge,
        used=used,
        history=history,
        nonce=challenged.nonce,
    )
    if outcome is None:
        raise UpstreamProtocolError(f"it answers {challenged.status}.")
    if isinstance(outcome, PendingAuthorization):
        raise needed
    broker.check_origin(server)
    return outcome


async def _tools(client: ServerClient) -> list[Tool]:
    """Return the tools that a client sees. Raises Challenged and UpstreamError."""
    try:
        await client.initialize()
        await client.initialized()
        return await _list(client)
    except UpstreamProtocolError as refused:
        if client.has_begun:
            raise
        # Servers of the revision without sessions know no initialize.
        client.modern = True
        try:
            return await _list(client)
        except UpstreamProtocolError:
            raise refused from None
    finally:
        await client.aclose()


async def _list(client: ServerClient) -> list[Tool]:
    return [tool for each in await client.list("tools/list", "tools") if (tool := _read_tool(each)) is not None]


def _read_tool(value: Mapping[str, object]) -> Tool | None:
    name, description = value.get("name"), value.get("description")
    if not isinstance(name, str):
        return None
    return Tool(name, description if isinstance(description, str) else "")
