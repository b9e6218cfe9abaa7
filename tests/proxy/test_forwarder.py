"""The forwarder: what it keeps track of, how it is drained, and races between an end and a response."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fakes.forwarding import ForwardingServer, ScriptedBroker, access_token, forwarding, pending_authorization
from fakes.proxy import until
from fakes.raw_client import RawClient
from fakes.raw_server import Peer, RawServer, Script, answers, ok
from fakes.tasks import tasks_of_requests
from mcp_auth_proxy.config.settings import AuthorizationSettings, LimitSettings
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.proxy.fast_path import FastPathRequest
from mcp_auth_proxy.proxy.routes import Route

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
CHALLENGE = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nContent-Length: 0\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@asynccontextmanager
async def warm(
    script: Script, broker: ScriptedBroker | None = None
) -> AsyncIterator[tuple[RawServer, ForwardingServer, RawClient]]:
    """A client whose first call is over: the next one takes the fast path, and the script answers it."""

    async def answer_first(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await script(peer)

    async with (
        RawServer(answer_first) as upstream,
        forwarding(broker or ScriptedBroker(access_token(1)), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        assert (await client.answer()).body == b"hi"
        yield upstream, proxy, client


async def silent(peer: Peer) -> None:
    await peer.request()
    await peer.until_gone()


async def stream(peer: Peer) -> None:
    await peer.request()
    await peer.send(EVENTS)
    await peer.until_gone()


# What does not take the fast path


async def test_an_account_whose_token_is_not_ready_is_waited_for_by_a_handler() -> None:
    broker = ScriptedBroker(access_token(1))
    async with warm(silent, broker) as (_, proxy, client):
        broker.waiting = pending_authorization()
        client.post(CALL)
        await until(lambda: tasks_of_requests() == 1, "a task")
        assert not proxy.forwarder.fast_requests


async def test_a_smaller_limit_holds_from_the_next_request_on() -> None:
    async with warm(answers(ok(b"good"))) as (upstream, proxy, client):
        limits = LimitSettings(body=len(CALL) - 1)
        proxy.forwarder.configure(limits=limits, authorization=AuthorizationSettings(cold_start=False), several=False)
        client.post(CALL)
        assert (await client.answer()).status == 413
    assert len(upstream.requests) == 1


async def test_a_changed_wait_holds_from_the_next_request_on() -> None:
    broker = ScriptedBroker()
    async with forwarding(broker, "http://127.0.0.1:1/mcp", wait=3600) as proxy, RawClient.to(proxy.origin) as client:
        broker.waiting = pending_authorization()
        authorization = AuthorizationSettings(wait=0.01, cold_start=False)
        proxy.forwarder.configure(limits=LimitSettings(), authorization=authorization, several=False)
        client.post(CALL)
        assert broker.waiting.link in (await client.answer()).body.decode()


# Draining


async def test_draining_waits_for_calls_and_ends_what_only_waits() -> None:
    async def script(peer: Peer) -> None:
        if (await peer.request()).startswith(b"GET"):
            await peer.send(EVENTS)
            await peer.until_gone()
        else:
            await gate.wait()
            await peer.send(ok(b"{}"))

    gate = asyncio.Event()
    broker = ScriptedBroker(access_token(1))
    async with (
        RawServer(script) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as listener,
        RawClient.to(proxy.origin) as caller,
        RawClient.to(proxy.origin) as held,
    ):
        forwarder = proxy.forwarder
        listener.get()
        await listener.head()
        caller.post(CALL)
        await until(lambda: len(upstream.requests) == 2, "two requests")
        broker.waiting, broker.current = pending_authorization(), None
        held.post(CALL)
        await until(lambda: forwarder.active_requests == 3, "three active requests")
        forwarder.drain()
        forwarder.drain()
        idle = asyncio.create_task(forwarder.until_idle(10))
        assert await listener.reader.readexactly(len(END)) == END
        assert broker.waiting.link in (await held.answer()).body.decode()
        assert (forwarder.active_requests, idle.done()) == (1, False)
        gate.set()
        assert (await caller.answer()).body == b"{}"
        await asyncio.wait_for(idle, 5)


async def test_a_request_on_the_fast_path_is_waited_for_too() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await gate.wait()
        await peer.send(ok(b"{}"))
        await peer.until_gone()

    gate = asyncio.Event()
    async with warm(script) as (upstream, proxy, client):
        client.post(CALL)
        await until(lambda: len(upstream.requests) == 2, "two requests")
        assert len(proxy.forwarder.fast_requests) == 1
        idle = asyncio.create_task(proxy.forwarder.until_idle(10))
        proxy.forwarder.drain()
        gate.set()
        assert (await client.answer()).body == b"{}"
        await asyncio.wait_for(idle, 5)


async def test_waiting_for_idle_is_bounded_and_over_at_once_if_nothing_is_active() -> None:
    async with warm(silent) as (_, proxy, client):
        await asyncio.wait_for(proxy.forwarder.until_idle(3600), 5)
        client.post(CALL)
        await until(lambda: proxy.forwarder.active_requests == 1, "an active request")
        await proxy.forwarder.until_idle(0.01)
        assert proxy.forwarder.active_requests == 1


async def test_a_stream_that_opens_while_the_proxy_drains_ends_at_once() -> None:
    gate = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await gate.wait()
        await peer.send(EVENTS)
        await peer.until_gone()

    async with (
        RawServer(script) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        body = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "subscriptions/listen"}).encode()
        client.post(body)
        await until(lambda: upstream.requests, "a request")
        proxy.forwarder.drain()
        assert proxy.forwarder.active_requests == 1, "before its head nobody knows that it only listens"
        gate.set()
        answer = await client.answer()
        assert (answer.status, answer.body, answer.ended) == (200, b"", True)


async def test_once_everything_was_ended_a_new_request_is_ended_too() -> None:
    async with (
        RawServer(silent) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        proxy.forwarder.end_all()
        client.post(CALL)
        answer = await client.answer()
        assert (answer.status, json.loads(answer.body)["id"]) == (503, 9)
        assert proxy.forwarder.active_requests == 0


async def test_ending_all_does_not_wait_for_the_end_of_the_drain() -> None:
    async with warm(silent) as (_, proxy, client):
        client.post(CALL)
        await until(lambda: proxy.forwarder.active_requests == 1, "an active request")
        idle = asyncio.create_task(proxy.forwarder.until_idle(3600))
        await asyncio.sleep(0)
        proxy.forwarder.end_all()
        await asyncio.wait_for(idle, 5)
        assert (await client.answer()).status == 503


# Servers that are removed


async def test_a_removed_server_ends_its_calls_and_streams_on_the_fast_path() -> None:
    for script, begun in ((silent, False), (stream, True)):
        async with warm(script) as (upstream, proxy, client):
            client.post(CALL)
            await until(lambda up=upstream: len(up.requests) == 2, "two requests")  # type: ignore[misc]
            if begun:
                await client.head()
            proxy.forwarder.servers_changed({"other"}, {"notes"})
            assert len(proxy.forwarder.fast_requests) == 1, "a changed server is served to the end"
            proxy.forwarder.servers_changed({"notes"}, ())
            if begun:
                assert await client.reader.readexactly(len(END)) == END
            else:
                answer = await client.answer()
                assert (answer.status, json.loads(answer.body)["id"]) == (503, 9)
                assert "no longer configured" in answer.body.decode()
            await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)
            await until(lambda p=proxy: p.forwarder.active_requests == 0, "no active request")  # type: ignore[misc]


@pytest.mark.parametrize("content_length", [True, False], ids=["length", "chunks"])
async def test_a_response_that_is_cut_short_by_the_end_is_not_taken_for_a_whole_one(content_length: bool) -> None:
    framing = b"Content-Length: 99" if content_length else b"Transfer-Encoding: chunked"

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%s\r\n\r\n2\r\n: \r\n" % framing)
        await peer.until_gone()

    async with warm(script) as (_, proxy, client):
        client.post(CALL)
        await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.readuntil(b": ")
        proxy.forwarder.end_all()
        rest = await (client.rest() if content_length else client.reader.readuntil(END))
        assert rest.endswith(END) is not content_length
        assert proxy.forwarder.active_requests == 0


# Races


@pytest.mark.parametrize(
    "end",
    [
        lambda proxy: proxy.forwarder.end_all(),
        lambda proxy: proxy.forwarder.servers_changed({"notes"}, ()),
    ],
    ids=["shut down", "removed"],
)
async def test_an_end_between_a_401_and_the_handler_that_goes_on_leaves_nobody_without_an_answer(
    end: Callable[[ForwardingServer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = ScriptedBroker(access_token(1), [access_token(2)])
    async with warm(answers(CHALLENGE, ok(b"{}")), broker) as (_, proxy, client):
        fall_back = proxy.forwarder.fall_back
        recorded: list[int] = []

        def fall_back_then_end(fast: FastPathRequest) -> None:
            fall_back(fast)
            end(proxy)

        def note(route: Route, request: ClientRequest, *rest: Any, **more: Any) -> None:
            recorded.append(request.status)
            record(route, request, *rest, **more)

        record = proxy.forwarder.record
        monkeypatch.setattr(proxy.forwarder, "fall_back", fall_back_then_end)
        monkeypatch.setattr(proxy.forwarder, "record", note)
        client.post(CALL)
        answer = await client.answer()
        await until(lambda: proxy.forwarder.active_requests == 0, "no active request")
    assert (answer.status, json.loads(answer.body)["id"], answer.ended) == (503, 9, True)
    assert recorded == [503], "counted once"


async def test_a_client_that_leaves_between_a_401_and_the_handler_is_not_served() -> None:
    broker = ScriptedBroker(access_token(1), [access_token(2)])
    async with warm(answers(CHALLENGE, ok(b"{}")), broker) as (upstream, proxy, client):
        fall_back = proxy.forwarder.fall_back

        def leave(fast: FastPathRequest) -> None:
            fast.request.disconnect()
            fall_back(fast)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proxy.forwarder, "fall_back", leave)
            client.post(CALL)
            await until(lambda: len(upstream.requests) == 2, "two requests")
            await until(lambda: proxy.forwarder.active_requests == 0, "no active request")
        assert broker.challenges == []


# The access log


async def test_each_request_is_logged_once_whichever_path_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    broker = ScriptedBroker(access_token(1), [access_token(2)])
    with caplog.at_level(logging.DEBUG, "mcp_auth_proxy"):
        async with warm(answers(ok(b"fast"), CHALLENGE, ok(b"again")), broker) as (_, _, client):
            for body in (b"fast", b"again"):
                client.post(CALL)
                assert (await client.answer()).body == body
    lines = [record.getMessage() for record in caplog.records if "access" in record.name]
    assert len(lines) == 3
