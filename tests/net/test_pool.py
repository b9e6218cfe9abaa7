"""Requests over kept connections: reuse, bounds, faults of the upstream, cancelling. Real sockets throughout."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy.errors import UpstreamPoolTimeout, UpstreamProtocolError, UpstreamTimeout, UpstreamUnreachable
from mcp_auth_proxy.net import pool as pool_module
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_connection import StaleConnection
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.net.pool import ConnectionPool
from mcp_auth_proxy.net.urls import Origin, parse


class Client:
    """An HttpClient, and short ways to ask one server."""

    def __init__(self, limit: int = 10) -> None:
        self.upstream = HttpClient(Dialer(environ={}), connections_per_origin=limit)

    async def send(
        self, server: RawServer | Origin, body: bytes = b"", *, method: bytes = b"POST", timeout: float = 5.0
    ) -> Response:
        origin = server if isinstance(server, Origin) else parse(server.url).origin
        head = b"%s /mcp HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % (method, len(body))
        return await self.upstream.send(origin, head, body, method=method, head_timeout=timeout)

    async def ask(self, server: RawServer, body: bytes = b"", *, method: bytes = b"POST") -> bytes:
        """Return the whole body of the response."""
        response = await self.send(server, body, method=method)
        whole = b""
        while not response.complete:
            whole += await response.read()
        return whole

    def pool(self, server: RawServer) -> ConnectionPool:
        pool = self.upstream.pool(parse(server.url).origin)
        assert pool is not None
        return pool


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    await client.upstream.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_requests_in_turn_share_one_connection(client: Client) -> None:
    async with RawServer(answers(ok(b"a"), ok(b"b"), ok(b"c"))) as server:
        assert [await client.ask(server, b"x") for _ in range(3)] == [b"a", b"b", b"c"]
        assert len(server.peers) == 1
        assert server.requests[0] == b"POST /mcp HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\n\r\nx"


async def test_requests_at_once_have_connections_of_their_own_and_the_latest_is_used_next(client: Client) -> None:
    async def script(peer: Peer) -> None:
        while True:
            number = server.peers.index(peer)
            await peer.request()
            await gate.wait()
            await peer.send(ok(b"%d" % number))

    gate = asyncio.Event()
    async with RawServer(script) as server:
        asking = [asyncio.create_task(client.ask(server)) for _ in range(3)]
        await until(lambda: len(server.requests) == 3)
        gate.set()
        assert sorted(await asyncio.gather(*asking)) == [b"0", b"1", b"2"]
        assert client.pool(server).idle == 3
        first = await client.ask(server)
        assert await client.ask(server) == first


async def test_a_connection_closed_while_idle_fails_no_request(client: Client) -> None:
    # F14
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())

    async with RawServer(script) as server:
        await client.ask(server)
        await until(lambda: client.pool(server).idle == 0)
        assert client.pool(server).open == 0
        assert await client.ask(server) == b"hi"


@pytest.mark.parametrize("end", ["close", "reset", "surplus"])
def test_a_close_that_the_event_loop_has_not_yet_seen_is_noticed_before_use(end: str) -> None:
    # F14, the narrow case: the upstream closes while we are busy, and the next request comes before the loop has
    # read the end of the connection. Two loops in turn, so that the first can't notice.
    ours, theirs = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok(b"%d" % len(server.peers)))
        if len(server.peers) > 1:
            await peer.until_gone()
        await gate.wait()
        if end == "reset":
            peer.reset()
        elif end == "surplus":
            await peer.send(ok(b"smuggled"))
            await peer.until_gone()

    def both(asking: asyncio.Task[bytes]) -> bytes:
        while not asking.done():
            theirs.run_until_complete(asyncio.sleep(0.001))
            ours.run_until_complete(asyncio.sleep(0.001))
        return asking.result()

    async def start() -> Client:
        return Client()

    gate = asyncio.Event()
    server = RawServer(script)
    theirs.run_until_complete(server.__aenter__())
    client = ours.run_until_complete(start())
    assert both(ours.create_task(client.ask(server))) == b"1"
    assert client.pool(server).idle == 1
    gate.set()
    theirs.run_until_complete(asyncio.sleep(0.05))
    # The loop takes ready tasks before it polls, so the request looks at the socket first.
    assert both(ours.create_task(client.ask(server))) == b"2"
    assert len(server.requests) == 2
    ours.run_until_complete(client.upstream.aclose())
    theirs.run_until_complete(server.__aexit__())
    ours.close()
    theirs.close()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("method", "again"), [(b"GET", True), (b"DELETE", True), (b"HEAD", True), (b"POST", False)])
async def test_a_reused_connection_that_closes_during_a_request_is_replaced_only_if_repeating_is_safe(
    client: Client, reset: bool, method: bytes, again: bool
) -> None:
    # F5: it may have been acted upon.
    async def script(peer: Peer) -> None:
        if len(server.peers) == 1:
            await peer.request()
            await peer.send(ok())
        await peer.request()
        if len(server.peers) == 1:
            if reset:
                peer.reset()
            return
        await peer.send(ok(b""))

    async with RawServer(script) as server:
        await client.ask(server)
        if again:
            assert (await client.send(server, method=method)).status == 200
        else:
            with pytest.raises(UpstreamProtocolError, match=rf"127\.0\.0\.1:{server.port}: .*without an answer"):
                await client.send(server, method=method)
        assert len(server.requests) == (3 if again else 2)


@pytest.mark.parametrize("method", [b"GET", b"POST"])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nConte"])
async def test_a_request_on_a_new_connection_is_never_repeated(client: Client, method: bytes, answer: bytes) -> None:
    # F5
    async def script(peer: Peer) -> None:
        await peer.request()
        if answer:
            await peer.send(answer)

    async with RawServer(script) as server:
        with pytest.raises(UpstreamProtocolError):
            await client.send(server, b"{}", method=method)
        assert len(server.requests) == 1
        assert client.pool(server).open == 0


async def test_a_response_that_is_reset_ends_in_an_error_after_the_bytes_that_arrived(client: Client) -> None:
    # F4
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await gate.wait()
        peer.reset()

    gate = asyncio.Event()
    async with RawServer(script) as server:
        response = await client.send(server)
        assert await response.read() == b"hello"
        gate.set()
        with pytest.raises(UpstreamProtocolError, match="in the middle of the response"):
            await response.read()
        assert len(server.requests) == 1


async def test_smuggled_bytes_never_answer_another_request(client: Client) -> None:
    # T37
    async with RawServer(answers(ok(b"a") + ok(b"smuggled"), ok(b"c"))) as server:
        assert await client.ask(server) == b"a"
        assert await client.ask(server) == b"a"
        assert len(server.peers) == 2


async def test_events_are_passed_on_as_they_arrive(client: Client) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            await next_one.wait()
            next_one.clear()
            await peer.send(b"7\r\ndata: x\r\n")
        await peer.send(b"0\r\n\r\n")
        await peer.until_gone()

    next_one = asyncio.Event()
    async with RawServer(script) as server:
        response = await client.send(server)
        for _ in range(3):
            next_one.set()
            assert await response.read() == b"data: x"
        assert await response.read() == b""
        assert response.complete
        assert client.pool(server).idle == 1


async def test_the_buffer_for_a_slow_reader_is_bounded(client: Client) -> None:
    # T39
    pushed = 0

    async def script(peer: Peer) -> None:
        nonlocal pushed
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while pushed < total:
            await peer.send(b"x" * 65_536)
            pushed += 65_536
        await peer.until_gone()

    total = 64 * 1024 * 1024
    async with RawServer(script) as server:
        response = await client.send(server)
        before = -1
        while before != pushed:
            before = pushed
            await asyncio.sleep(0.05)
        # Most of the rest waits in the kernel and at the server.
        assert pushed < total // 2
        chunk = await response.read()
        assert len(chunk) <= 2 * 65_536
        size = len(chunk)
        while not response.complete:
            chunk = await response.read()
            assert len(chunk) <= 2 * 65_536
            size += len(chunk)
        assert size == total


@pytest.mark.parametrize("waiting_for", ["head", "body"])
async def test_cancelling_closes_the_upstream_at_once(client: Client, waiting_for: str) -> None:
    # T40
    async def script(peer: Peer) -> None:
        await peer.request()
        if waiting_for == "body":
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        await peer.until_gone()

    async with RawServer(script) as server:
        asking = asyncio.create_task(client.ask(server))
        await until(lambda: len(server.requests) == 1)
        await asyncio.sleep(0.01)
        asking.cancel()
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert client.pool(server).open == 0


async def test_closing_a_response_closes_the_upstream_at_once(client: Client) -> None:
    # T40
    async with RawServer(answers(b"HTTP/1.1 200 OK\r\n\r\nhi")) as server:
        response = await client.send(server)
        response.close()
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()


async def test_a_head_that_does_not_come_is_a_timeout_and_closes(client: Client) -> None:
    async with RawServer(answers(b"HTTP/1.1 200 OK\r\nX: ")) as server:
        with pytest.raises(UpstreamTimeout, match=r"no answer within 0\.05 s"):
            await client.send(server, timeout=0.05)
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pool_module, "POOL_TIMEOUT", 0.1)
    yield


@pytest.mark.usefixtures("short_wait")
async def test_connections_to_an_origin_are_bounded_and_so_is_waiting_for_one() -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await gate.wait()
            await peer.send(ok())

    gate = asyncio.Event()
    client = Client(limit=2)
    async with RawServer(script) as server:
        holding = [asyncio.create_task(client.ask(server)) for _ in range(2)]
        await until(lambda: len(server.requests) == 2)
        with pytest.raises(
            UpstreamPoolTimeout, match=r"All 2 connections to 127\.0\.0\.1:\d+ are in use.*upstream_connections"
        ):
            await client.ask(server)
        waiting = [asyncio.create_task(client.ask(server)) for _ in range(5)]
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*holding, *waiting) == [b"hi"] * 7
        assert len(server.peers) == 2
        await client.upstream.aclose()


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("end", ["abandoned", "broken", "cancelled"])
async def test_a_slot_is_released_however_the_connection_ends(end: str) -> None:
    async def script(peer: Peer) -> None:
        if len(server.peers) == 1:
            await peer.request()
            await gate.wait()
            if end != "broken":
                await peer.until_gone()
            return
        while True:
            await peer.request()
            await peer.send(ok())

    gate = asyncio.Event()
    client = Client(limit=1)
    async with RawServer(script) as server:
        first = asyncio.create_task(client.ask(server))
        await until(lambda: len(server.requests) == 1)
        waiting = [asyncio.create_task(client.ask(server)) for _ in range(3)]
        await asyncio.sleep(0)
        if end == "cancelled":
            waiting[0].cancel()
        gate.set()
        if end != "broken":
            first.cancel()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert results[-2:] == [b"hi", b"hi"]
        assert client.pool(server).open == 1
        await client.upstream.aclose()


async def test_a_connection_is_not_used_after_its_announced_idle_timeout(client: Client) -> None:
    response = b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=1\r\nContent-Length: 1\r\n\r\na"
    async with RawServer(answers(response, response)) as server:
        assert [await client.ask(server), await client.ask(server)] == [b"a", b"a"]
        assert len(server.peers) == 2


async def test_shorter_idle_timeouts_are_learned_and_forgotten_again(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with RawServer(answers(ok(), ok(), ok())) as server:
        await client.ask(server)
        client.pool(server).learn_idle_timeout(0.0)
        await client.ask(server)
        assert len(server.peers) == 2
        monkeypatch.setattr(pool_module, "LEARNED_BRIEFLY", -1.0)
        client.pool(server).learn_idle_timeout(0.0)
        await client.ask(server)
        assert len(server.peers) == 2


@pytest.mark.parametrize("callers", [1, 8])
@pytest.mark.parametrize("reset", [False, True])
async def test_connections_are_reused_as_before_after_closes_that_crossed_a_request(
    client: Client, callers: int, reset: bool
) -> None:
    # F14: a restart of the server, which closes each connection just as its next request is sent.
    async def script(peer: Peer) -> None:
        old = len(server.peers) <= callers
        await peer.request()
        await arrived.wait()
        await peer.send(ok())
        while True:
            await peer.request()
            if old:
                if reset:
                    peer.reset()
                return
            await peer.send(ok())

    async def call(times: int) -> None:
        for _ in range(times):
            assert await client.ask(server) == b"hi"

    arrived = asyncio.Event()
    async with RawServer(script) as server:
        first = [asyncio.create_task(client.ask(server)) for _ in range(callers)]
        await until(lambda: len(server.requests) == callers)
        arrived.set()
        await asyncio.gather(*first)
        crossed = await asyncio.gather(*(client.ask(server) for _ in range(callers)), return_exceptions=True)
        assert [type(result) for result in crossed] == [StaleConnection] * callers
        await asyncio.gather(*(call(200 // callers) for _ in range(callers)))
        assert len(server.peers) <= 2 * callers


async def test_a_close_that_crosses_a_request_now_and_then_is_no_idle_timeout(client: Client) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(20):
            await peer.request()
            await peer.send(ok())
        await peer.request()

    async with RawServer(script) as server:
        for _ in range(10):
            assert [await client.ask(server) for _ in range(20)] == [b"hi"] * 20
            with pytest.raises(StaleConnection):
                await client.ask(server)
        assert len(server.peers) == 10


async def test_a_server_that_closes_each_connection_at_its_second_request_is_learned(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await peer.request()

    monkeypatch.setattr(pool_module, "LEARNED_SHARE", 0.0)
    async with RawServer(script) as server:
        for _ in range(2):
            assert await client.ask(server) == b"hi"
            with pytest.raises(StaleConnection):
                await client.ask(server)
        assert [await client.ask(server) for _ in range(20)] == [b"hi"] * 20


@pytest.mark.parametrize("crossing", [False, True])
async def test_an_idle_timeout_of_a_second_is_learned_from_one_close(client: Client, crossing: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        if crossing:
            await peer.request()
        else:
            await asyncio.sleep(idle)

    idle = 0.6
    async with RawServer(script) as server:
        await client.ask(server)
        if crossing:
            await asyncio.sleep(idle)
            with pytest.raises(StaleConnection):
                await client.ask(server)
        else:
            await until(lambda: client.pool(server).open == 0)
        await client.ask(server)
        kept = client.pool(server).idle_since
        assert kept is not None
        await asyncio.sleep(idle * 0.85)
        assert client.upstream.idle_connection(parse(server.url).origin) is None


async def test_idle_connections_are_closed_after_their_idle_timeout(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "REAP_INTERVAL", 0.02)
    async with RawServer(answers(ok())) as server:
        await client.ask(server)
        client.pool(server).learn_idle_timeout(0.0)
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()
        assert client.pool(server).open == 0


async def test_closing_ends_everything_at_once(client: Client) -> None:
    async with RawServer(answers(b"HTTP/1.1 200 OK\r\n\r\nhi")) as server:
        response = await client.send(server)
        await client.upstream.aclose()
        assert await response.read() == b"hi"
        with pytest.raises(UpstreamProtocolError, match="shutting down"):
            await response.read()
        async with asyncio.timeout(5):
            await server.peers[0].gone.wait()
        with pytest.raises((UpstreamPoolTimeout, UpstreamUnreachable)):
            await client.send(server)


async def test_pools_of_two_origins_share_nothing(client: Client) -> None:
    # T49: a connection belongs to one origin.
    async with RawServer(answers(ok(b"a"))) as one, RawServer(answers(ok(b"b"))) as two:
        assert [await client.ask(one), await client.ask(two)] == [b"a", b"b"]
        assert (client.pool(one).open, client.pool(two).open) == (1, 1)
