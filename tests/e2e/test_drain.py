"""SIGTERM: not ready at once, running calls end as they would, what only waits ends cleanly, exit code 0 (F10)."""

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import Channel, FakeResponse
from fakes.mcp_client import MODERN
from fakes.mcp_server import CHUNK, FakeMcpServer
from fakes.proxy import ProxyProcess, link_in, proxy_process, until, wait_until_stable, write_config
from fakes.raw_client import RawClient
from fakes.unattended import connected, unattended

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "echo"}}).encode()

SOON = 4.0
"""Seconds. Connections that are not closed would keep the process for five."""


@asynccontextmanager
async def serving(servers: Servers, folder: Path, **sections: Any) -> AsyncIterator[tuple[ProxyProcess, FakeMcpServer]]:
    """A proxy process that has a token already."""
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(folder, {"notes": unattended(issuer, upstream.url, folder)}, **sections)
    async with proxy_process(config) as proxy:
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="warm")).text == "warm"
        yield proxy, upstream


async def exit_code(proxy: ProxyProcess, seconds: float) -> int:
    """Wait for the end of the process; its log must be free of tracebacks."""
    code = await asyncio.wait_for(proxy.process.wait(), seconds)
    assert proxy.reading is not None
    await proxy.reading
    assert "Traceback" not in proxy.log, proxy.log
    assert not re.search(r"^\S+ \S+ (error|critical) ", proxy.log, re.MULTILINE), proxy.log
    return code


async def status(proxy: ProxyProcess, path: str = "/readyz") -> int:
    async with httpx2.AsyncClient(trust_env=False) as http:
        return (await http.get(proxy.origin + path)).status_code


async def draining(proxy: ProxyProcess) -> None:
    """Wait, bounded, until /readyz says that the proxy is going away."""
    for _ in range(100):
        if await status(proxy) == 503:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("still ready")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_proxy_ends_at_once(servers: Servers, tmp_path: Path, sign: signal.Signals) -> None:  # F10
    async with serving(servers, tmp_path) as (proxy, _), RawClient.to(proxy.origin) as silent:
        async with proxy.client("notes") as client:
            await client.call("echo", text="this connection is kept alive")
            proxy.process.send_signal(sign)
            assert await exit_code(proxy, SOON) == 0
        assert await silent.rest(1) == b""


@pytest.mark.parametrize("version", ["2025-11-25", MODERN])
async def test_a_running_call_completes_while_probes_see_503(servers: Servers, tmp_path: Path, version: str) -> None:
    gate = asyncio.Event()
    answer = FakeResponse.json({"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "done"}]}})
    answer.gate = gate
    async with serving(servers, tmp_path) as (proxy, upstream), proxy.client("notes", version=version) as client:
        upstream.answers["tools/call:slow"] = answer
        call = asyncio.create_task(client.call("slow"))
        await until(lambda: upstream.calls("tools/call:slow"))
        proxy.process.send_signal(signal.SIGTERM)
        await draining(proxy)
        assert await status(proxy, "/healthz") == 200
        async with proxy.client("notes") as other:  # one that has not heard of it yet
            assert (await other.call("echo", text="late")).text == "late"
        assert proxy.process.returncode is None
        gate.set()
        assert (await call).text == "done"
        assert await exit_code(proxy, SOON) == 0
    assert len(upstream.calls("tools/call:slow")) == 1


async def test_a_stream_of_progress_continues_to_its_result(servers: Servers, tmp_path: Path) -> None:
    channel = Channel()
    async with serving(servers, tmp_path) as (proxy, upstream), proxy.client("notes") as client:
        upstream.answers["tools/call:count"] = FakeResponse.events(channel)
        async with client.stream("tools/call", {"name": "count"}) as (_, events), asyncio.timeout(10):
            channel.event({"n": 1})
            assert await anext(events) == {"n": 1}
            proxy.process.send_signal(signal.SIGTERM)
            for number in (2, 3):
                channel.event({"n": number})
                assert await anext(events) == {"n": number}
            channel.close()
            assert [event async for event in events] == []
        assert await exit_code(proxy, SOON) == 0


@pytest.mark.parametrize("sent", ["get", "subscriptions/listen", "subscriptions\\/listen"])
async def test_idle_streams_end_with_a_final_chunk_at_once(servers: Servers, tmp_path: Path, sent: str) -> None:
    body = b'{"jsonrpc": "2.0", "id": 1, "method": "%s"}' % sent.encode()  # PHP escapes slashes
    async with serving(servers, tmp_path) as (proxy, upstream):
        upstream.answers["GET"] = upstream.answers["POST"] = FakeResponse.events(Channel())
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(RawClient.to(proxy.origin)) for _ in range(5)]
            for raw in streams:
                if sent == "get":
                    raw.get()
                else:
                    raw.post(body, "Accept: application/json, text/event-stream")
                assert (await raw.head())[0] == 200
            proxy.process.send_signal(signal.SIGTERM)
            for raw in streams:
                assert (await raw.rest()).endswith(b"0\r\n\r\n")
        assert await exit_code(proxy, SOON) == 0
        await until(lambda: all(r.gone.is_set() for r in upstream.requests[-5:]))


async def test_a_stream_that_the_upstream_has_not_opened_yet_ends_at_once(servers: Servers, tmp_path: Path) -> None:
    async with serving(servers, tmp_path) as (proxy, upstream), RawClient.to(proxy.origin) as raw:
        upstream.answers["GET"] = FakeResponse.hang()
        raw.get()
        await until(lambda: upstream.calls("GET"))
        proxy.process.send_signal(signal.SIGTERM)
        assert (await raw.answer()).status == 503
        assert await exit_code(proxy, SOON) == 0


async def test_clients_that_always_have_another_request_do_not_keep_it_running(
    servers: Servers, tmp_path: Path
) -> None:
    async def ask_for_ever() -> None:
        with contextlib.suppress(httpx2.TransportError):
            async with proxy.client("notes") as client:
                while True:
                    await client.call("echo", text="again")

    async with serving(servers, tmp_path) as (proxy, _):
        busy = [asyncio.create_task(ask_for_ever()) for _ in range(8)]
        await asyncio.sleep(0)
        proxy.process.send_signal(signal.SIGTERM)
        assert await exit_code(proxy, 8) == 0
        await asyncio.gather(*busy)


async def test_a_new_call_is_not_sent_once_all_requests_were_ended(servers: Servers, tmp_path: Path) -> None:
    """Its client is told to try again, so it must not have been acted upon."""
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        await setup.client.call("echo", text="warm")  # a token, and a kept connection to the upstream
        before = len(setup.upstream.calls())
        setup.proxy.application.router.draining = True
        setup.proxy.application.end()
        raw.post(CALL)
        answer = await raw.answer()
        assert (answer.status, answer.all("connection")) == (503, ["close"])
        assert len(setup.upstream.calls()) == before


async def test_a_connection_whose_requests_come_in_pieces_is_not_kept_while_draining(
    servers: Servers, tmp_path: Path
) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        setup.proxy.application.router.draining = True
        raw.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(CALL)}\n\n")
        await until(lambda: setup.proxy.application.forwarder.active_requests == 1)
        raw.send(CALL)
        answer = await raw.answer()
        assert (answer.status, answer.all("connection")) == (200, ["close"])


async def test_streams_that_clients_open_again_do_not_keep_it_running(servers: Servers, tmp_path: Path) -> None:
    gate = asyncio.Event()
    slow = FakeResponse.json({"jsonrpc": "2.0", "id": 1, "result": {"content": []}})
    slow.gate = gate
    async with serving(servers, tmp_path) as (proxy, upstream), proxy.client("notes") as client:
        upstream.answers |= {"GET": FakeResponse.events(Channel()), "tools/call:slow": slow}
        call = asyncio.create_task(client.call("slow"))
        await until(lambda: upstream.calls("tools/call:slow"))
        proxy.process.send_signal(signal.SIGTERM)
        await draining(proxy)
        async with RawClient.to(proxy.origin) as again:
            again.get()
            assert (await again.head())[0] in (200, 503)
            gate.set()
            await call
            assert await exit_code(proxy, SOON) == 0


async def test_a_stream_whose_client_does_not_read_does_not_keep_it_running(servers: Servers, tmp_path: Path) -> None:
    given = 0

    async def much() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield CHUNK

    async with serving(servers, tmp_path) as (proxy, upstream):
        upstream.answers["GET"] = FakeResponse.events(much)
        async with RawClient.to(proxy.origin, buffer=16_384) as raw:
            raw.get()
            await raw.head()
            await wait_until_stable(lambda: given)
            proxy.process.send_signal(signal.SIGTERM)
            assert await exit_code(proxy, 8) == 0


async def test_a_request_that_waits_for_its_user_is_answered_with_the_link(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "40s"})
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        initialize = asyncio.create_task(client.post("initialize", {"capabilities": {}}))
        call = asyncio.create_task(client.call("echo", text="x"))
        await proxy.next_link()
        await until(lambda: len(upstream.calls()) >= 1)
        begun = time.monotonic()
        proxy.process.send_signal(signal.SIGTERM)
        answer = await call
        assert answer.result["isError"] is True
        link = link_in(answer.message)
        assert link_in((await initialize).message) == link
        assert await exit_code(proxy, 5) == 0
        assert time.monotonic() - begun < 5
    listen = proxy.origin.removeprefix("http://")
    async with proxy_process(config, listen=listen) as proxy, proxy.client("notes") as client:
        assert (await consent(link)).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"


@pytest.mark.parametrize("kind", ["before the head", "in a stream"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(
    servers: Servers, tmp_path: Path, kind: str, second: signal.Signals
) -> None:
    async with serving(servers, tmp_path) as (proxy, upstream), proxy.client("notes") as client:
        upstream.answers["tools/call:slow"] = (
            FakeResponse.hang() if kind == "before the head" else FakeResponse.events(Channel())
        )
        message = client.message("tools/call", {"name": "slow"}, id=1)
        async with RawClient.to(proxy.origin) as raw:
            raw.post(json.dumps(message).encode())
            await until(lambda: upstream.calls("tools/call:slow"))
            if kind == "in a stream":
                await raw.head()
            proxy.process.send_signal(signal.SIGTERM)
            await draining(proxy)
            await until(lambda: "waiting for 1 request, up to 30 s; a second signal ends it" in proxy.err)
            begun = time.monotonic()
            proxy.process.send_signal(second)
            assert await exit_code(proxy, 5) == 0
            assert time.monotonic() - begun < SOON
            assert (await raw.rest())[-5:] in (b"", b"0\r\n\r\n") or kind == "before the head"


async def test_ctrl_c_says_once_how_many_requests_it_waits_for(servers: Servers, tmp_path: Path) -> None:
    async with serving(servers, tmp_path) as (proxy, upstream), contextlib.AsyncExitStack() as stack:
        upstream.answers["tools/call:slow"] = FakeResponse.hang()
        upstream.answers["GET"] = FakeResponse.events(Channel())
        idle = await stack.enter_async_context(RawClient.to(proxy.origin))
        idle.get()
        assert (await idle.head())[0] == 200
        for _ in range(2):
            raw = await stack.enter_async_context(RawClient.to(proxy.origin))
            raw.post(CALL.replace(b"echo", b"slow"))
        await until(lambda: len(upstream.calls("tools/call:slow")) == 2)
        proxy.process.send_signal(signal.SIGINT)
        await until(lambda: "waiting for" in proxy.err)
        proxy.process.send_signal(signal.SIGINT)
        assert await exit_code(proxy, 5) == 0
    assert re.findall("waiting for .*", proxy.err) == ["waiting for 2 requests, up to 30 s; a second Ctrl-C ends them"]
