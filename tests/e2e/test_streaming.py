"""Streaming: large bodies, events one by one, slow readers, clients that disconnect, and the SDK's own client."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from mcp import Client

from fakes.fixtures import Servers
from fakes.http_exchange import Channel, FakeResponse, RecordedRequest, sse
from fakes.mcp_client import MODERN
from fakes.mcp_server import CHUNK
from fakes.proxy import ProxyProcess, proxy_process, running_proxy, until, wait_until_stable, write_config
from fakes.raw_client import RawClient
from fakes.unattended import connected, unattended

MEGABYTE = 1024 * 1024
SSE = {"accept": "text/event-stream"}


def call(tool: str) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool}}).encode()


def progress(number: int) -> dict[str, object]:
    return {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 1, "progress": number}}


async def test_five_megabytes_pass_both_ways_unchanged(servers: Servers, tmp_path: Path) -> None:
    sent, answered = os.urandom(5 * MEGABYTE), os.urandom(5 * MEGABYTE)

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(answered), 10_007):
            yield answered[start : start + 10_007]

    binary = {"content-type": "application/octet-stream"}
    async with connected(servers, tmp_path) as setup:
        for answer in (FakeResponse(stream=stream), FakeResponse(body=answered)):
            setup.upstream.answers["POST"] = answer
            response = await setup.client.http.post(setup.client.url, content=sent, headers=binary)
            assert response.content == answered
            assert setup.upstream.calls()[-1].body == sent


async def test_a_compressed_response_is_not_changed(servers: Servers, tmp_path: Path) -> None:
    answer = FakeResponse.gzipped({"jsonrpc": "2.0", "id": 1, "result": {}})
    async with connected(servers, tmp_path, options={"answers": {"ping": answer}}) as setup:  # T36
        message = setup.client.message("ping", id=1)
        headers = setup.client.headers(message) | {"accept-encoding": "gzip"}
        async with setup.client.http.stream("POST", setup.client.url, json=message, headers=headers) as response:
            raw = b"".join([part async for part in response.aiter_raw()])
    assert (raw, response.headers["content-encoding"]) == (answer.body, "gzip")
    assert response.headers["content-length"] == str(len(answer.body))


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_events_of_a_call_arrive_one_by_one(servers: Servers, tmp_path: Path, version: str) -> None:
    channel = Channel()
    async with connected(servers, tmp_path, version=version) as setup:
        setup.upstream.answers["tools/call:count"] = FakeResponse.events(channel)
        async with setup.client.stream("tools/call", {"name": "count"}) as (response, events), asyncio.timeout(10):
            assert response.headers["content-type"] == "text/event-stream"
            for number in range(10):
                channel.event(progress(number))
                assert (await anext(events))["params"]["progress"] == number
            channel.close()
            assert [event async for event in events] == []


async def test_comments_and_incomplete_events_pass_at_once(servers: Servers, tmp_path: Path) -> None:
    channel = Channel()
    async with connected(servers, tmp_path, options={"sessions_on": True}) as setup:
        await setup.client.initialize()
        setup.upstream.answers["GET"] = FakeResponse.events(channel)
        headers = SSE | {"mcp-session-id": setup.client.session or ""}
        async with setup.client.http.stream("GET", setup.client.url, headers=headers) as response, asyncio.timeout(10):
            parts = response.aiter_raw()
            for part in (b": keep-alive\n\n", b"id: 1\ndata: {", b"}\n\n", b"\r\n", "data: é\n\n".encode()):
                channel.put(part)
                assert await anext(parts) == part


async def test_pushed_events_arrive_on_the_get_stream_until_delete(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path, options={"sessions_on": True}) as setup:
        await setup.client.initialize()
        setup.client.http.headers["last-event-id"] = "event-41"
        async with setup.client.stream() as (_, events), asyncio.timeout(10):
            for number in range(5):
                assert setup.upstream.push(progress(number)) == 1
                assert (await anext(events))["params"]["progress"] == number
            assert (await setup.client.call("echo", text="beside it")).text == "beside it"
            assert (await setup.client.delete()).status == 200
            assert [event async for event in events] == []
        assert setup.upstream.calls("GET")[-1].header("last-event-id") == "event-41"
        async with setup.client.stream() as (response, _):
            assert response.status_code == 404


async def test_a_get_stream_that_the_server_does_not_support_is_405(servers: Servers, tmp_path: Path) -> None:
    async with (
        connected(servers, tmp_path, options={"get_stream": False}) as setup,
        setup.client.stream() as (response, _),
    ):
        assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_slow_reader_holds_the_upstream_back(servers: Servers, tmp_path: Path, method: str) -> None:
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += len(CHUNK)
            yield CHUNK

    async with connected(servers, tmp_path) as setup:  # T39
        await setup.client.post("ping")
        setup.upstream.answers[method] = FakeResponse.events(endless)
        async with RawClient.to(setup.proxy.origin, buffer=64 * 1024) as raw:
            if method == "GET":
                raw.get()
            else:
                raw.post(call("endless"))
            await raw.head()
            stuck = await wait_until_stable(lambda: given)
            assert stuck < 32 * MEGABYTE  # what kernels buffer on two loopback connections
            for _ in range(2 * stuck // len(CHUNK)):
                await raw.reader.readexactly(len(CHUNK))
            assert given > stuck
        await asyncio.wait_for(setup.upstream.calls(method)[-1].gone.wait(), 5)


def resident(proxy: ProxyProcess) -> int:
    """Bytes of memory that the process holds."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_slow_readers_cost_bounded_memory(servers: Servers, tmp_path: Path) -> None:
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += len(CHUNK)
            yield CHUNK

    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, answers={"GET": FakeResponse.events(endless)})
    config = write_config(tmp_path, {"notes": unattended(issuer, upstream.url, tmp_path)})
    async with proxy_process(config) as proxy, AsyncExitStack() as stack:  # T39
        async with proxy.client("notes") as client:
            await client.post("ping")
        before = resident(proxy)
        for _ in range(20):
            raw = await stack.enter_async_context(RawClient.to(proxy.origin, buffer=64 * 1024))
            raw.get()
            await raw.head()
        await wait_until_stable(lambda: given)
        assert given > 20 * MEGABYTE
        assert resident(proxy) - before < 20 * MEGABYTE


# A client that leaves


def waiting(received: RecordedRequest) -> bool:
    """A call or GET stream that is not answered yet and has its client."""
    return received.path == "/mcp" and (received.method == "GET" or bool(received.tool)) and not received.gone.is_set()


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("silent", ["before the head", "in a stream"])
async def test_a_client_that_disconnects_closes_the_upstream_connection(
    servers: Servers, tmp_path: Path, method: str, silent: str
) -> None:
    answer = FakeResponse.hang() if silent == "before the head" else FakeResponse.events(Channel())
    async with connected(servers, tmp_path) as setup:  # T40
        await setup.client.post("ping")
        setup.upstream.answers[method] = answer
        for leaves in (RawClient.drop, lambda raw: raw.writer.close(), lambda raw: raw.writer.write_eof()):
            async with RawClient.to(setup.proxy.origin) as raw:
                if method == "GET":
                    raw.get()
                else:
                    raw.post(call("think"))
                received = await setup.upstream.log.wait_for(waiting)
                if silent == "in a stream":
                    await raw.head()
                leaves(raw)
                await asyncio.wait_for(received.gone.wait(), 5)
        assert setup.proxy.application.forwarder.active_requests == 0


async def test_many_clients_that_disconnect_at_once_are_all_noticed(servers: Servers, tmp_path: Path) -> None:
    answers = {"tools/call:think": FakeResponse.hang(), "GET": FakeResponse.events(Channel())}
    async with connected(servers, tmp_path, options={"answers": answers}) as setup, AsyncExitStack() as stack:  # T40
        await setup.client.post("ping")
        clients = [await stack.enter_async_context(RawClient.to(setup.proxy.origin)) for _ in range(100)]
        for number, raw in enumerate(clients):
            if number % 2:
                raw.get()
            else:
                raw.post(call("think"))
        await until(lambda: len([*filter(waiting, setup.upstream.requests)]) == 100)
        for raw in clients:
            raw.drop()
        await until(lambda: not [*filter(waiting, setup.upstream.requests)], timeout=5)
        assert (await setup.client.call("echo", text="on")).text == "on"


async def test_cancelling_one_call_does_not_affect_the_others(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    body = sse({"jsonrpc": "2.0", "id": 1, "result": {}})
    async with connected(servers, tmp_path, version=MODERN) as setup:
        setup.upstream.answers["tools/call:gated"] = FakeResponse(
            headers=(("content-type", "text/event-stream"),), body=body, gate=gate
        )
        calls = [asyncio.create_task(setup.client.call("gated")) for _ in range(3)]
        await until(lambda: len([r for r in setup.upstream.calls("tools/call:gated") if r.bearer]) == 3)
        calls[1].cancel()
        await until(lambda: len([r for r in setup.upstream.calls("tools/call:gated") if r.gone.is_set()]) == 1)
        gate.set()
        assert [(await one).message["id"] for one in (calls[0], calls[2])] == [1, 1]


# The SDK on both ends


@pytest.mark.parametrize("mode", ["legacy", "auto", MODERN])
async def test_the_sdks_client_and_server_work_through_the_proxy(servers: Servers, tmp_path: Path, mode: str) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.real_mcp_server(issuer)
    loop = asyncio.get_running_loop()
    seen: list[tuple[float, float]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        seen.append((progress, loop.time()))

    config = {"notes": unattended(issuer, upstream.url, tmp_path)}
    async with running_proxy(tmp_path, config) as proxy, Client(f"{proxy.origin}/notes/mcp", mode=mode) as client:
        assert "echo" in {tool.name for tool in (await client.list_tools()).tools}
        large = await client.call_tool("large", {"size": 400_000})
        assert getattr(large.content[0], "text", "") == "x" * 400_000
        result = await client.call_tool("count", {"to": 4, "seconds": 0.1}, progress_callback=note)
        ended = loop.time()
    assert getattr(result.content[0], "text", "") == "counted to 4"
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    assert all(ended - at > 0.1 * (4 - number) for number, at in seen)
