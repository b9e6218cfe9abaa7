"""The listener, asked over raw sockets what no well-behaved client would ask; under asyncio and uvloop."""

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from fakes.proxy import until
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_server import MAX_FIELDS, MAX_HEAD, MIN_BODY_RATE, InboundProtocol

SLOW_AFTER = 0.3
"""Seconds; the protocol's own is too long for a test."""

GOOD = b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclass
class App:
    """Tells each request back as JSON. ``/held`` waits for ``release``, ``/early`` answers before the body is there."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    begun: int = 0
    ended: int = 0
    disconnects: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        self.begun += 1
        path = scope["raw_path"].decode()
        body = b""
        while path != "/early":
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        if path == "/held":
            gone = asyncio.ensure_future(receive())
            released = asyncio.ensure_future(self.release.wait())
            await asyncio.wait([gone, released], return_when=asyncio.FIRST_COMPLETED)
            released.cancel()
            if gone.done():
                self.disconnects += 1
                return
            gone.cancel()
        if path == "/endless":
            gone = asyncio.ensure_future(receive())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
                await asyncio.sleep(0)
            self.ended += 1
            return
        told = {
            "method": scope["method"],
            "path": path,
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
            "length": len(body),
        }
        self.seen.append(told)
        answer = json.dumps(told).encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Read one answer: status, fields, body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        first, *lines = head[:-4].split(b"\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
        return int(first.split()[1]), fields, body

    async def status(self) -> int:
        return (await self.answer())[0]

    async def told(self) -> dict[str, Any]:
        status, _, body = await self.answer()
        assert status == 200, body
        told: dict[str, Any] = json.loads(body)
        return told

    async def is_closed(self) -> bool:
        """Wait, bounded, for the server to close; whether it did, and said nothing more."""
        return await asyncio.wait_for(self.reader.read(), 5) == b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


class Listener:
    """uvicorn with the protocol, as in cli/listener."""

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        self.port = port
        self.clients: list[Client] = []

    async def connect(self, first: bytes = b"") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        client = Client(reader, writer)
        self.clients.append(client)
        if first:
            await client.send(first)
        return client


@asynccontextmanager
async def listening(protocol: type[InboundProtocol]) -> AsyncIterator[Listener]:
    app = App()
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        host="127.0.0.1",
        port=0,
        timeout_graceful_shutdown=1,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    main_loop = asyncio.create_task(server.main_loop())
    listener = Listener(app, server.servers[0].sockets[0].getsockname()[1])
    try:
        yield listener
    finally:
        app.release.set()
        for client in listener.clients:
            await client.close()
        server.should_exit = True
        await main_loop
        await server.shutdown()
        gc.collect()  # what was left behind in cycles warns now, in the test that it belongs to


class QuickProtocol(InboundProtocol):
    header_timeout = SLOW_AFTER
    lingering_timeout = 1.5
    send_timeout = 0.3


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening(InboundProtocol) as running:
        yield running


@pytest.fixture
async def quick() -> AsyncIterator[Listener]:
    """With little patience for slow clients."""
    async with listening(QuickProtocol) as running:
        yield running


def post(body: bytes, *fields: bytes, path: bytes = b"/good") -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: a", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    head = b"POST /good HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"


# What must be refused

REFUSED = {
    # T26
    "no host": (400, b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n"),
    "no host in 1.0": (400, b"GET / HTTP/1.0\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "the same host twice": (400, b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n"),
    # T27
    "absolute form": (400, b"GET http://a/good HTTP/1.1\r\nHost: a\r\n\r\n"),
    "absolute form of another host": (400, b"GET https://evil.example/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "authority form": (400, b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n"),
    "asterisk form": (400, b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
    "non-ascii target": (400, b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n"),
    "space in target": (400, b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
    # T25
    "length and chunked": (
        400,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "chunked and length": (
        400,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    "two lengths": (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "the same length twice": (
        400,
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    ),
    "length list": (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nhello"),
    "signed length": (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nhello"),
    "negative length": (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"),
    "endless length": (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n"),
    "space before the colon": (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    "chunked is not last": (
        400,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ),
    "bad chunk size": (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    "signed chunk size": (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n"),
    "a tunnel": (501, b"CONNECT /good HTTP/1.1\r\nHost: a\r\n\r\n"),
    "coding that we do not know": (
        501,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    "bare LF": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "bare CR in a field": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n"),
    "NUL in a field": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n"),
    "not HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "HTTP/2 preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2.0 version": (400, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
    # T28
    "one field of 70 KB": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"),
    "many fields of 70 KB": (
        431,
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 700) for n in range(100)) + b"\r\n",
    ),
    "5,000 fields": (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000 + b"\r\n"),
    "one field too many": (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * MAX_FIELDS + b"\r\n"),
    "a target of 70 KB": (431, b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target and fields together": (
        431,
        b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
    ),
}


@pytest.mark.parametrize(("status", "request_bytes"), REFUSED.values(), ids=REFUSED.keys())
async def test_a_malformed_request_is_refused_and_the_connection_closed(  # T25, T26, T27, T28
    listener: Listener, status: int, request_bytes: bytes
) -> None:
    client = await listener.connect(request_bytes)
    assert await client.status() == status
    assert await client.is_closed()
    assert not listener.app.seen


@pytest.mark.parametrize("size", [1, 7, 1000], ids=lambda size: f"{size} bytes a packet")
async def test_a_malformed_request_is_refused_however_it_is_cut(listener: Listener, size: int) -> None:
    request = REFUSED["two hosts"][1]
    client = await listener.connect()
    for begin in range(0, len(request), size):
        await client.send(request[begin : begin + size])
        await asyncio.sleep(0)
    assert await client.status() == 400
    assert await client.is_closed()


async def test_many_small_fields_in_many_packets_are_refused(listener: Listener) -> None:  # T28
    client = await listener.connect(b"GET / HTTP/1.1\r\nHost: a\r\n")

    async def pour() -> None:
        for _ in range(5000):
            await client.send(b"X-Filler: %s\r\n" % (b"y" * 30))
            await asyncio.sleep(0)

    pouring = asyncio.create_task(pour())
    assert await client.status() == 431
    assert await client.is_closed()
    pouring.cancel()
    await asyncio.gather(pouring, return_exceptions=True)
    assert not listener.app.seen


async def test_a_head_without_end_is_refused_before_it_is_complete(listener: Listener) -> None:  # T28
    client = await listener.connect(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (MAX_HEAD + 100))
    assert await client.status() == 431
    assert await client.is_closed()


async def test_a_client_that_sends_on_can_still_read_the_refusal(listener: Listener) -> None:
    """A reset by unread bytes would take the answer with it (RFC 9112 §9.6)."""
    client = await listener.connect(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000)
    await until(lambda: not client.reader.at_eof() and bool(client.reader._buffer), "an answer")  # type: ignore[attr-defined]  # private
    for _ in range(20):
        await client.send(b"x" * 50_000)
    assert await client.status() == 431
    assert await client.is_closed()


async def test_the_largest_allowed_head_passes(listener: Listener) -> None:
    fields = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 300) for n in range(MAX_FIELDS - 1))
    client = await listener.connect(b"GET /good HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
    assert len((await client.told())["headers"]) == MAX_FIELDS


async def test_a_large_body_behind_a_small_head_passes(listener: Listener) -> None:
    client = await listener.connect(post(b"x" * 3_000_000))
    assert (await client.told())["length"] == 3_000_000


async def test_trailers_do_not_become_header_fields(listener: Listener) -> None:
    """RFC 9110 §6.5.1. The guard has judged the header fields before a trailer comes."""
    client = await listener.connect(chunked(b"ab", b"c", trailer=b"Host: evil\r\nOrigin: http://evil\r\nX-Last: 1\r\n"))
    told = await client.told()
    assert told["length"] == 3
    assert [name for name, _ in told["headers"]] == ["host", "transfer-encoding"]
    await client.send(GOOD)
    assert [name for name, _ in (await client.told())["headers"]] == ["host"]


@pytest.mark.parametrize(
    "endless",
    [b"0\r\nX: " + b"x" * 200_000, b"0\r\n" + b"X: y\r\n" * 30_000, b"1;" + b"x" * 200_000],
    ids=["trailer", "trailers", "chunk extension"],
)
async def test_what_stands_between_chunks_is_bounded(listener: Listener, endless: bytes) -> None:
    client = await listener.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    await until(lambda: listener.app.begun == 1)
    await client.send(endless)
    assert await client.status() == 400
    assert await client.is_closed()
    await until(lambda: listener.app.disconnects == 1, "the application hears that its client is lost")


async def test_a_body_in_chunks_of_one_byte_passes(listener: Listener) -> None:
    client = await listener.connect(chunked(*[b"x"] * 50_000))
    assert (await client.told())["length"] == 50_000


# Clients that are slow


async def test_silence_after_connect_is_closed(quick: Listener) -> None:  # T29
    client = await quick.connect()
    assert await client.is_closed()


async def test_a_byte_at_a_time_is_closed_though_something_always_comes(quick: Listener) -> None:  # T29
    client = await quick.connect()

    async def trickle() -> None:
        for byte in b"GET /good HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1000:
            await client.send(bytes([byte]))
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    begun = asyncio.get_running_loop().time()
    assert await client.status() == 408
    assert asyncio.get_running_loop().time() - begun < SLOW_AFTER + 5
    assert await client.is_closed()
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)


async def test_half_a_head_on_a_kept_connection_is_closed(quick: Listener) -> None:  # T29
    client = await quick.connect(GOOD)
    await client.told()
    await client.send(GOOD[:20])
    assert await client.status() == 408
    assert await client.is_closed()


async def test_empty_lines_do_not_keep_an_idle_connection_open(quick: Listener) -> None:  # T29
    client = await quick.connect(GOOD)
    await client.told()
    await client.send(b"\r\n")
    assert await client.is_closed()


@pytest.mark.parametrize("body", [b"", b"x" * 100, b"x" * 100_000], ids=["none", "some", "much"])
async def test_a_body_that_stops_coming_is_closed(quick: Listener, body: bytes) -> None:  # T29
    client = await quick.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + body)
    assert await client.status() == 408
    assert await client.is_closed()
    await until(lambda: quick.app.disconnects == 1, "the application hears that its client is lost")


async def test_a_body_that_trickles_is_closed(quick: Listener) -> None:  # T29
    client = await quick.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n")

    async def trickle() -> None:
        for _ in range(200):
            await client.send(b"x")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert await client.status() == 408
    assert await client.is_closed()
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)


async def test_a_slow_but_steady_body_passes(quick: Listener) -> None:
    part = int(MIN_BODY_RATE * SLOW_AFTER)
    client = await quick.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (part * 10))
    for _ in range(10):
        await client.send(b"x" * part)
        await asyncio.sleep(SLOW_AFTER / 3)
    assert (await client.told())["length"] == part * 10


async def test_a_body_that_begins_late_after_connect_has_its_full_time(quick: Listener) -> None:
    client = await quick.connect()
    await asyncio.sleep(SLOW_AFTER * 0.7)
    await client.send(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
    await asyncio.sleep(SLOW_AFTER * 0.7)
    await client.send(b"cd")
    assert (await client.told())["length"] == 4


async def test_a_held_answer_is_not_taken_for_a_slow_client(quick: Listener) -> None:
    client = await quick.connect(post(b"{}", path=b"/held"))
    await until(lambda: quick.app.begun == 1)
    await asyncio.sleep(SLOW_AFTER * 2)
    quick.app.release.set()
    assert (await client.told())["path"] == "/held"


async def test_a_body_that_nobody_wants_any_more_is_not_read_for_ever(quick: Listener) -> None:  # T30
    client = await quick.connect(b"POST /early HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await client.told())["path"] == "/early"

    async def pour() -> None:
        while True:
            await client.send(b"3e8\r\n%s\r\n" % (b"x" * 1000))
            await asyncio.sleep(0.005)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(pour(), 5)


@pytest.mark.parametrize("size", [10, 100_000, 5_000_000])
async def test_a_client_that_sends_all_of_its_body_before_it_reads_gets_the_answer(quick: Listener, size: int) -> None:
    client = await quick.connect(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nhello" % size)
    await until(lambda: quick.app.begun == 1)
    for _ in range(size // 10 - 1):
        client.writer.write(b"0123456789")
    await client.send(b"01234" + GOOD)
    status, fields, _ = await client.answer()
    assert (status, fields[b"connection"]) == (200, b"close")
    assert await client.is_closed()
    assert quick.app.begun == 1


async def test_what_is_sent_ahead_is_bounded_also_where_reads_end_within_messages(
    listener: Listener,
) -> None:  # T30
    client = await listener.connect(post(b"", path=b"/held") + GOOD[:10])
    await until(lambda: listener.app.begun == 1)
    for _ in range(100):
        await client.send(GOOD[10:] + GOOD * 50 + GOOD[:10])
    listener.app.release.set()
    assert (await client.told())["path"] == "/held"
    answered = 0
    while (status := await client.status()) == 200:
        answered += 1
    assert status == 503
    assert await client.is_closed()
    assert answered < 100 * 50 / 2


async def test_bodies_that_are_sent_ahead_are_bounded_together(listener: Listener) -> None:  # T30
    ahead = post(b"x" * 20_000)
    client = await listener.connect(post(b"", path=b"/held") + ahead[:100])
    await until(lambda: listener.app.begun == 1)
    for _ in range(10):
        await client.send(ahead[100:] + ahead[:100])
    listener.app.release.set()
    assert (await client.told())["path"] == "/held"
    statuses = [await client.status()]
    while statuses[-1] == 200:
        statuses.append(await client.status())
    assert statuses[-1] == 503
    assert len(statuses) < 8


async def test_the_limit_for_heads_holds_where_one_begins_behind_a_body(listener: Listener) -> None:  # T28
    fields = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(60))
    client = await listener.connect(post(b"hi")[:-1])
    await until(lambda: listener.app.begun == 1)
    await client.send(b"iGET /good HTTP/1.1\r\nHost: a\r\n" + fields)
    assert (await client.told())["length"] == 2
    await client.send(fields[:20_000].rpartition(b"X-")[0] + b"\r\n")
    assert await client.status() == 431


async def test_a_head_behind_a_large_body_may_come_in_parts(listener: Listener) -> None:
    client = await listener.connect(post(b"x" * MAX_HEAD)[:-1])
    await until(lambda: listener.app.begun == 1)
    await client.send(b"x" + GOOD[:-10])
    assert (await client.told())["length"] == MAX_HEAD
    await client.send(GOOD[-10:])
    assert (await client.told())["path"] == "/good"


async def test_a_refusal_that_has_to_wait_stays_what_it_is(quick: Listener) -> None:
    client = await quick.connect(post(b"", path=b"/held") + chunked(b"x")[:-5])
    await until(lambda: quick.app.begun == 1)
    await client.send(b"nonsense\r\n")
    await asyncio.sleep(SLOW_AFTER * 2)
    quick.app.release.set()
    assert (await client.told())["path"] == "/held"
    assert await client.status() == 400


async def test_very_many_upgrades_in_one_read_are_answered(listener: Listener) -> None:
    one = b"GET /good HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    count = 1500
    client = await listener.connect(one * count)
    statuses = {await client.status() for _ in range(count // 2)}
    assert statuses == {200}


async def test_a_client_that_takes_nothing_is_let_go(quick: Listener) -> None:
    sock = socket.create_connection(("127.0.0.1", quick.port))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().run_in_executor(
            None, sock.sendall, b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n"
        )
        await until(lambda: quick.app.begun == 1)
        await until(lambda: quick.app.ended == 1, timeout=5)
    finally:
        sock.close()


# What must go on working


async def test_a_connection_is_kept_for_more_requests(listener: Listener) -> None:
    client = await listener.connect()
    for length in (0, 10, 100_000, 1):
        await client.send(post(b"x" * length))
        assert (await client.told())["length"] == length


async def test_pipelined_requests_are_answered_in_order(listener: Listener) -> None:
    client = await listener.connect(post(b"a", path=b"/1") + GOOD + post(b"bc", path=b"/2") + chunked(b"def"))
    assert [(await client.told())["length"] for _ in range(4)] == [1, 0, 2, 3]


async def test_bytes_that_come_between_two_turns_do_not_overtake_those_that_wait() -> None:
    # T25: the event loop may read between an answer and the turn of what was held back; a body became a request.
    class Overtaken(InboundProtocol):
        late = b""

        def answered(self, reply: ClientRequest) -> None:
            super().answered(reply)
            if self._pipelined and self.late:
                late, Overtaken.late = self.late, b""
                self.data_received(late)

    async with listening(Overtaken) as listener:
        second = post(GOOD)
        Overtaken.late = second[-len(GOOD) :]
        client = await listener.connect(post(b"", path=b"/held"))
        await until(lambda: listener.app.begun == 1)
        await client.send(second[: -len(GOOD)])
        await asyncio.sleep(0.1)
        listener.app.release.set()
        assert (await client.told())["path"] == "/held"
        told = await client.told()
        assert (told["method"], told["length"]) == ("POST", len(GOOD))
        assert listener.app.begun == 2


async def test_a_bad_pipelined_request_does_not_spoil_the_answers_before_it(listener: Listener) -> None:
    client = await listener.connect(post(b"", path=b"/held") + GOOD + REFUSED["two hosts"][1] + GOOD)
    await until(lambda: listener.app.begun == 1)
    listener.app.release.set()
    assert (await client.told())["path"] == "/held"
    assert (await client.told())["path"] == "/good"
    assert await client.status() == 400
    assert await client.is_closed()
    assert listener.app.begun == 2


async def test_a_bad_body_of_a_pipelined_request_does_not_spoil_the_answers_before_it(listener: Listener) -> None:
    client = await listener.connect(post(b"", path=b"/held") + chunked(b"x")[:-5] + b"nonsense\r\n")
    await until(lambda: listener.app.begun == 1)
    listener.app.release.set()
    assert (await client.told())["path"] == "/held"
    assert await client.status() == 400
    assert await client.is_closed()
    assert listener.app.begun == 1


async def test_a_slow_pipelined_request_does_not_cut_the_answer_before_it(quick: Listener) -> None:
    client = await quick.connect(post(b"", path=b"/held") + GOOD[:20])
    await until(lambda: quick.app.begun == 1)
    await asyncio.sleep(SLOW_AFTER * 2)
    quick.app.release.set()
    assert (await client.told())["path"] == "/held"
    assert await client.status() == 408
    assert await client.is_closed()


async def test_a_client_that_goes_away_is_noticed(listener: Listener) -> None:
    client = await listener.connect(post(b"", path=b"/held"))
    await until(lambda: listener.app.begun == 1)
    await client.close()
    await until(lambda: listener.app.disconnects == 1)


async def test_a_client_that_goes_away_is_noticed_behind_pipelined_requests(listener: Listener) -> None:
    """uvicorn tells the last request of the connection alone; the upstream of the first would stay open."""
    client = await listener.connect(post(b"", path=b"/held") + GOOD)
    await until(lambda: listener.app.begun == 1)
    await client.close()
    await until(lambda: listener.app.disconnects == 1)
    assert listener.app.begun == 1


@pytest.mark.parametrize("apart", [True, False], ids=["later", "in one packet"])
async def test_a_client_that_goes_away_is_noticed_behind_much_that_it_sent_ahead(
    listener: Listener, apart: bool
) -> None:  # T40
    ahead = post(b"x" * 400_000)
    client = await listener.connect(post(b"", path=b"/held") + (b"" if apart else ahead))
    await until(lambda: listener.app.begun == 1)
    if apart:
        await client.send(ahead)
    await client.close()
    await until(lambda: listener.app.disconnects == 1)
    assert listener.app.begun == 1


async def test_expect_100_continue_is_answered_when_the_body_is_wanted(listener: Listener) -> None:
    client = await listener.connect(post(b"hello", b"Expect: 100-continue")[:-5])
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await client.send(b"hello")
    assert (await client.told())["length"] == 5


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
async def test_an_upgrade_is_ignored_and_the_connection_goes_on(
    listener: Listener, protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fields = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + protocol, b"HTTP2-Settings: AAMAAABkAAQAAP__")
    client = await listener.connect(post(b"hello", *fields) + GOOD)
    told = await client.told()
    assert told["length"] == 5
    assert "upgrade" not in [name for name, _ in told["headers"]]
    assert (await client.told())["path"] == "/good"
    await client.send(b"GET /bodiless HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + GOOD)
    assert (await client.told())["path"] == "/bodiless"
    assert (await client.told())["path"] == "/good"
    await client.send(GOOD)
    assert (await client.told())["path"] == "/good"
    assert not caplog.records


async def test_http_1_0_is_answered_and_closed(listener: Listener) -> None:
    client = await listener.connect(b"GET /good HTTP/1.0\r\nHost: a\r\n\r\n")
    assert (await client.told())["path"] == "/good"
    assert await client.is_closed()


async def test_the_raw_path_and_query_arrive_as_sent(listener: Listener) -> None:
    client = await listener.connect(b"GET //a/%2e%2e/%2F;x?q=%20 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await client.told())["path"] == "//a/%2e%2e/%2F;x"


def mutations(request: bytes) -> Iterable[bytes]:
    for position in range(len(request)):
        for byte in (b"\x00", b"\n", b"\r", b" ", b":", b"\xff", b""):
            yield request[:position] + byte + request[position + 1 :]


async def test_no_mutation_of_a_request_leaves_an_error_behind(
    quick: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """Every answer is whole, or there is none; nothing is logged as an error, and the listener goes on."""
    requests = list(mutations(chunked(b"hello")))

    async def ask(request: bytes) -> None:
        client = await quick.connect(request)
        answered = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5) if request else b""
        assert answered.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 4", b"HTTP/1.1 501 ")), request
        await client.close()

    for begin in range(0, len(requests), 100):
        await asyncio.gather(*(ask(request) for request in requests[begin : begin + 100]))
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert (await (await quick.connect(GOOD)).told())["path"] == "/good"
