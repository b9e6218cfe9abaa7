"""A request as a handler sees it, and how its response reaches the client: over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from fakes.listener import listener
from fakes.proxy import until, wait_until_stable
from fakes.raw_client import RawClient
from mcp_auth_proxy.errors import BodyTooLarge, ClientDisconnected, McpAuthProxyError, Overloaded
from mcp_auth_proxy.net.client_request import ClientRequest, Serve

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH_2 = (b"content-length", b"2")
Headers = list[tuple[bytes, bytes]]


class Requests:
    """Serve each request with one coroutine, unless the fast path answers it."""

    def __init__(self, serve: Serve, fast_path: Callable[[ClientRequest], bool]) -> None:
        self._serve = serve
        self._fast_path = fast_path

    def try_fast_path(self, request: ClientRequest) -> bool:
        return self._fast_path(request)

    async def serve(self, request: ClientRequest) -> None:
        await self._serve(request)


class Client(RawClient):
    async def piece(self) -> bytes:
        """Return the next bytes of a response as soon as there are some; ``b""`` at the end of the connection."""
        return await asyncio.wait_for(self.reader.read(65536), 5)


async def never(request: ClientRequest) -> None:
    raise AssertionError("a task was started")


@asynccontextmanager
async def client_of(
    serve: Serve = never, fast_path: Callable[[ClientRequest], bool] = lambda request: False, buffer: int | None = None
) -> AsyncIterator[Client]:
    """Connect to a listener whose requests are served by ``serve``."""
    async with (
        listener(Requests(serve, fast_path)) as port,
        Client.to(f"http://127.0.0.1:{port}", buffer=buffer) as client,
    ):
        yield client


def responding(*parts: bytes, headers: Headers | None = None, status: int = 200) -> Serve:
    """Return a handler that sends a head and these parts of a body."""

    async def serve(request: ClientRequest) -> None:
        await request.start(status, headers or [])
        for part in parts[:-1]:
            await request.write(part)
        await request.write(parts[-1], last=True)

    return serve


# What is sent


async def test_head_and_body_arrive_in_one_piece() -> None:
    async with client_of(responding(b"ok", headers=[(b"x", b"y"), LENGTH_2])) as client:
        client.send(GET)
        assert await client.piece() == b"HTTP/1.1 200 OK\r\nx: y\r\ncontent-length: 2\r\n\r\nok"


async def test_an_empty_part_sends_the_head_ahead_of_a_slow_body() -> None:
    arrived = asyncio.Event()

    async def serve(request: ClientRequest) -> None:
        await request.start(200, [])
        await request.write(b"")
        await arrived.wait()
        await request.write(b"abc")
        await request.write(b"", last=True)

    async with client_of(serve) as client:
        client.send(GET)
        assert await client.piece() == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        arrived.set()
        rest = await client.piece()
        while not rest.endswith(b"0\r\n\r\n"):
            rest += await client.piece()
        assert rest == b"3\r\nabc\r\n0\r\n\r\n"


async def test_a_connection_carries_one_response_after_the_other() -> None:
    async with client_of(responding(b"ok", headers=[LENGTH_2])) as client:
        for _ in range(3):
            client.send(GET)
            assert (await client.piece()).endswith(b"\r\n\r\nok")


async def test_a_response_to_head_keeps_its_length_and_has_no_body() -> None:
    async with client_of(responding(b"not sent", headers=[(b"content-length", b"700")])) as client:
        for _ in range(2):
            client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await client.piece() == b"HTTP/1.1 200 OK\r\ncontent-length: 700\r\n\r\n"


@pytest.mark.parametrize("status", [204, 304])
async def test_a_response_that_has_no_body_gets_no_framing(status: int) -> None:
    async with client_of(responding(b"", status=status)) as client:
        for _ in range(2):
            client.send(GET)
            head = await client.piece()
            assert head.endswith(b"\r\n\r\n")
            assert head.count(b"\r\n") == 2


async def test_a_304_may_have_the_length_of_a_body_that_it_does_not_send() -> None:
    async with client_of(responding(b"", headers=[(b"content-length", b"700")], status=304)) as client:
        for _ in range(2):
            client.send(GET)
            assert await client.piece() == b"HTTP/1.1 304 Not Modified\r\ncontent-length: 700\r\n\r\n"


async def test_a_client_of_http_1_0_sees_the_end_of_the_connection() -> None:
    async with client_of(responding(b"ok", headers=[LENGTH_2])) as client:
        client.send(GET.replace(b"1.1", b"1.0"))
        assert await client.rest() == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async with client_of(responding(b"a", b"bc")) as client:
        client.send(GET.replace(b"1.1", b"1.0"))
        assert await client.rest() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"


async def test_a_handler_may_close_the_connection() -> None:
    async def serve(request: ClientRequest) -> None:
        request.keep_alive = False
        request.respond(200, [], b"ok")

    async with client_of(serve) as client:
        client.send(GET)
        assert await client.rest() == b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("parts", "headers"),
    [
        ([b"too long"], [LENGTH_2]),
        ([b"1"], [LENGTH_2]),
        ([b""], [(b"x", b"a\r\nset-cookie: b")]),
        ([b""], [(b"x\n", b"a")]),
        ([b""], [(b"x", b"a\0")]),
    ],
    ids=["too long", "too short", "line break", "line break in a name", "NUL"],
)
async def test_nothing_of_an_invalid_response_reaches_the_client(parts: list[bytes], headers: Headers) -> None:
    async with client_of(responding(*parts, headers=headers)) as client:
        client.send(GET)
        assert await client.rest() == b""


async def test_calls_out_of_order_are_errors() -> None:
    errors: list[str] = []

    async def serve(request: ClientRequest) -> None:
        def refused(call: Callable[[], None]) -> None:
            with pytest.raises(RuntimeError) as caught:
                call()
            errors.append(str(caught.value))

        refused(lambda: request.write_nowait(b"a"))
        request.start_nowait(200, [LENGTH_2])
        refused(lambda: request.start_nowait(200, []))
        request.write_nowait(b"ok", last=True)
        refused(lambda: request.write_nowait(b"more"))

    async with client_of(serve) as client:
        client.send(GET)
        assert (await client.answer()).body == b"ok"
        await until(lambda: len(errors) == 3)


# Responses at once


@pytest.mark.parametrize("in_a_task", [True, False])
async def test_a_whole_response_gets_its_length(in_a_task: bool) -> None:
    def respond(request: ClientRequest) -> bool:
        request.respond(200, [(b"x", b"y")], b"ok")
        return True

    async def serve(request: ClientRequest) -> None:
        respond(request)

    async with client_of(serve) if in_a_task else client_of(fast_path=respond) as client:
        for method, body in ((b"GET", b"ok"), (b"HEAD", b""), (b"GET", b"ok")):
            client.send(method + GET[3:])
            assert await client.piece() == b"HTTP/1.1 200 OK\r\nx: y\r\ncontent-length: 2\r\n\r\n" + body


async def test_very_many_pipelined_requests_may_be_answered_at_once() -> None:
    def respond(request: ClientRequest) -> bool:
        request.respond(204, [], b"")
        return True

    async with client_of(fast_path=respond) as client:
        client.send(GET * 3000)
        for _ in range(2000):
            assert (await client.answer()).status == 204


@pytest.mark.parametrize("headers", [[(b"x", b"a\r\nset-cookie: b")], [(b"content-length", b"3")]])
async def test_an_invalid_whole_response_closes_the_connection_and_raises_nothing(headers: Headers) -> None:
    def respond(request: ClientRequest) -> bool:
        request.respond(200, headers, b"ok")
        return True

    async with client_of(fast_path=respond) as client:
        client.send(GET)
        assert await client.rest() == b""


async def test_a_request_of_the_fast_path_may_be_left_to_a_coroutine() -> None:
    async def finish(request: ClientRequest) -> None:
        request.respond(200, [], request.peek_body() + await request.body(10, lambda size: True) + request.peek_body())

    def leave(request: ClientRequest) -> bool:
        request.run(finish)
        return True

    async with client_of(fast_path=leave) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
        assert (await client.answer()).body == b"hihi"


async def test_only_requests_that_are_complete_are_offered_to_the_fast_path() -> None:
    offered: list[bytes] = []

    def respond(request: ClientRequest) -> bool:
        offered.append(request.method)
        request.respond(204, [], b"")
        return True

    async with client_of(responding(b"ok", headers=[LENGTH_2]), respond) as client:
        client.send(CHUNKED)
        assert (await client.head())[0] == 200
    async with client_of(never, respond) as client:
        client.send(GET)
        assert (await client.head())[0] == 204
    assert offered == [b"GET"]


# What a handler leaves unfinished


async def leave_undone(request: ClientRequest) -> None:
    pass


async def fail(request: ClientRequest) -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize("serve", [leave_undone, fail])
async def test_a_request_that_nobody_answers_is_a_500(serve: Serve) -> None:
    async with client_of(serve) as client:
        client.send(GET)
        answer = await client.answer()
        assert (answer.status, answer.body) == (500, b"Internal Server Error")
        assert await client.rest() == b""


@pytest.mark.parametrize("then", [leave_undone, fail])
async def test_a_response_that_is_left_unfinished_is_cut_off(then: Serve) -> None:
    async def serve(request: ClientRequest) -> None:
        await request.start(200, [])
        await request.write(b"abc")
        await then(request)

    async with client_of(serve) as client:
        client.send(GET)
        assert not (await client.answer()).ended
        assert await client.rest() == b""


async def test_a_cancelled_handler_closes_the_connection() -> None:
    tasks: list[asyncio.Task[None] | None] = []

    async def serve(request: ClientRequest) -> None:
        tasks.append(asyncio.current_task())
        await request.wait_closed()

    async with client_of(serve) as client:
        client.send(GET)
        await until(lambda: tasks)
        assert tasks[0] is not None
        tasks[0].cancel()
        assert await client.rest() == b""


# The body of a request


async def test_a_body_for_which_there_is_no_memory_is_not_read_to_its_end() -> None:  # T82
    counted: list[int] = []
    ended: list[Exception] = []

    def take(size: int) -> bool:
        counted.append(size)
        return sum(counted) <= 5

    async def serve(request: ClientRequest) -> None:
        try:
            await request.body(100, take)
        except Overloaded as error:
            ended.append(error)
        request.respond(503, [], b"")

    async with client_of(serve) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n12345")
        await until(lambda: counted)
        client.send(b"6")
        await until(lambda: ended)
        assert (await client.answer()).status == 503
    assert (sum(counted), str(ended[0])) == (
        6,
        "The proxy has too much to do: limits.memory is used up. Try again later.",
    )


async def body_within(sent: list[bytes], limit: int) -> bytes | Exception:
    """Send a request in parts, each when the one before has arrived; return what its handler reads."""
    results: list[bytes | Exception] = []
    requests: list[ClientRequest] = []

    async def serve(request: ClientRequest) -> None:
        requests.append(request)
        try:
            results.append(await request.body(limit, lambda size: True))
        except McpAuthProxyError as error:
            results.append(error)

    async with client_of(serve) as client:
        client.send(sent[0])
        await until(lambda: requests)
        for part in sent[1:]:
            client.send(part)
            await client.writer.drain()
        if sent[-1] == b"":
            client.drop()
        await until(lambda: results)
        return results[0]


def sized(length: int, body: bytes = b"") -> bytes:
    return b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (length, body)


@pytest.mark.parametrize(
    "sent",
    [
        [sized(3, b"abc")],
        [sized(3), b"abc"],
        [sized(3, b"a"), b"b", b"c"],
        [CHUNKED, b"2\r\nab\r\n", b"1\r\nc\r\n", b"0\r\n\r\n"],
    ],
    ids=["at once", "apart", "in parts", "chunks"],
)
async def test_a_whole_body_is_returned(sent: list[bytes]) -> None:
    assert await body_within(sent, 3) == b"abc"


async def test_a_request_without_a_body_has_an_empty_one() -> None:
    assert await body_within([GET], 0) == b""


async def test_a_large_body_is_read_even_if_reading_pauses() -> None:
    body = bytes(range(256)) * 20_000
    assert await body_within([sized(len(body), body)], len(body)) == body


@pytest.mark.parametrize(
    "sent",
    [
        [sized(4)],
        [sized(4, b"abcd")],
        [CHUNKED, b"3\r\nabc\r\n1\r\nd\r\n"],
        [CHUNKED + b"4\r\nabcd\r\n0\r\n\r\n"],
    ],
    ids=["announced", "announced and here", "counted", "counted when all is here"],
)
async def test_a_body_over_the_limit_is_refused(sent: list[bytes]) -> None:  # T30
    error = await body_within(sent, 3)
    assert isinstance(error, BodyTooLarge)
    assert error.limit == 3
    assert str(error) == "The request body is over 3 bytes; limits.body allows more."


@pytest.mark.parametrize("sent", [[sized(3), b""], [sized(3, b"ab"), b""], [CHUNKED, b"1\r\na\r\n", b""]])
async def test_a_client_that_disconnects_within_its_body_is_reported(sent: list[bytes]) -> None:
    assert isinstance(await body_within(sent, 3), ClientDisconnected)


async def test_a_body_may_be_read_in_parts() -> None:
    parts: list[bytes] = []

    async def serve(request: ClientRequest) -> None:
        while not parts or parts[-1]:
            parts.append(await request.read())
        request.respond(204, [], b"")

    async with client_of(serve) as client:
        client.send(sized(3, b"a"))
        await until(lambda: parts)
        client.send(b"bc")
        assert (await client.answer()).status == 204
    assert parts == [b"a", b"bc", b""]


EXPECT = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"


async def test_a_client_that_expects_100_continue_gets_it() -> None:
    async def serve(request: ClientRequest) -> None:
        request.respond(200, [], await request.body(5, lambda size: True))

    async with client_of(serve) as client:
        client.send(EXPECT)
        assert await client.piece() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"hello")
        assert (await client.answer()).body == b"hello"
        client.send(EXPECT + b"hello")  # it did not wait
        assert (await client.answer()).body == b"hello"


async def test_100_continue_is_not_sent_for_a_body_over_the_limit() -> None:
    async def serve(request: ClientRequest) -> None:
        with pytest.raises(BodyTooLarge):
            await request.body(4, lambda size: True)
        request.respond(413, [], b"")

    async with client_of(serve) as client:
        client.send(EXPECT)
        assert (await client.answer()).status == 413


# Clients that leave, and clients that do not read


async def test_a_client_that_leaves_is_reported_once() -> None:
    lost: list[str] = []
    served: list[ClientRequest] = []

    async def serve(request: ClientRequest) -> None:
        request.when_disconnected(lambda: lost.append("called"))
        served.append(request)
        await request.wait_closed()
        request.when_disconnected(lambda: lost.append("called at once"))
        await request.write(b"dropped")
        request.respond(200, [], b"dropped")
        lost.append("end")

    async with client_of(serve) as client:
        client.send(GET)
        await until(lambda: served)
        client.drop()
        await until(lambda: len(lost) == 3)
    assert lost == ["called", "called at once", "end"]
    assert (served[0].disconnected, served[0].complete) == (True, False)


async def test_a_client_that_leaves_after_its_response_is_not_reported() -> None:
    lost: list[str] = []
    served: list[ClientRequest] = []

    def respond(request: ClientRequest) -> bool:
        request.when_disconnected(lambda: lost.append("called"))
        request.respond(204, [], b"")
        served.append(request)
        return True

    async with client_of(fast_path=respond) as client:
        client.send(GET)
        assert (await client.answer()).status == 204
    assert (served[0].disconnected, served[0].complete, lost) == (False, True, [])


async def test_writing_waits_for_a_client_that_does_not_read() -> None:
    written = 0

    async def serve(request: ClientRequest) -> None:
        nonlocal written
        await request.start(200, [(b"content-length", b"20000000")])
        for _ in range(20):
            await request.write(b"x" * 1_000_000)
            written += 1
        await request.write(b"", last=True)

    async with client_of(serve, buffer=4096) as client:
        client.send(GET)
        assert (await client.head())[0] == 200
        assert await wait_until_stable(lambda: written) < 15
        assert len(await client.reader.readexactly(20_000_000)) == 20_000_000
        assert written == 20


@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_that_reads_again_is_reported_once(reads: bool) -> None:
    reported: list[bool] = []
    paused = asyncio.Event()

    async def serve(request: ClientRequest) -> None:
        await request.start(200, [])
        while request.may_write:
            request.write_nowait(b"x" * 1_000_000)
        request.on_writable = lambda: reported.append(request.may_write)
        paused.set()
        await request.wait_closed()

    async with client_of(serve, buffer=4096) as client:
        client.send(GET)
        await asyncio.wait_for(paused.wait(), 5)
        assert not reported
        if reads:
            while not reported:
                await client.piece()
        client.drop()
    assert reported == ([True] if reads else [])
