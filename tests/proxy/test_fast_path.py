"""Requests on the fast path, with every kind of response."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes.forwarding import ForwardingServer, ScriptedBroker, access_token, forwarding
from fakes.proxy import until
from fakes.raw_client import RawClient
from fakes.raw_server import Peer, RawServer, Script, ok
from fakes.tasks import tasks_of_requests
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.proxy.fast_path import MAX_BODY, FastPathRequest, is_eligible
from mcp_auth_proxy.proxy.forwarder import Forwarder

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"event: message\r\ndata: {}\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def warm(script: Script, timeout: float = 5.0) -> AsyncIterator[tuple[RawServer, ForwardingServer, RawClient]]:
    """A client whose first call is over: the upstream connection is kept, and the script continues with the next."""

    async def answer_first(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await script(peer)

    broker = ScriptedBroker(access_token(1))
    async with (
        RawServer(answer_first) as upstream,
        forwarding(broker, upstream.url, timeout=timeout) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        assert (await client.answer()).body == b"hi"
        yield upstream, proxy, client


@pytest.mark.parametrize(
    ("content", "eligible"),
    [
        (CALL, True),
        (b"", True),
        (b"x" * MAX_BODY, True),
        (b"x" * (MAX_BODY + 1), False),
        (b'{"method":"initialize"}', False),
        (b'{"method":"subscriptions\\/listen"}', False),
        (b'{"io.mcp-auth-proxy\\/authorization":{}}', False),
    ],
)
def test_bodies_that_need_inspection_or_are_long_do_not_take_the_fast_path(content: bytes, eligible: bool) -> None:
    assert is_eligible(content, 1 << 20) is eligible
    assert not is_eligible(content or b"x", 0)


async def test_an_event_stream_whose_end_comes_separately_needs_no_task() -> None:
    end = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + chunk(EVENT))
        await end.wait()
        await peer.send(b"0\r\n\r\n")
        await peer.until_gone()

    async with warm(script) as (upstream, proxy, client):
        client.post(CALL)
        status, headers = await client.head()
        assert (status, dict(headers)["transfer-encoding"]) == (200, "chunked")
        assert await client.reader.readexactly(len(chunk(EVENT))) == chunk(EVENT)
        assert (proxy.forwarder.active_requests, tasks_of_requests()) == (1, 0)
        end.set()
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"
        assert proxy.forwarder.active_requests == 0
        assert len(upstream.peers) == 1


async def test_a_stream_that_breaks_off_ends_without_a_final_chunk(caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + chunk(EVENT))

    async with warm(script) as (_, proxy, client):
        client.post(CALL)
        await client.head()
        assert await client.rest() == chunk(EVENT)
        assert proxy.forwarder.active_requests == 0
    assert "broke off" in caplog.text


async def test_a_response_that_breaks_off_before_any_of_its_body_is_answered_with_an_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + b"no length\r\n")
        await peer.until_gone()

    async with warm(script) as (upstream, proxy, client):
        client.post(CALL)
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["id"]) == (502, 9)
        assert "not valid HTTP" in answer.body.decode()
        assert (len(upstream.requests), proxy.forwarder.active_requests) == (2, 0)


async def test_a_response_that_does_not_end_is_broken_off_after_the_upstream_timeout() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        await peer.until_gone()

    async with warm(script, timeout=0.2) as (upstream, _, client):
        client.post(CALL)
        answer = await client.answer()
        assert (answer.body, answer.ended) == (b"{", False)
        await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)


async def test_a_client_that_goes_away_in_a_stream_closes_the_upstream() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + chunk(EVENT))
        await peer.until_gone()

    async with warm(script) as (upstream, proxy, client):
        client.post(CALL)
        await client.head()
        client.drop()
        await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)
        await until(lambda: proxy.forwarder.active_requests == 0, "no active request")


async def test_a_client_that_does_not_read_pauses_the_upstream() -> None:
    part, sent = b"x" * 65_536, 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % (1 << 26))
        for _ in range((1 << 26) // len(part)):
            await peer.send(part)
            sent += len(part)
        await peer.until_gone()

    async with warm(script) as (_, proxy, _), RawClient.to(proxy.origin, buffer=65_536) as slow:
        slow.post(CALL)
        await until(lambda: any(not fast.request.may_write for fast in proxy.forwarder.fast_requests), "a pause")
        assert sent < 1 << 25, "what is not read stays with the upstream"
        total = len(await read_body(slow))
        assert total == 1 << 26


async def read_body(client: RawClient) -> bytes:
    _, headers = await client.head()
    async with asyncio.timeout(20):
        return await client.reader.readexactly(int(dict(headers)["content-length"]))


async def test_shutdown_ends_a_stream_with_a_final_chunk_and_a_silent_call_with_an_answer() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + chunk(EVENT))
        await peer.until_gone()

    async with warm(script) as (_, proxy, client):
        client.post(CALL)
        await client.head()
        proxy.forwarder.end_all()
        assert await client.reader.readexactly(len(chunk(EVENT)) + 5) == chunk(EVENT) + b"0\r\n\r\n"

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with warm(silent) as (upstream, proxy, client):
        client.post(CALL)
        await until(lambda: len(upstream.requests) == 2, "two requests")
        proxy.forwarder.end_all()
        answer = await client.answer()
        assert answer.status == 503
        assert "shutting down" in answer.body.decode()


async def test_a_silent_call_ends_in_words_if_its_server_is_removed_and_is_no_failure_of_the_upstream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    before = failures()
    async with warm(silent) as (upstream, proxy, client):
        client.post(CALL)
        await until(lambda: len(upstream.requests) == 2, "two requests")
        proxy.forwarder.servers_changed({"notes"}, ())
        answer = await client.answer()
        assert (answer.status, answer.all("retry-after")) == (503, ["5"])
        assert "Server notes: it is no longer configured." in answer.body.decode()
        await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)
    assert (failures(), caplog.text) == (before, "")


@pytest.mark.parametrize("removed", [True, False])
async def test_a_challenged_call_that_is_ended_before_a_handler_has_it_is_answered_and_counted_once(
    monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    async def challenge(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        await peer.until_gone()

    fall_back = Forwarder.fall_back

    def ended_at_once(forwarder: Forwarder, fast: FastPathRequest) -> None:
        fall_back(forwarder, fast)
        if removed:
            forwarder.servers_changed({"notes"}, ())
        else:
            forwarder.end_all()

    monkeypatch.setattr(Forwarder, "fall_back", ended_at_once)
    async with warm(challenge) as (upstream, proxy, client):
        before = finished()
        client.post(CALL)
        answer = await client.answer()
        assert answer.status == 503
        assert ("no longer configured" if removed else "shutting down") in answer.body.decode()
        assert (len(upstream.requests), finished() - before) == (2, 1)
        assert proxy.forwarder.active_requests == 0


async def test_a_stream_does_not_keep_the_body_of_its_request() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + chunk(EVENT))
        await peer.until_gone()

    async with warm(script) as (_, proxy, client):
        client.post(b"x" * 60_000)
        await client.head()
        (fast,) = proxy.forwarder.fast_requests
        assert fast.request.peek_body() == b""


def failures() -> list[str]:
    return list(metrics.upstream_failures.lines())


def finished() -> int:
    """Return how many POSTs to the server were counted."""
    buckets, _ = metrics.requests.labels("notes", "post").buckets()
    return buckets[-1]
