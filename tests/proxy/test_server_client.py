"""The client for what the proxy itself asks: pages, bounds, event streams, revisions, and the end of its sessions."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import MethodRefused, UpstreamProtocolError
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.routes import route_to
from mcp_auth_proxy.proxy.server_client import MAX_BODY, MAX_ITEMS, MAX_PAGES, Challenged, ServerClient, read_answer
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient

EVENTS = (("content-type", "text/event-stream"),)


@asynccontextmanager
async def client_of(upstream: FakeMcpServer) -> AsyncIterator[ServerClient]:
    http = HttpClient(Dialer(environ={}), connections_per_origin=4)
    server = ServerSettings(name="notes", url=upstream.url, upstream_timeout=5.0)
    client = ServerClient(UpstreamClient(http), route_to(server), None)
    try:
        yield client
    finally:
        await client.aclose()
        await http.aclose()


@pytest.fixture
async def upstream(servers: Servers) -> FakeMcpServer:
    return await servers.mcp_server(protected=False, sessions_on=True)


def result(received: RecordedRequest, value: dict[str, Any]) -> FakeResponse:
    return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": value})


def page(received: RecordedRequest, size: int, *, more: bool) -> FakeResponse:
    number = int((received.message["params"] or {}).get("cursor", "0"))
    tools = [{"name": f"tool-{number}-{each}"} for each in range(size)]
    return result(received, {"tools": tools, **({"nextCursor": str(number + 1)} if more else {})})


async def test_all_pages_are_read_as_the_server_wrote_them(upstream: FakeMcpServer) -> None:
    upstream.answers["tools/list"] = lambda received: page(received, 2, more=not received.message["params"])
    async with client_of(upstream) as client:
        await client.initialize()
        found = await client.list("tools/list", "tools")
    assert found == [{"name": "tool-0-0"}, {"name": "tool-0-1"}, {"name": "tool-1-0"}, {"name": "tool-1-1"}]


@pytest.mark.parametrize(("size", "pages", "items"), [(1, MAX_PAGES, MAX_PAGES), (600, 2, MAX_ITEMS)])
async def test_a_list_without_end_is_cut(upstream: FakeMcpServer, size: int, pages: int, items: int) -> None:
    upstream.answers["tools/list"] = lambda received: page(received, size, more=True)
    async with client_of(upstream) as client:
        assert len(await client.list("tools/list", "tools")) == items
    assert len(upstream.calls("tools/list")) == pages


async def test_what_is_no_object_is_left_out(upstream: FakeMcpServer) -> None:
    upstream.answers["tools/list"] = lambda received: result(received, {"tools": [1, {"name": "a"}, None, [2]]})
    async with client_of(upstream) as client:
        assert await client.list("tools/list", "tools") == [{"name": "a"}]


async def test_the_session_names_the_revision_that_was_negotiated_and_is_deleted(upstream: FakeMcpServer) -> None:
    answer = {"protocolVersion": "2025-03-26", "capabilities": {}, "serverInfo": {"name": "old", "version": "1"}}
    headers = (("content-type", "application/json"), ("mcp-session-id", "s1"))
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "result": answer}).encode()
    upstream.script("initialize", FakeResponse(headers=headers, body=body))
    async with client_of(upstream) as client:
        assert await client.initialize("2025-06-18") == answer
        await client.initialized()
    asked, told, ended = upstream.calls()
    assert asked.message["params"]["protocolVersion"] == "2025-06-18"
    assert told.header("mcp-protocol-version") == ended.header("mcp-protocol-version") == "2025-03-26"
    assert (ended.method, ended.header("mcp-session-id")) == ("DELETE", "s1")


async def test_a_session_is_deleted_also_if_its_answer_can_not_be_read(upstream: FakeMcpServer) -> None:
    headers = (("content-type", "application/json"), ("mcp-session-id", "s1"))
    upstream.script("initialize", FakeResponse(headers=headers, body=b"{"))
    async with client_of(upstream) as client:
        with pytest.raises(UpstreamProtocolError, match="not JSON"):
            await client.initialize()
    assert [received.method for received in upstream.calls()] == ["POST", "DELETE"]


async def test_requests_without_a_session_describe_themselves(upstream: FakeMcpServer) -> None:
    async with client_of(upstream) as client:
        client.modern = True
        assert (await client.request("server/discover", {}))["supportedVersions"] == ["2026-07-28"]
        assert [tool["name"] for tool in await client.list("tools/list", "tools")] == ["echo", "count", "whoami"]
    discover, listed = upstream.calls()
    for received, method in ((discover, "server/discover"), (listed, "tools/list")):
        assert received.header("mcp-protocol-version") == "2026-07-28"
        assert received.header("mcp-method") == method
        meta = received.message["params"]["_meta"]
        assert meta["io.modelcontextprotocol/protocolVersion"] == "2026-07-28"


async def test_an_answer_in_an_event_stream_is_found_among_other_messages(upstream: FakeMcpServer) -> None:
    other = b'data: {"jsonrpc":"2.0","method":"notifications/progress","params":{}}\r\n\r\n: comment\n\n'
    answer = b'event: message\ndata: {"jsonrpc":"2.0",\ndata: "id":1,"result":{"a":1}}\n\n'
    upstream.script("ping", FakeResponse(headers=EVENTS, body=other + answer))
    async with client_of(upstream) as client:
        assert await client.request("ping", {}) == {"a": 1}


HOSTILE = {
    "not JSON": FakeResponse(body=b"<html>", headers=(("content-type", "text/html"),)),
    "not a JSON-RPC": FakeResponse(body=b"[]"),
    "longer than 1024 KiB": FakeResponse(body=b" " * (MAX_BODY + 1)),
    "is longer than": FakeResponse(headers=EVENTS, body=b"data: " + b"x" * (MAX_BODY + 1)),
    "longer than 4096 KiB in all": FakeResponse(headers=EVENTS, body=(b":" + b"x" * 1023 + b"\n") * 5000),
    "ended without an answer": FakeResponse(headers=EVENTS, body=b"data: {}\n\n"),
    "not JSON that": FakeResponse(body=b"[" * 200_000),
    "answers 500": FakeResponse(status=500),
}


@pytest.mark.parametrize("reason", HOSTILE)
async def test_an_answer_that_can_not_be_read_is_an_error(upstream: FakeMcpServer, reason: str) -> None:
    upstream.script("ping", HOSTILE[reason])
    async with client_of(upstream) as client:
        with pytest.raises(UpstreamProtocolError, match=reason):
            await client.request("ping", {})


async def test_a_refused_method_is_told_from_a_refused_token(upstream: FakeMcpServer) -> None:
    upstream.script("ping", FakeResponse(status=404), FakeResponse(status=401, headers=(("www-authenticate", "B"),)))
    upstream.answers["tools/list"] = lambda received: result(received, {})
    async with client_of(upstream) as client:
        await client.initialize()
        with pytest.raises(MethodRefused, match="it refuses prompts/list: Method not found"):
            await client.list("prompts/list", "prompts")
        with pytest.raises(MethodRefused, match="has no tools"):
            await client.list("tools/list", "tools")
        with pytest.raises(MethodRefused, match="404"):
            await client.request("ping", {})
        with pytest.raises(Challenged) as challenged:
            await client.request("ping", {})
    assert (challenged.value.status, challenged.value.challenge, challenged.value.nonce) == (401, [b"B"], [])


async def test_a_stream_in_small_parts_takes_no_more_time_than_one_in_large_parts() -> None:  # T90
    async def parts() -> AsyncIterator[bytes]:
        yield b'data: {"data": "' + b"x" * 900_000
        for _ in range(20_000):
            yield b"x"
        yield b'"}\n\ndata: {"id": 1, "result": {}}\n\n'

    began = time.process_time()
    answer = await read_answer(cast("Response", Streaming()), 1, parts())
    assert answer["result"] == {}
    assert time.process_time() - began < 2


class Streaming:
    """The head of a response that is an event stream."""

    headers = ((b"content-type", b"text/event-stream"),)
