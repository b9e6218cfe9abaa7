"""Clients that the project did not write, at a proxy that runs as its users run it, before the SDK's own server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, MCPError
from mcp.client.session import ClientRequestContext
from mcp.types import ElicitRequestParams, ElicitRequestURLParams, ElicitResult, TextContent

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import RealMcpServer, Servers
from fakes.headless import consent
from fakes.mcp_client import MODERN
from fakes.proxy import ProxyProcess, proxy_process, write_config

MODES = ["legacy", "auto", MODERN]


@asynccontextmanager
async def proxy_before(upstream: RealMcpServer, folder: Path, **authorization: Any) -> AsyncIterator[ProxyProcess]:
    config = write_config(folder, {"notes": upstream.url}, authorization=authorization)
    async with proxy_process(config) as proxy:
        yield proxy
        assert await proxy.stop() == 0
    assert "Traceback" not in proxy.log


async def echo(client: Client, text: str) -> str:
    result = await client.call_tool("echo", {"text": text})
    assert not result.is_error
    return "".join(part.text for part in result.content if isinstance(part, TextContent))


@pytest.mark.parametrize("mode", MODES)
async def test_the_sdks_client_is_held_and_continues_after_consent(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, tmp_path: Path, mode: Any
) -> None:
    async with proxy_before(real_mcp_server, tmp_path, wait="20s") as proxy:
        consenting = asyncio.create_task(consent_to(proxy, 1))
        async with Client(f"{proxy.origin}/notes/mcp", mode=mode) as client:
            assert "whoami" in [tool.name for tool in (await client.list_tools()).tools]
            assert await echo(client, "hello") == "hello"
            authorization_server.end_access_tokens()
            assert await echo(client, "after expiry") == "after expiry"
        await consenting
    assert len(proxy.links) == 1
    assert (authorization_server.authorizations, authorization_server.refreshes) == (1, 1)


async def consent_to(proxy: ProxyProcess, count: int) -> None:
    page = await consent(await proxy.next_link(count))
    assert page.status_code == 200


@pytest.mark.parametrize("mode", MODES)
async def test_the_sdks_client_steps_up_in_the_middle_of_its_work(
    servers: Servers, authorization_server: FakeAuthorizationServer, tmp_path: Path, mode: Any
) -> None:
    upstream = await servers.real_mcp_server(authorization_server, scopes=("notes:read",))
    async with proxy_before(upstream, tmp_path, wait="20s") as proxy:
        consenting = asyncio.create_task(consent_to(proxy, 1))
        async with Client(f"{proxy.origin}/notes/mcp", mode=mode) as client:
            assert await echo(client, "read") == "read"
            await consenting
            consenting = asyncio.create_task(consent_to(proxy, 2))
            result = await client.call_tool("write_note", {"text": "remember"})
            assert not result.is_error
            await consenting


async def test_the_modern_client_shows_the_link_by_elicitation_and_continues(
    real_mcp_server: RealMcpServer, tmp_path: Path
) -> None:
    asked: list[str] = []

    async def show(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        assert isinstance(params, ElicitRequestURLParams)
        asked.append(params.url)
        assert (await consent(params.url)).status_code == 200
        return ElicitResult(action="accept")

    async with proxy_before(real_mcp_server, tmp_path, wait="1s") as proxy:
        async with Client(f"{proxy.origin}/notes/mcp", mode=MODERN, elicitation_callback=show) as client:
            assert await echo(client, "asked for") == "asked for"
        assert asked == proxy.links
    assert len(asked) == 1


async def test_the_2025_client_shows_the_link_from_the_elicitation_error(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, tmp_path: Path
) -> None:
    async def show(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        raise AssertionError("a 2025 client is asked by an error, not by a request")

    async with proxy_before(real_mcp_server, tmp_path, wait="1s") as proxy:
        consenting = asyncio.create_task(consent_to(proxy, 1))
        async with Client(f"{proxy.origin}/notes/mcp", mode="legacy", elicitation_callback=show) as client:
            await consenting
            authorization_server.end_grants()
            with pytest.raises(MCPError) as caught:
                await echo(client, "x")
            assert caught.value.error.code == -32042
            (elicitation,) = caught.value.error.data["elicitations"]
            assert (elicitation["mode"], elicitation["url"]) == ("url", proxy.links[-1])
            await consent(elicitation["url"])
            assert await echo(client, "again") == "again"


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_without_elicitation_gets_the_link_as_the_tools_text(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, tmp_path: Path, mode: Any
) -> None:
    async with proxy_before(real_mcp_server, tmp_path, wait="3s") as proxy:
        consenting = asyncio.create_task(consent_to(proxy, 1))
        async with Client(f"{proxy.origin}/notes/mcp", mode=mode) as client:
            assert await echo(client, "first") == "first"
            await consenting
            authorization_server.end_grants()
            result = await client.call_tool("echo", {"text": "x"})
            assert result.is_error
            text = "".join(part.text for part in result.content if isinstance(part, TextContent))
            assert proxy.links[-1] in text
            await consent(proxy.links[-1])
            assert await echo(client, "again") == "again"
    assert len(proxy.links) == 2
