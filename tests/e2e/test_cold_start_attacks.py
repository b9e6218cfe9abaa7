"""T90: clients and servers that attack what the proxy answers and keeps while there is no consent yet."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse, RecordedRequest, sse
from fakes.mcp_client import MODERN, PlainClient, read
from fakes.proxy import link_in, until, write_config
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load

COLD: dict[str, Any] = {"wait": "5s", "cold_start": True}


def cold(servers: Servers, folder: Path, **options: Any) -> Any:
    options.setdefault("authorization", COLD)
    options.setdefault("upstream", {"sessions_on": True})
    return proxy_setup(servers, folder, **options)


async def raw(client: PlainClient, text: str, method: str) -> Any:
    """Send a body as it is."""
    headers = client.headers({"method": method})
    return read(await client.http.post(client.url, content=text, headers=headers))


async def test_a_number_that_json_does_not_have_ends_no_request(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        first = await setup.client.initialize()
        await consent(link_in(first.message))
        body = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"call_notes","arguments":'
        reply = await raw(setup.client, body + '{"name":"echo","arguments":{"x":1e999}}}}', "tools/call")
        assert reply.status == 200
        assert reply.result["isError"] is True
        assert not setup.upstream.calls("tools/call:echo")


async def test_a_filter_that_json_does_not_have_ends_no_request(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, client={"version": MODERN}) as setup:
        message = setup.client.message("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, id=1)
        text = json.dumps(message).replace("true", "1e999", 1)
        async with asyncio.timeout(5):
            async with setup.client.http.stream(
                "POST", setup.client.url, content=text, headers=setup.client.headers(message)
            ) as response:
                assert response.status_code == 200
                lines = response.aiter_lines()
                while not (line := await anext(lines)).startswith("data:"):
                    pass
        assert "acknowledged" in line


async def test_only_levels_of_logs_are_kept_of_a_session(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        first = await setup.client.initialize()
        assert (await setup.client.post("logging/setLevel", {"level": "x" * 300_000})).result == {}
        stored = sum(path.stat().st_size for path in tmp_path.glob("proxy.db*"))
        assert stored < 1_000_000
        initialized = {"capabilities": {"logging": {}}, "protocolVersion": "2025-11-25", "serverInfo": {}}
        setup.upstream.answers["initialize"] = FakeResponse.json({"jsonrpc": "2.0", "id": 1, "result": initialized})
        await consent(link_in(first.message))
        setup.upstream.sessions_on = False
        assert (await setup.client.call("echo", text="x")).text == "x"
        assert not setup.upstream.calls("logging/setLevel")


@pytest.mark.parametrize("own", ["map-of-the-server", "map-.x", "map-" + "A" * 32])
async def test_a_server_whose_sessions_look_like_ours(servers: Servers, tmp_path: Path, own: str) -> None:
    def initialized(received: RecordedRequest) -> FakeResponse:
        result = {"capabilities": {"tools": {}}, "protocolVersion": "2025-11-25", "serverInfo": {"name": "x"}}
        answer = {"jsonrpc": "2.0", "id": received.message["id"], "result": result}
        headers = (("content-type", "application/json"), ("mcp-session-id", own))
        return FakeResponse(headers=headers, body=json.dumps(answer).encode())

    async with cold(servers, tmp_path, upstream={"sessions_on": False}) as setup:
        setup.upstream.answers["initialize"] = initialized
        first = await setup.client.initialize()
        await consent(link_in(first.message))
        assert (await setup.client.call("echo", text="x")).text == "x"
        assert setup.upstream.calls("tools/call")[-1].header("mcp-session-id") == own
        async with setup.proxy.client("notes") as other:
            await other.initialize()
            for text in ("1", "2"):
                reply = await other.call("echo", text=text)
                assert (reply.status, reply.text) == (200, text)
                assert setup.upstream.calls("tools/call")[-1].header("mcp-session-id") == own
        await until(lambda: setup.upstream.calls("DELETE"))
        assert all(call.header("mcp-session-id") == own for call in setup.upstream.calls("DELETE"))


async def test_a_session_does_not_move_with_the_name_of_its_server(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        first = await setup.client.initialize()
        await consent(link_in(first.message))
        assert (await setup.client.call("echo", text="x")).text == "x"
        other = await servers.mcp_server(setup.issuer, sessions_on=True, protected=False)
        path = write_config(tmp_path, {"notes": {"url": other.url}}, authorization=COLD)
        application = setup.proxy.application
        application.apply(compare(application.settings, load(path)))
        assert (await setup.client.call("echo", text="y")).status == 404
        assert not other.calls()


async def test_an_answer_to_initialize_that_never_ends_is_not_read_for_long(servers: Servers, tmp_path: Path) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield sse({"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "x" * 60_000}})

    async with cold(servers, tmp_path) as setup:
        first = await setup.client.initialize()
        setup.upstream.answers["initialize"] = FakeResponse.events(endless)
        await consent(link_in(first.message))
        async with asyncio.timeout(10):
            reply = await setup.client.call("echo", text="x")
        assert reply.status in (200, 502)
        assert "longer than" in reply.error["message"]


@pytest.mark.parametrize("listening", ["GET", "subscriptions/listen"])
async def test_streams_that_wait_leave_places_to_requests(servers: Servers, tmp_path: Path, listening: str) -> None:
    async with (
        cold(
            servers, tmp_path, limits={"held": 8}, client={"version": MODERN if listening != "GET" else "2025-11-25"}
        ) as setup,
        AsyncExitStack() as open_streams,
    ):
        client = setup.client
        if listening == "GET":
            await client.initialize()
        else:
            await client.call("echo")
        statuses = []
        for _ in range(8):
            given = (None, None) if listening == "GET" else (listening, {"notifications": {"toolsListChanged": True}})
            response, _ = await open_streams.enter_async_context(client.stream(*given))
            statuses.append(response.headers["content-type"].startswith("text/event-stream"))
        assert statuses == [True] * 4 + [False] * 4
        assert setup.proxy.application.forwarder.held.used == 4
