"""The connection of a client: pipelining, timeouts, refusals, and clients that leave; over raw sockets."""

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from fakes.listener import listener as serving
from fakes.proxy import until
from mcp_auth_proxy.errors import ClientDisconnected
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_server import MAX_PIPELINED, MIN_BODY_RATE, HttpServerConnection

HEADER_TIMEOUT = 0.3
"""Seconds; that of the connection is too long for a test."""

FRAMINGS = (b"Content-Length: 1000000", b"Transfer-Encoding: chunked")

GOOD = b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n"
TWO_HOSTS = b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"


@dataclass
class EchoServer:
    """Describe each request in a JSON response.

    ``/held`` waits for ``release`` or for the client to leave, ``/early`` answers before the body is here, ``/endless``
    sends until the client is gone.
    """

    served: int = 0
    answered: int = 0
    disconnects: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def try_fast_path(self, request: ClientRequest) -> bool:
        return False

    async def serve(self, request: ClientRequest) -> None:
        self.served += 1
        try:
            body = b"" if request.path == b"/early" else await request.body(10**8, lambda size: True)
        except ClientDisconnected:
            self.disconnects += 1
            return
        if request.path == b"/held":
            request.when_disconnected(self.release.set)
            await self.release.wait()
        if request.path == b"/endless":
            await request.start(200, [])
            while not request.disconnected:
                await request.write(b"x" * 65_536)
                await asyncio.sleep(0)
        if request.disconnected:
            self.disconnects += 1
            return
        self.answered += 1
        description = {
            "method": request.method.decode(),
            "path": request.path.decode(),
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers],
            "length": len(body),
        }
        request.respond(200, [], json.dumps(description).encode())


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def response(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Read one response: status, fields, body."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        first, *lines = head[:-4].split(b"\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
        return int(first.split()[1]), fields, body

    async def status(self) -> int:
        return (await self.response())[0]

    async def echo(self) -> dict[str, Any]:
        """Read a response of the EchoServer."""
        status, _, body = await self.response()
        assert status == 200, body
        echo: dict[str, Any] = json.loads(body)
        return echo

    async def is_closed(self) -> bool:
        """Wait, bounded, for the server to close; return whether it sent nothing more."""
        return await asyncio.wait_for(self.reader.read(), 5) == b""

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


class Listener:
    """A listener before an EchoServer."""

    def __init__(self, app: EchoServer, port: int) -> None:
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
async def listening(connection: type[HttpServerConnection], *, keep_alive: int = 75) -> AsyncIterator[Listener]:
    app = EchoServer()
    async with serving(app, connection, keep_alive=keep_alive) as port:
        listener = Listener(app, port)
        try:
            yield listener
        finally:
            app.release.set()
            for client in listener.clients:
                await client.close()
    gc.collect()  # what was left behind in cycles warns now, in the test that it belongs to


class ImpatientConnection(HttpServerConnection):
    header_timeout = HEADER_TIMEOUT
    lingering_timeout = 1.5
    send_timeout = 0.3


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening(HttpServerConnection) as running:
        yield running


@pytest.fixture
async def impatient() -> AsyncIterator[Listener]:
    """A listener with little patience for slow clients."""
    async with listening(ImpatientConnection) as running:
        yield running


def post(body: bytes, *fields: bytes, path: bytes = b"/good") -> bytes:
    lines = [b"POST %s HTTP/1.1" % path, b"Host: a", b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*chunks: bytes, trailer: bytes = b"") -> bytes:
    head = b"POST /good HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"


# Refusals. test_request_parser.py has the table of what is refused.


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (400, TWO_HOSTS),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
        (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"),
        (501, b"CONNECT /good HTTP/1.1\r\nHost: a\r\n\r\n"),
    ],
    ids=["two hosts", "not HTTP", "bad chunk size", "70 KB", "a tunnel"],
)
async def test_a_malformed_request_is_refused_and_the_connection_closed(  # T25, T26, T28
    listener: Listener, status: int, request_bytes: bytes
) -> None:
    client = await listener.connect(request_bytes)
    refused, fields, _ = await client.response()
    assert (refused, fields[b"connection"]) == (status, b"close")
    assert await client.is_closed()
    assert not listener.app.answered


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
    assert not listener.app.answered


async def test_a_client_that_keeps_sending_can_still_read_the_refusal(listener: Listener) -> None:
    """A reset by unread bytes would take the answer with it (RFC 9112 §9.6)."""
    client = await listener.connect(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000)
    await until(lambda: not client.reader.at_eof() and bool(client.reader._buffer), "an answer")  # type: ignore[attr-defined]  # private
    for _ in range(20):
        await client.send(b"x" * 50_000)
    assert await client.status() == 431
    assert await client.is_closed()


async def test_a_request_whose_body_is_invalid_is_refused_while_it_is_served(listener: Listener) -> None:
    client = await listener.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    await until(lambda: listener.app.served == 1)
    await client.send(b"xyz\r\n")
    assert await client.status() == 400
    assert await client.is_closed()
    await until(lambda: listener.app.disconnects == 1, "its handler is told that its client is lost")


async def test_a_large_body_behind_a_small_head_passes(listener: Listener) -> None:
    client = await listener.connect(post(b"x" * 3_000_000))
    assert (await client.echo())["length"] == 3_000_000


# Clients that are slow


async def test_silence_after_connect_is_closed(impatient: Listener) -> None:  # T29
    client = await impatient.connect()
    assert await client.is_closed()


async def test_a_body_must_be_complete_in_time_whatever_its_rate() -> None:  # T83
    class Limited(ImpatientConnection):
        body_timeout = 1.0

    async with listening(Limited) as listener:
        started = asyncio.get_running_loop().time()
        heads = [b"POST /good HTTP/1.1\r\nHost: a\r\n" + framing + b"\r\n\r\n" for framing in FRAMINGS]
        clients = [await listener.connect(head) for head in heads]

        async def feed() -> None:
            while True:
                await clients[0].send(b"x" * 1000)
                await clients[1].send(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
                await asyncio.sleep(0.05)

        feeding = asyncio.create_task(feed())
        for client in clients:
            assert await client.status() == 408
        assert 0.9 < asyncio.get_running_loop().time() - started < 3
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        assert listener.app.disconnects == 2
        # The time of one request does not count for the next.
        again = await listener.connect()
        for _ in range(3):
            body = post(b"x" * 4000)
            for start in range(0, len(body), 1000):
                await again.send(body[start : start + 1000])
                await asyncio.sleep(0.15)
            assert (await again.echo())["length"] == 4000


async def test_a_head_that_comes_byte_by_byte_is_closed(impatient: Listener) -> None:  # T29
    client = await impatient.connect()

    async def trickle() -> None:
        for byte in b"GET /good HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1000:
            await client.send(bytes([byte]))
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    started = asyncio.get_running_loop().time()
    assert await client.status() == 408
    assert asyncio.get_running_loop().time() - started < HEADER_TIMEOUT + 5
    assert await client.is_closed()
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)


async def test_half_a_head_on_a_kept_connection_is_closed(impatient: Listener) -> None:  # T29
    client = await impatient.connect(GOOD)
    await client.echo()
    await client.send(GOOD[:20])
    assert await client.status() == 408
    assert await client.is_closed()


async def test_empty_lines_do_not_keep_an_idle_connection_open(impatient: Listener) -> None:  # T29
    client = await impatient.connect(GOOD)
    await client.echo()
    await client.send(b"\r\n")
    assert await client.is_closed()


@pytest.mark.parametrize("body", [b"", b"x" * 100, b"x" * 100_000], ids=["none", "some", "much"])
async def test_a_body_that_stops_coming_is_closed(impatient: Listener, body: bytes) -> None:  # T29
    client = await impatient.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" + body)
    assert await client.status() == 408
    assert await client.is_closed()
    await until(lambda: impatient.app.disconnects == 1, "its handler is told that its client is lost")


async def test_a_body_below_the_minimum_rate_is_closed(impatient: Listener) -> None:  # T29
    client = await impatient.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n")

    async def trickle() -> None:
        for _ in range(200):
            await client.send(b"x")
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    assert await client.status() == 408
    assert await client.is_closed()
    trickling.cancel()
    await asyncio.gather(trickling, return_exceptions=True)


async def test_a_slow_but_steady_body_passes(impatient: Listener) -> None:
    part = int(MIN_BODY_RATE * HEADER_TIMEOUT)
    client = await impatient.connect(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (part * 10))
    for _ in range(10):
        await client.send(b"x" * part)
        await asyncio.sleep(HEADER_TIMEOUT / 3)
    assert (await client.echo())["length"] == part * 10


async def test_a_body_that_starts_late_after_connect_has_its_full_time(impatient: Listener) -> None:
    client = await impatient.connect()
    await asyncio.sleep(HEADER_TIMEOUT * 0.7)
    await client.send(b"POST /good HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
    await asyncio.sleep(HEADER_TIMEOUT * 0.7)
    await client.send(b"cd")
    assert (await client.echo())["length"] == 4


async def test_a_client_whose_request_is_held_is_not_slow(impatient: Listener) -> None:
    client = await impatient.connect(post(b"{}", path=b"/held"))
    await until(lambda: impatient.app.served == 1)
    await asyncio.sleep(HEADER_TIMEOUT * 2)
    impatient.app.release.set()
    assert (await client.echo())["path"] == "/held"


async def test_a_body_after_the_response_is_read_for_a_bounded_time(impatient: Listener) -> None:  # T30
    client = await impatient.connect(b"POST /early HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert (await client.echo())["path"] == "/early"

    async def pour() -> None:
        while True:
            await client.send(b"3e8\r\n%s\r\n" % (b"x" * 1000))
            await asyncio.sleep(0.005)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(pour(), 5)


@pytest.mark.parametrize("size", [10, 100_000, 5_000_000])
async def test_a_client_that_sends_all_of_its_body_before_it_reads_gets_the_response(
    impatient: Listener, size: int
) -> None:
    client = await impatient.connect(b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\nhello" % size)
    await until(lambda: impatient.app.served == 1)
    for start in range(5, size, 50_000):
        client.writer.write(b"x" * min(50_000, size - start))
    await client.send(GOOD)
    status, fields, _ = await client.response()
    assert (status, fields[b"connection"]) == (200, b"close")
    assert await client.is_closed()
    assert impatient.app.served == 1


async def answered_before_503(listener: Listener, client: Client) -> int:
    """Let the held request be answered; return how many of those behind it are answered before one is refused."""
    listener.app.release.set()
    assert (await client.echo())["path"] == "/held"
    answered = 0
    while (status := await client.status()) == 200:
        answered += 1
    assert status == 503
    return answered


async def test_pipelined_requests_are_bounded_even_if_reads_end_within_them(listener: Listener) -> None:  # T30
    client = await listener.connect(post(b"", path=b"/held") + GOOD[:10])
    await until(lambda: listener.app.served == 1)
    for _ in range(100):
        await client.send(GOOD[10:] + GOOD * 50 + GOOD[:10])
    assert await answered_before_503(listener, client) < 100 * 50 / 2
    assert await client.is_closed()


async def test_the_requests_of_one_read_are_bounded_too(listener: Listener) -> None:  # T82
    client = await listener.connect(post(b"", path=b"/held") + GOOD * 7000)
    await until(lambda: listener.app.served == 1)
    assert await answered_before_503(listener, client) < 2 * MAX_PIPELINED / len(GOOD)


async def test_pipelined_bodies_are_bounded_together(listener: Listener) -> None:  # T30
    ahead = post(b"x" * 20_000)
    client = await listener.connect(post(b"", path=b"/held") + ahead[:100])
    await until(lambda: listener.app.served == 1)
    for _ in range(10):
        await client.send(ahead[100:] + ahead[:100])
    listener.app.release.set()
    assert (await client.echo())["path"] == "/held"
    statuses = [await client.status()]
    while statuses[-1] == 200:
        statuses.append(await client.status())
    assert statuses[-1] == 503
    assert len(statuses) < 8


async def test_a_refusal_that_has_to_wait_keeps_its_status(impatient: Listener) -> None:
    client = await impatient.connect(post(b"", path=b"/held") + chunked(b"x")[:-5])
    await until(lambda: impatient.app.served == 1)
    await client.send(b"nonsense\r\n")
    await asyncio.sleep(HEADER_TIMEOUT * 2)
    impatient.app.release.set()
    assert (await client.echo())["path"] == "/held"
    assert await client.status() == 400


async def test_very_many_upgrades_in_one_read_are_answered(listener: Listener) -> None:
    one = b"GET /good HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    count = 1500
    client = await listener.connect(one * count)
    statuses = {await client.status() for _ in range(count // 2)}
    assert statuses == {200}


async def test_a_client_that_reads_nothing_is_aborted(impatient: Listener) -> None:
    sock = socket.create_connection(("127.0.0.1", impatient.port))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().run_in_executor(
            None, sock.sendall, b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n"
        )
        await until(lambda: impatient.app.served == 1)
        await until(lambda: impatient.app.disconnects == 1, timeout=5)
    finally:
        sock.close()


# Connections that are kept


async def test_a_connection_is_kept_for_more_requests(listener: Listener) -> None:
    client = await listener.connect()
    for length in (0, 10, 100_000, 1):
        await client.send(post(b"x" * length))
        assert (await client.echo())["length"] == length


async def test_an_idle_connection_is_closed_and_a_used_one_kept() -> None:
    async with listening(ImpatientConnection, keep_alive=1) as listener:
        client = await listener.connect()
        for _ in range(4):
            await client.send(GOOD)
            assert (await client.echo())["path"] == "/good"
            await asyncio.sleep(0.5)  # less than the keep-alive time, more than that for a head
        started = asyncio.get_running_loop().time()
        assert await client.is_closed()
        assert asyncio.get_running_loop().time() - started < 2


async def test_a_connection_whose_request_is_held_is_not_idle() -> None:
    async with listening(ImpatientConnection, keep_alive=1) as listener:
        client = await listener.connect(GOOD + post(b"", path=b"/held"))
        await client.echo()
        await asyncio.sleep(1.2)
        listener.app.release.set()
        assert (await client.echo())["path"] == "/held"
        assert await client.is_closed()


async def test_pipelined_requests_are_answered_in_order(listener: Listener) -> None:
    client = await listener.connect(post(b"a", path=b"/1") + GOOD + post(b"bc", path=b"/2") + chunked(b"def"))
    assert [(await client.echo())["length"] for _ in range(4)] == [1, 0, 2, 3]


async def test_bytes_do_not_overtake_those_that_wait_to_be_parsed() -> None:
    # T25: the event loop may read between a response and the parsing of what waited for it. A body became a request.
    class Overtaken(HttpServerConnection):
        late = b""
        accepted: ClassVar[list[HttpServerConnection]] = []

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.accepted.append(self)

        def response_complete(self, request: ClientRequest) -> None:
            super().response_complete(request)
            if self._pipelined and self.late:
                late, Overtaken.late = self.late, b""
                self.data_received(late)

    async with listening(Overtaken) as listener:
        second = post(GOOD)
        Overtaken.late = second[-len(GOOD) :]
        client = await listener.connect(post(b"", path=b"/held"))
        await until(lambda: listener.app.served == 1)
        await client.send(second[: -len(GOOD)])
        await until(lambda: Overtaken.accepted[0]._pipelined)
        listener.app.release.set()
        assert (await client.echo())["path"] == "/held"
        echo = await client.echo()
        assert (echo["method"], echo["length"]) == ("POST", len(GOOD))
        assert listener.app.served == 2


async def test_a_request_that_is_refused_just_before_its_turn_is_not_served() -> None:
    class Interrupted(HttpServerConnection):
        def response_complete(self, request: ClientRequest) -> None:
            super().response_complete(request)
            if request.path == b"/held":
                self.data_received(b"nonsense\r\n")

    async with listening(Interrupted) as listener:
        client = await listener.connect(post(b"", path=b"/held") + chunked(b"x")[:-5])
        await until(lambda: listener.app.served == 1)
        listener.app.release.set()
        assert (await client.echo())["path"] == "/held"
        assert await client.status() == 400
        assert await client.is_closed()
        assert listener.app.served == 1


async def test_an_invalid_pipelined_request_does_not_affect_the_responses_before_it(listener: Listener) -> None:
    client = await listener.connect(post(b"", path=b"/held") + GOOD + TWO_HOSTS + GOOD)
    await until(lambda: listener.app.served == 1)
    listener.app.release.set()
    assert (await client.echo())["path"] == "/held"
    assert (await client.echo())["path"] == "/good"
    assert await client.status() == 400
    assert await client.is_closed()
    assert listener.app.served == 2


async def test_an_invalid_body_of_a_pipelined_request_does_not_affect_the_responses_before_it(
    listener: Listener,
) -> None:
    client = await listener.connect(post(b"", path=b"/held") + chunked(b"x")[:-5] + b"nonsense\r\n")
    await until(lambda: listener.app.served == 1)
    listener.app.release.set()
    assert (await client.echo())["path"] == "/held"
    assert await client.status() == 400
    assert await client.is_closed()
    assert listener.app.served == 1


async def test_a_slow_pipelined_request_does_not_cut_the_response_before_it(impatient: Listener) -> None:
    client = await impatient.connect(post(b"", path=b"/held") + GOOD[:20])
    await until(lambda: impatient.app.served == 1)
    await asyncio.sleep(HEADER_TIMEOUT * 2)
    impatient.app.release.set()
    assert (await client.echo())["path"] == "/held"
    assert await client.status() == 408
    assert await client.is_closed()


async def test_a_client_that_goes_away_is_noticed(listener: Listener) -> None:
    client = await listener.connect(post(b"", path=b"/held"))
    await until(lambda: listener.app.served == 1)
    await client.close()
    await until(lambda: listener.app.disconnects == 1)


async def test_a_client_that_goes_away_is_noticed_behind_pipelined_requests(listener: Listener) -> None:
    """uvicorn tells only the last request of a connection; the upstream of the first would stay open."""
    client = await listener.connect(post(b"", path=b"/held") + GOOD)
    await until(lambda: listener.app.served == 1)
    await client.close()
    await until(lambda: listener.app.disconnects == 1)
    assert listener.app.served == 1


@pytest.mark.parametrize("apart", [True, False], ids=["later", "in one packet"])
async def test_a_client_that_goes_away_is_noticed_behind_a_large_pipelined_request(
    listener: Listener, apart: bool
) -> None:  # T40
    ahead = post(b"x" * 400_000)
    client = await listener.connect(post(b"", path=b"/held") + (b"" if apart else ahead))
    await until(lambda: listener.app.served == 1)
    if apart:
        await client.send(ahead)
    await client.close()
    await until(lambda: listener.app.disconnects == 1)
    assert listener.app.served == 1


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
async def test_an_upgrade_is_ignored_and_the_connection_continues(
    listener: Listener, protocol: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fields = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + protocol, b"HTTP2-Settings: AAMAAABkAAQAAP__")
    client = await listener.connect(post(b"hello", *fields) + GOOD)
    echo = await client.echo()
    assert echo["length"] == 5
    assert "upgrade" not in [name for name, _ in echo["headers"]]
    assert (await client.echo())["path"] == "/good"
    await client.send(b"GET /bodiless HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + GOOD)
    assert (await client.echo())["path"] == "/bodiless"
    assert (await client.echo())["path"] == "/good"
    await client.send(GOOD)
    assert (await client.echo())["path"] == "/good"
    assert not caplog.records


async def test_http_1_0_is_answered_and_closed(listener: Listener) -> None:
    client = await listener.connect(b"GET /good HTTP/1.0\r\nHost: a\r\n\r\n")
    assert (await client.echo())["path"] == "/good"
    assert await client.is_closed()


def mutations(request: bytes) -> Iterable[bytes]:
    for position in range(len(request)):
        for byte in (b"\x00", b"\n", b"\r", b" ", b":", b"\xff", b""):
            yield request[:position] + byte + request[position + 1 :]


async def test_no_mutation_of_a_request_leaves_an_error_behind(
    impatient: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """Each gets a response with a head; nothing is logged as an error, and the listener continues."""
    requests = list(mutations(chunked(b"hello")))

    async def ask(request: bytes) -> None:
        client = await impatient.connect(request)
        answered = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 5) if request else b""
        assert answered.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 4", b"HTTP/1.1 501 ")), request
        await client.close()

    for start in range(0, len(requests), 100):
        await asyncio.gather(*(ask(request) for request in requests[start : start + 100]))
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert (await (await impatient.connect(GOOD)).echo())["path"] == "/good"


# The end of the server


async def test_at_shutdown_an_idle_connection_closes_and_a_busy_one_after_its_responses() -> None:
    class Accepted(HttpServerConnection):
        connections: ClassVar[list[HttpServerConnection]] = []

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.connections.append(self)

    async with listening(Accepted) as listener:
        idle = await listener.connect(GOOD)
        assert await idle.status() == 200
        busy = await listener.connect(post(b"", path=b"/held") + GOOD)
        await until(lambda: listener.app.served == 2, "a held request")
        for connection in Accepted.connections:
            connection.shutdown()
        assert await idle.is_closed()
        listener.app.release.set()
        first, second = await busy.response(), await busy.response()
        assert (b"connection" in first[1], second[1][b"connection"]) == (False, b"close")
        assert await busy.is_closed()


async def test_a_body_that_turns_out_bad_after_the_response_has_begun_cuts_that_response_off() -> None:
    class Hasty(EchoServer):
        async def serve(self, request: ClientRequest) -> None:
            await request.start(200, [])
            await request.write(b"x")
            await request.wait_closed()
            self.disconnects += request.disconnected

    app = Hasty()
    async with serving(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        await client.reader.readuntil(b"1\r\nx\r\n")
        await client.send(b"nonsense\r\n")
        # Neither a final chunk nor a second response.
        assert await client.is_closed()
        await client.close()
        assert app.disconnects == 1


@pytest.mark.parametrize(
    "first", [GOOD[:-2], GOOD, TWO_HOSTS, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"]
)
async def test_what_a_client_has_sent_is_freed_as_soon_as_it_is_gone(first: bytes) -> None:  # T82
    made: list[weakref.ref[HttpServerConnection]] = []

    class Watched(HttpServerConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            made.append(weakref.ref(self))

    gc.disable()
    try:
        async with listening(Watched) as listener:
            client = await listener.connect(first)
            await until(lambda: made, "a connection")
            await client.close()
            await until(lambda: made[0]() is None, "a connection that is freed")
    finally:
        gc.enable()
