"""What is asked of a server to remember it: of each era, only what it declares, and as it was written."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import UpstreamError, UpstreamTimeout
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.proxy import catalog_fetch
from mcp_auth_proxy.proxy.catalog_fetch import CatalogFetch
from mcp_auth_proxy.proxy.routes import route_to
from mcp_auth_proxy.proxy.server_client import MAX_BODY, Challenged
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient

REVISIONS = ["2025-11-25", "2025-06-18", "2025-03-26"]
CHALLENGE = FakeResponse(status=401, headers=(("www-authenticate", "Bearer"),))


@asynccontextmanager
async def fetch_from(upstream: FakeMcpServer) -> AsyncIterator[CatalogFetch]:
    http = HttpClient(Dialer(environ={}), connections_per_origin=4)
    route = route_to(ServerSettings(name="notes", url=upstream.url, upstream_timeout=5.0))
    try:
        yield CatalogFetch(UpstreamClient(http), route, None)
    finally:
        await http.aclose()


@pytest.fixture
async def upstream(servers: Servers) -> FakeMcpServer:
    return await servers.mcp_server(protected=False, sessions_on=True)


def answer(received: RecordedRequest, result: dict[str, Any]) -> FakeResponse:
    return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": result})


def described(*capabilities: str) -> dict[str, Any]:
    return {
        "protocolVersion": "2025-11-25",
        "capabilities": {name: {"listChanged": True} for name in capabilities},
        "serverInfo": {"name": "n", "version": "1"},
    }


def methods(upstream: FakeMcpServer) -> list[str]:
    return [received.rpc_method or received.method for received in upstream.calls()]


async def test_a_server_with_sessions_is_asked_for_all_revisions_and_its_sessions_are_deleted(
    upstream: FakeMcpServer,
) -> None:
    upstream.modern = False
    async with fetch_from(upstream) as fetch:
        await fetch.run()
        found = fetch.found(fetched_at=1.0)
    assert list(found.initialize) == REVISIONS
    assert [found.initialize[revision]["protocolVersion"] for revision in REVISIONS] == REVISIONS
    assert found.discover is None
    assert found.lists == {
        "tools": [{"name": name, "inputSchema": {"type": "object"}} for name in ("echo", "count", "whoami")]
    }
    assert fetch.complete
    assert methods(upstream) == [
        *("initialize", "notifications/initialized", "tools/list", "DELETE", "server/discover"),
        *("initialize", "DELETE", "initialize", "DELETE"),
    ]
    assert not upstream.sessions


async def test_what_a_server_answers_to_an_older_revision_is_remembered_as_it_is(upstream: FakeMcpServer) -> None:
    upstream.answers["initialize"] = lambda received: answer(
        received, {**described(), "protocolVersion": "2025-03-26", "instructions": "hello"}
    )
    async with fetch_from(upstream) as fetch:
        await fetch.run()
        found = fetch.found(fetched_at=1.0)
    assert {each["protocolVersion"] for each in found.initialize.values()} == {"2025-03-26"}
    assert found.initialize["2025-06-18"]["instructions"] == "hello"


async def test_a_server_of_both_eras_is_discovered_too(upstream: FakeMcpServer) -> None:
    async with fetch_from(upstream) as fetch:
        await fetch.run()
        found = fetch.found(fetched_at=1.0)
    assert found.discover is not None
    assert found.discover["supportedVersions"] == ["2026-07-28"]
    assert len(upstream.calls("tools/list")) == 1


@pytest.mark.parametrize("status", [200, 400, 404, 500])
async def test_a_server_without_sessions_is_asked_without_one(upstream: FakeMcpServer, status: int) -> None:
    error = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "Method not found"}}
    upstream.answers["initialize"] = FakeResponse.json(error, status)
    async with fetch_from(upstream) as fetch:
        await fetch.run()
        found = fetch.found(fetched_at=1.0)
    assert not found.initialize
    assert found.discover is not None
    assert [tool["name"] for tool in found.lists["tools"]] == ["echo", "count", "whoami"]
    assert methods(upstream) == ["initialize", "server/discover", "tools/list"]
    assert upstream.calls("tools/list")[0].header("mcp-method") == "tools/list"


async def test_a_server_that_refuses_both_is_an_error(upstream: FakeMcpServer) -> None:
    upstream.answers["initialize"] = upstream.answers["server/discover"] = FakeResponse(status=500)
    async with fetch_from(upstream) as fetch:
        with pytest.raises(UpstreamError, match="500"):
            await fetch.run()
        assert fetch.is_empty


async def test_only_declared_lists_are_asked_for_and_refused_ones_left_out(upstream: FakeMcpServer) -> None:
    upstream.modern = False
    upstream.answers["initialize"] = lambda received: answer(received, described("prompts", "resources", "logging"))
    upstream.answers["prompts/list"] = lambda received: answer(received, {"prompts": [{"name": "p", "odd": [1.5]}]})
    upstream.answers["resources/list"] = FakeResponse(status=403)
    upstream.answers["resources/templates/list"] = lambda received: answer(received, {"resourceTemplates": []})
    async with fetch_from(upstream) as fetch:
        await fetch.run()
        found = fetch.found(fetched_at=1.0)
    assert found.lists == {"prompts": [{"name": "p", "odd": [1.5]}], "resourceTemplates": []}
    assert fetch.complete
    assert not upstream.calls("tools/list")


@pytest.mark.parametrize("capabilities", [None, [], "tools", 7])
async def test_capabilities_of_another_form_are_none(upstream: FakeMcpServer, capabilities: object) -> None:
    upstream.answers["initialize"] = lambda received: answer(received, {"capabilities": capabilities})
    async with fetch_from(upstream) as fetch:
        await fetch.run()
    assert not upstream.calls("tools/list")


async def test_a_list_that_is_too_long_is_left_out_and_the_rest_stays(upstream: FakeMcpServer) -> None:
    upstream.answers["initialize"] = lambda received: answer(received, described("tools", "prompts"))
    upstream.answers["tools/list"] = lambda received: answer(received, {"tools": [{"name": "x" * MAX_BODY}]})
    upstream.answers["prompts/list"] = lambda received: answer(received, {"prompts": [{"name": "p"}]})
    async with fetch_from(upstream) as fetch:
        await fetch.run()
        assert fetch.found(fetched_at=1.0).lists == {"prompts": [{"name": "p"}]}
        assert not fetch.complete


@pytest.mark.parametrize("method", ["initialize", "tools/list"])
async def test_a_refused_token_ends_the_fetch(upstream: FakeMcpServer, method: str) -> None:
    upstream.answers[method] = CHALLENGE
    async with fetch_from(upstream) as fetch:
        with pytest.raises(Challenged):
            await fetch.run()
        assert fetch.is_empty == (method == "initialize")
    assert not upstream.sessions


async def test_a_slow_server_is_not_waited_for(upstream: FakeMcpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_fetch, "DEADLINE", 0.3)
    upstream.answers["tools/list"] = FakeResponse.hang()
    async with fetch_from(upstream) as fetch:
        with pytest.raises(UpstreamTimeout, match="did not say"):
            await fetch.run()
        assert set(fetch.found(fetched_at=1.0).initialize) == {"2025-11-25"}
    # The session was deleted all the same.
    await asyncio.wait_for(upstream.calls("DELETE")[0].done.wait(), 5)
