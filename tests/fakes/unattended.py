"""A setup with client credentials, so that a test of the data plane starts with a valid token."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, running_proxy

AGENT = "agent"


@dataclass(kw_only=True)
class ConnectedProxy:
    """The proxy with one server ``notes``, and a client of that server."""

    proxy: RunningProxy
    upstream: FakeMcpServer
    client: PlainClient


def unattended(issuer: FakeAuthorizationServer, url: str, folder: Path, **server: Any) -> dict[str, Any]:
    """Return the configuration of a server whose grant is client credentials, and add the client to the issuer."""
    issuer.add_client(client_id=AGENT, secret="agent-secret")
    (folder / "agent-secret").write_text("agent-secret")
    oauth = {"grant": "client_credentials", "client_id": AGENT, "client_secret": "file:agent-secret"}
    return {"url": url, "oauth": oauth, **server}


@asynccontextmanager
async def connected(
    servers: Servers,
    folder: Path,
    *,
    server: dict[str, Any] | None = None,
    version: str = "2025-11-25",
    query: str = "",
    options: dict[str, Any] | None = None,
    **sections: Any,
) -> AsyncIterator[ConnectedProxy]:
    """Run issuer, server and proxy.

    ``server`` and ``sections`` add to the configuration, ``options`` are those of the fake MCP server.
    """
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, **{"checks_audience": False, **(options or {})})
    settings = unattended(issuer, upstream.url + query, folder, **(server or {}))
    async with running_proxy(folder, {"notes": settings}, **sections) as proxy, proxy.client("notes") as client:
        client.version = version
        yield ConnectedProxy(proxy=proxy, upstream=upstream, client=client)
