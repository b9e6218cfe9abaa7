"""Processes on one store that are asked in the same instant: one flow, one registration, one token request."""

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.mcp_client import McpResponse, PlainClient
from fakes.proxy import Json, link_in, proxy_process, write_config
from fakes.replicas import replicas
from fakes.shared_stores import Section

ROUNDS = int(os.environ.get("MCP_AUTH_PROXY_ROUNDS", "3"))


async def at_once(origins: list[str], server: str) -> list[McpResponse]:
    """Send two requests to each process in the same instant."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(PlainClient(f"{origin}/{server}/mcp")) for origin in origins for _ in "ab"
        ]
        return await asyncio.gather(*(client.call("echo", text="in") for client in clients))


def servers_of(url: str, **entry: object) -> dict[str, str | Json]:
    """Return a server for each round, so that each is asked for the first time."""
    return {f"notes-{number}": {"url": url, **entry} for number in range(ROUNDS)}


async def check_links(issuer: FakeAuthorizationServer, origins: list[str], names: dict[str, str | Json]) -> None:
    links = set()
    for number, name in enumerate(names, 1):
        found = {link_in(answer.message) for answer in await at_once(origins, name)}
        assert len(found) == 1, found
        assert issuer.registrations == number
        links |= found
    assert len(links) == ROUNDS


async def test_replicas_that_are_asked_at_once_give_the_same_link(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    issuer = await servers.authorization_server()
    names = servers_of((await servers.mcp_server(issuer)).url)
    async with replicas(tmp_path, 2, names, authorization={"wait": "0s"}, store=shared_store) as made:
        await check_links(issuer, [replica.origin for replica in made], names)


async def test_processes_with_an_address_each_give_the_same_link(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    issuer = await servers.authorization_server()
    names = servers_of((await servers.mcp_server(issuer)).url)
    config = write_config(tmp_path, names, authorization={"wait": "0s"}, store=shared_store)
    async with proxy_process(config) as first, proxy_process(config) as second:
        await check_links(issuer, [first.origin, second.origin], names)


async def test_processes_that_are_asked_at_once_request_one_token(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    issuer = await servers.authorization_server()
    issuer.add_client(client_id="agent", secret="agent-secret")
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "env:AGENT_SECRET"}
    names = servers_of((await servers.mcp_server(issuer)).url, oauth=oauth)
    config, env = write_config(tmp_path, names, store=shared_store), {"AGENT_SECRET": "agent-secret"}
    async with proxy_process(config, env=env) as first, proxy_process(config, env=env) as second:
        for number, name in enumerate(names, 1):
            assert {answer.text for answer in await at_once([first.origin, second.origin], name)} == {"in"}
            assert issuer.token_requests("client_credentials") == number
