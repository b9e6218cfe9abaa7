"""Ordinary calls on the fast path, and all the ways in which they can end."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import Channel, FakeResponse
from fakes.proxy import RunningProxy, proxy_process, running_proxy, until, write_config
from fakes.raw_client import RawClient
from fakes.raw_server import Peer, RawServer, ok
from fakes.tasks import tasks_of_requests
from fakes.unattended import connected, unattended

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()


@contextlib.asynccontextmanager
async def warm(folder: Path, upstream: RawServer, timeout: str = "5s") -> AsyncIterator[tuple[RunningProxy, RawClient]]:
    """A client of a server that requires no token. Its first call is over: the next ones take the fast path."""
    server = {"url": upstream.url, "upstream_timeout": timeout}
    async with running_proxy(folder, {"notes": server}) as proxy, RawClient.to(proxy.origin) as raw:
        raw.post(CALL)
        assert (await raw.answer()).body == b"hi"
        yield proxy, raw


def first_then(*responses: bytes) -> RawServer:
    """Answers each request, the first with ``hi``, and closes the connection after the last."""

    async def script(peer: Peer) -> None:
        for response in (ok(), *responses):
            await peer.request()
            await peer.send(response)

    return RawServer(script)


async def test_a_call_that_waits_for_its_answer_takes_no_task(servers: Servers, tmp_path: Path) -> None:
    slow = FakeResponse.json({"jsonrpc": "2.0", "id": 9, "result": {}})
    slow.gate = asyncio.Event()
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        await setup.client.post("ping")
        setup.upstream.answers["tools/call:pay"] = slow
        raw.post(CALL)
        await until(lambda: setup.upstream.calls("tools/call:pay"))
        assert (setup.proxy.application.forwarder.active_requests, tasks_of_requests()) == (1, 0)
        slow.gate.set()
        answer = await raw.answer()
        assert (answer.status, json.loads(answer.body)["id"]) == (200, 9)
        assert setup.proxy.application.forwarder.active_requests == 0


async def test_a_token_that_is_refused_meanwhile_is_renewed_and_the_call_sent_once_more(
    servers: Servers, tmp_path: Path
) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        await setup.client.post("ping")
        challenge = (("www-authenticate", 'Bearer error="invalid_token"'),)
        refusals = iter([FakeResponse(status=401, headers=challenge)])
        setup.upstream.answers["tools/call:pay"] = lambda _: next(refusals, None)
        raw.post(CALL)
        answer = await raw.answer()
        assert answer.status == 200
        first, second = setup.upstream.calls("tools/call:pay")
        assert first.header("authorization") != second.header("authorization")
        assert (first.body, second.body) == (CALL, CALL)


async def test_a_redirect_within_the_origin_is_followed(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        await setup.client.post("ping")
        redirects = iter([FakeResponse(status=307, headers=(("location", "/mcp?again"),))])
        setup.upstream.answers["tools/call:pay"] = lambda _: next(redirects, None)
        raw.post(CALL)
        assert (await raw.answer()).status == 200
        assert len(setup.upstream.calls("tools/call:pay")) == 2


async def test_events_that_come_one_by_one_are_not_delayed(servers: Servers, tmp_path: Path) -> None:
    channel = Channel()
    async with connected(servers, tmp_path) as setup:
        await setup.client.post("ping")
        setup.upstream.answers["tools/call:count"] = FakeResponse.events(channel)
        async with setup.client.stream("tools/call", {"name": "count"}) as (_, events), asyncio.timeout(10):
            for number in range(3):
                channel.event({"n": number})
                assert await anext(events) == {"n": number}
            channel.close()
            assert [event async for event in events] == []


@pytest.mark.parametrize(
    ("response", "status"),
    [
        (b"", 502),
        (b"HTTP/1.1 200 OK\r\ncontent-le", 502),
        (b"nonsense\r\n\r\n", 502),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        (b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n", 202),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", 429),
    ],
)
async def test_a_call_is_sent_once_whatever_its_response(tmp_path: Path, response: bytes, status: int) -> None:
    async with first_then(response) as upstream, warm(tmp_path, upstream) as (_, raw):
        raw.post(CALL)
        answer = await raw.answer()
        assert (answer.status, answer.ended) == (status, True)
        assert len(upstream.requests) == 2
        if status == 502:
            assert json.loads(answer.body)["id"] == 9


@pytest.mark.parametrize("known_length", [True, False])
async def test_a_body_that_breaks_off_ends_the_connection(tmp_path: Path, known_length: bool) -> None:
    framing = b"content-length: 99" if known_length else b"transfer-encoding: chunked"
    response = b"HTTP/1.1 200 OK\r\n%s\r\n\r\n5\r\nhello\r\n" % framing
    async with first_then(response) as upstream, warm(tmp_path, upstream) as (_, raw):
        raw.post(CALL)
        answer = await raw.answer()
        assert (answer.status, answer.ended) == (200, False)
        assert b"hello" in answer.body
        assert await raw.rest() == b""


async def test_a_silent_upstream_is_a_timeout_counted_from_the_call(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()

    async def script(peer: Peer) -> None:
        for _ in range(3):
            await peer.request()
            await asyncio.sleep(0.2)  # of the time that the connection's timer was set for
            await peer.send(ok())
        await peer.request()
        await peer.until_gone()

    async with RawServer(script) as upstream, warm(tmp_path, upstream, timeout="400ms") as (_, raw):
        for _ in range(2):
            raw.post(CALL)
            assert (await raw.answer()).status == 200
        begun = loop.time()
        raw.post(CALL)
        assert (await raw.answer()).status == 504
        assert 0.39 <= loop.time() - begun < 5


async def test_busy_polling_ends_if_a_quick_server_falls_silent(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(200):
            await peer.request()
            await peer.send(ok())
        await peer.request()
        await peer.until_gone()

    async with RawServer(script) as upstream, warm(tmp_path, upstream) as (_, raw):
        for _ in range(199):
            raw.post(CALL)
            await raw.answer()
        raw.post(CALL)
        await until(lambda: len(upstream.requests) == 201)
        before = time.process_time()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(raw.head(), 0.6)
        assert time.process_time() - before < 0.3


async def test_a_client_that_disconnects_ends_its_call(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        await setup.client.post("ping")
        setup.upstream.answers["tools/call:pay"] = FakeResponse.hang()
        raw.post(CALL)
        await until(lambda: setup.upstream.calls("tools/call:pay"))
        raw.drop()
        await until(setup.upstream.calls("tools/call:pay")[0].gone.is_set)
        await until(lambda: setup.proxy.application.forwarder.active_requests == 0)
        assert (await setup.client.post("ping")).status == 200


async def test_the_limit_for_bodies_holds_for_every_call(tmp_path: Path) -> None:
    limits = {"body": len(CALL) + 10}
    async with (
        first_then(ok()) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}, limits=limits) as proxy,
        RawClient.to(proxy.origin) as raw,
    ):
        for spaces, status in ((10, 200), (11, 413)):
            raw.post(CALL + b" " * spaces)
            assert (await raw.answer()).status == status
        assert len(upstream.requests) == 1


async def test_pipelined_calls_are_answered_in_their_order(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.send(ok(b"%d" % len(await peer.request())))

    async with RawServer(script) as upstream, running_proxy(tmp_path, {"notes": upstream.url}) as proxy:
        async with RawClient.to(proxy.origin) as raw:
            bodies = [CALL + b" " * number for number in (0, 5, 1, 7, 2)]
            for body in bodies:
                raw.post(body)
            lengths = [int((await raw.answer()).body) for _ in bodies]
        assert [length - lengths[0] for length in lengths] == [0, 5, 1, 7, 2]
        assert len(upstream.peers) == 1


async def settled_at(value: Callable[[], int], wanted: int) -> int:
    """Wait, bounded, for a number to become the wanted one; return the last number."""
    with contextlib.suppress(AssertionError):
        await until(lambda: value() >= wanted, timeout=1)
    return value()


async def test_no_call_is_sent_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(ok(b"x" * 50_000))

    async with (
        RawServer(script) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin, buffer=4096) as raw,
    ):
        for number in range(1000):
            raw.post(CALL)
            # One after the other: what is sent far ahead is not even read.
            if await settled_at(lambda: len(upstream.requests), number + 1) <= number:
                break
        assert 0 < len(upstream.requests) < 500


async def test_calls_that_outlast_the_drain_are_answered_at_the_second_signal(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": unattended(issuer, upstream.url, tmp_path)})
    async with proxy_process(config) as proxy, RawClient.to(proxy.origin) as raw:
        async with proxy.client("notes") as client:
            await client.call("echo", text="warm")
        upstream.answers["tools/call:pay"] = FakeResponse.hang()
        raw.post(CALL)
        await until(lambda: upstream.calls("tools/call:pay"))
        proxy.process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(proxy.process.wait(), 0.5)
        proxy.process.send_signal(signal.SIGTERM)
        answer = await raw.answer()
        assert (answer.status, json.loads(answer.body)["id"]) == (503, 9)
        assert await asyncio.wait_for(proxy.process.wait(), 20) == 0
        assert "Traceback" not in proxy.log
