"""The pools of all upstreams together: their limit, their numbers, their end. More of one pool in test_pool.py."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes.proxy import until
from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy.errors import UpstreamPoolTimeout, UpstreamProtocolError
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.net.pool import ConnectionPool
from mcp_auth_proxy.net.urls import Origin, parse

CLOSES = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"


@asynccontextmanager
async def http_client(limit: int = 10) -> AsyncIterator[HttpClient]:
    client = HttpClient(Dialer(environ={}), connections_per_origin=limit)
    try:
        yield client
    finally:
        await client.aclose()


def origin(server: RawServer) -> Origin:
    return parse(server.url).origin


async def send(client: HttpClient, server: RawServer, method: bytes = b"POST") -> Response:
    head = b"%s /mcp HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n" % method
    return await client.send(origin(server), head, method=method, head_timeout=5.0)


async def ask(client: HttpClient, server: RawServer) -> bytes:
    response = await send(client, server)
    body = b""
    while not response.complete:
        body += await response.read()
    return body


async def silent(peer: Peer) -> None:
    await peer.request()
    await peer.until_gone()


async def test_an_origin_has_no_idle_connection_before_its_first_request_and_one_after_it() -> None:
    async with RawServer(answers(ok(), ok())) as server, http_client() as client:
        assert (client.pool(origin(server)), client.idle_connection(origin(server))) == (None, None)
        assert await ask(client, server) == b"hi"
        assert client.idle_connection(origin(server)) is not None
        assert client.idle_connection(origin(server)) is None


async def test_connections_are_numbered_by_origin_and_state() -> None:
    async with RawServer(silent) as busy, RawServer(answers(ok())) as idle, http_client() as client:
        assert client.connections() == {}
        waiting = [asyncio.create_task(send(client, busy)) for _ in range(2)]
        await ask(client, idle)
        await until(lambda: len(busy.requests) == 2, "two requests")
        assert client.connections() == {
            (origin(busy).serialized, "active"): 2,
            (origin(busy).serialized, "idle"): 0,
            (origin(idle).serialized, "active"): 0,
            (origin(idle).serialized, "idle"): 1,
        }
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: (origin(busy).serialized, "active") not in client.connections(), "no connection")


async def test_closing_ends_what_is_under_way_and_what_waits_and_refuses_what_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with RawServer(silent) as server, RawServer(answers(ok())) as other, http_client(limit=1) as client:
        under_way = asyncio.create_task(send(client, server))
        await until(lambda: server.requests, "a request")
        waiting = asyncio.create_task(send(client, server))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(UpstreamProtocolError, match="shutting down"):
            await under_way
        with pytest.raises(UpstreamPoolTimeout, match="shutting down"):
            await waiting
        with pytest.raises(UpstreamPoolTimeout, match="shutting down"):
            await ask(client, other)
        await asyncio.wait_for(server.peers[0].gone.wait(), 5)


# A changed limit


async def test_a_higher_limit_holds_for_pools_that_there_are_and_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_auth_proxy.net.pool.POOL_TIMEOUT", 0.05)
    async with RawServer(silent) as server, RawServer(silent) as other, http_client(limit=1) as client:
        first = asyncio.create_task(send(client, server))
        await until(lambda: server.requests, "a request")
        with pytest.raises(UpstreamPoolTimeout):
            await send(client, server)
        client.set_limit(2)
        rest = [asyncio.create_task(send(client, one)) for one in (server, other, other)]
        await until(lambda: (len(server.requests), len(other.requests)) == (2, 2), "two requests each")
        with pytest.raises(UpstreamPoolTimeout, match="All 2 connections"):
            await send(client, other)
        for task in (first, *rest):
            task.cancel()
        await asyncio.gather(first, *rest, return_exceptions=True)


async def test_a_lower_limit_is_reached_as_connections_close_though_others_wait() -> None:
    gates = [asyncio.Event() for _ in range(2)]

    async def script(peer: Peer) -> None:
        await peer.request()
        number = server.peers.index(peer)
        if number < 2:
            await gates[number].wait()
        await peer.send(CLOSES)

    async with RawServer(script) as server, http_client(limit=2) as client:
        held = [asyncio.create_task(ask(client, server)) for _ in range(2)]
        await until(lambda: len(server.requests) == 2, "two requests")
        waiting = [asyncio.create_task(ask(client, server)) for _ in range(2)]
        await asyncio.sleep(0)
        client.set_limit(1)
        gates[0].set()
        await until(lambda: any(task.done() for task in held), "the end of one")
        pool = client.pool(origin(server))
        assert pool is not None
        assert pool.open == 1
        assert not any(task.done() for task in waiting)
        gates[1].set()
        assert await asyncio.gather(*held, *waiting) == [b"hi"] * 4
        assert len(server.peers) == 4


async def test_all_pools_share_a_limit_and_idle_connections_make_room() -> None:  # T83
    async with (
        RawServer(answers(ok())) as server,
        RawServer(silent) as other,
        RawServer(silent) as third,
        http_client() as client,
    ):
        client.set_limit(10, 2)
        assert await ask(client, server) == b"hi"
        waiting: list[asyncio.Task[Response]] = []
        for silent_server in (other, third):  # the second one gets the place of the idle connection
            waiting.append(asyncio.create_task(send(client, silent_server)))
            await until(lambda: silent_server.requests, "a request")  # noqa: B023
            assert sum(client.connections().values()) == 2
        pool = client.pool(origin(server))
        assert pool is not None
        assert pool.open == 0
        for full in (server, other):
            with pytest.raises(UpstreamPoolTimeout, match="All 2 connections that the process may open"):
                await send(client, full)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert await ask(client, server) == b"hi"


# Races: what is handed over just as the wait for it ends


@pytest.mark.parametrize("closes", [False, True], ids=["connection", "slot"])
async def test_what_is_handed_to_a_request_that_is_cancelled_meanwhile_is_not_lost(
    closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await gate.wait()
        await peer.send(CLOSES if closes else ok())
        await peer.request()
        await peer.send(ok())

    async with RawServer(script) as server, http_client(limit=1) as client:
        holding = asyncio.create_task(ask(client, server))
        await until(lambda: server.requests, "a request")
        waiting = asyncio.create_task(ask(client, server))
        await asyncio.sleep(0)
        name = "_release_slot" if closes else "connection_released"
        hand_over = getattr(ConnectionPool, name)
        with monkeypatch.context() as patch:

            def hand_over_then_cancel(pool: ConnectionPool, *arguments: object) -> None:
                hand_over(pool, *arguments)
                waiting.cancel()

            patch.setattr(ConnectionPool, name, hand_over_then_cancel)
            gate.set()
            assert await holding == b"hi"
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert await asyncio.wait_for(ask(client, server), 5) == b"hi"


async def test_a_server_that_ends_without_reading_a_request_shows_it_by_a_reset() -> None:
    async def unread(peer: Peer) -> None:
        peer.reset()

    async def read(peer: Peer) -> None:
        await peer.request()

    found = []
    for script in (unread, read):
        async with RawServer(script) as server, http_client() as client:
            with pytest.raises(UpstreamProtocolError) as caught:
                await send(client, server)
            found.append(caught.value.reset)
    assert found == [True, False]
