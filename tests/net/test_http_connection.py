"""One HTTP/1.1 request and its response: which bytes are a response, and which are refused.

The connection is driven through a transport in memory, which decides how the bytes are split on their way.
"""

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fakes.raw_server import Peer, RawServer
from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError, UpstreamTimeout
from mcp_auth_proxy.net import http_connection as connection_module
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_connection import (
    BODY_PIECE,
    BUSY_POLL_THRESHOLD,
    FIELD_LIMIT,
    HEAD_LIMIT,
    READ_SIZE,
    HttpConnection,
    StaleConnection,
)
from mcp_auth_proxy.net.http_response import READ_AHEAD, Response
from mcp_auth_proxy.net.urls import parse
from mcp_auth_proxy.proxy.headers import response_headers


class Wire(asyncio.Transport):
    """A transport whose other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = ""
        self._reading = True
        self.unsent = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return bool(self.closed)

    def close(self) -> None:
        self.closed = self.closed or "closed"

    def abort(self) -> None:
        self.closed = "aborted"

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True


class RecordingOwner:
    """An owner of connections that records its callbacks."""

    name = "up.example:80"

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_SIZE))
        self.back: list[HttpConnection] = []
        self.lost: list[bool] = []
        self.stale_after: list[float] = []

    def connection_stale(self, connection: HttpConnection) -> None:
        self.stale_after.append(connection.idle_for)

    def connection_released(self, connection: HttpConnection) -> None:
        self.back.append(connection)

    def connection_closed(self, connection: HttpConnection, *, idle: bool) -> None:
        self.lost.append(idle)


class Line:
    """A connection, its transport and its owner."""

    def __init__(self) -> None:
        self.owner = RecordingOwner()
        self.wire = Wire()
        self.connection = HttpConnection(self.owner, None)  # type: ignore[arg-type]  # the transport here has no socket
        self.connection.connection_made(self.wire)

    def ask(self, method: bytes = b"POST", timeout: float = 60.0, body: bytes = b"body") -> asyncio.Future[Response]:
        waiter: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.connection.send(waiter, b"head", body, bodiless=method == b"HEAD", timeout=timeout)
        return waiter

    def receive(self, data: bytes) -> None:
        while data and not self.wire.closed:
            piece, data = data[:READ_SIZE], data[READ_SIZE:]
            self.connection.get_buffer(-1)[: len(piece)] = piece
            self.connection.buffer_updated(len(piece))

    def end(self) -> None:
        if not self.wire.closed:
            self.connection.eof_received()
        self.connection.connection_lost(None)


@dataclass
class Outcome:
    """The outcome of a request. ``error`` is about the head if ``status`` is 0, else about the body."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    error: type[BaseException] | None = None
    reused: bool = field(default=False, compare=False)


async def play(pieces: Iterable[bytes], method: bytes = b"POST", *, end: bool = True) -> Outcome:
    line = Line()
    answer = line.ask(method)
    for piece in pieces:
        line.receive(piece)
    reused = line.owner.back == [line.connection] and not line.wire.closed
    if end:
        line.end()
    assert answer.done()
    error = answer.exception()
    if error is not None:
        return Outcome(error=type(error))
    response = answer.result()
    outcome = Outcome(response.status, response.headers, reused=reused)
    try:
        while not response.complete:
            outcome.body += await asyncio.wait_for(response.read(), 5)
    except UpstreamError as failure:
        outcome.error = type(failure)
    return outcome


def h11_outcome(raw: bytes, method: bytes = b"POST") -> tuple[int, bytes] | None:
    """Return what h11 reads in the same bytes: status and body, or None if it refuses them."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("host", "h"), ("content-length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw)
    status, body, ended = 0, b"", False
    try:
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                if ended:
                    return None
                client.receive_data(b"")
                ended = True
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return None
    except h11.RemoteProtocolError:
        return None


SAME = "h11 does the same"
BROKEN = None
OK = b"HTTP/1.1 200 OK\r\n"
CL2 = b"Content-Length: 2\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HI = b"2\r\nhi\r\n0\r\n\r\n"
THEN_OK = OK + CL2 + b"\r\nhi"

# Name, bytes, what we read in them (status and body, or BROKEN), and h11's verdict if it differs: these lines show
# how we are stricter or laxer than another client.
ODD: list[tuple[str, bytes, tuple[int, bytes] | None, tuple[int, bytes] | str | None]] = [
    ("length", OK + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("chunked", OK + CHUNKED + b"\r\n" + HI, (200, b"hi"), SAME),
    ("until close", OK + b"\r\nhi", (200, b"hi"), SAME),
    ("no reason", b"HTTP/1.1 200 \r\n" + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("no reason, no space", b"HTTP/1.1 200\r\n" + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("length with slatencies behind", OK + b"Content-Length: 2  \r\n\r\nhi", (200, b"hi"), SAME),
    ("empty value", OK + b"X:\r\nY: \r\n" + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("obs-text in a value", OK + b"X: \xe9\r\n" + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("1.0", b"HTTP/1.0 200 OK\r\n" + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("interim", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 x\r\nLink: a\r\n\r\n" + THEN_OK, (200, b"hi"), SAME),
    ("interim with a length", b"HTTP/1.1 103 x\r\n" + CL2 + b"\r\n" + THEN_OK, (200, b"hi"), SAME),
    ("interim chunked", b"HTTP/1.1 103 x\r\n" + CHUNKED + b"\r\n" + THEN_OK, (200, b"hi"), SAME),
    ("chunk extension", OK + CHUNKED + b"\r\n2;a=b\r\nhi\r\n0;c\r\n\r\n", (200, b"hi"), SAME),
    ("trailer", OK + CHUNKED + b"\r\n2\r\nhi\r\n0\r\nX: a\r\n\r\n", (200, b"hi"), SAME),
    ("upgrade offered", OK + b"Upgrade: h2c\r\nConnection: upgrade\r\n" + CL2 + b"\r\nhi", (200, b"hi"), SAME),
    ("204 with a length", b"HTTP/1.1 204 x\r\n" + CL2 + b"\r\n", (204, b""), SAME),
    ("204 chunked", b"HTTP/1.1 204 x\r\n" + CHUNKED + b"\r\n", (204, b""), SAME),
    ("304 with a length", b"HTTP/1.1 304 x\r\n" + CL2 + b"\r\n", (304, b""), SAME),
    ("second response behind", THEN_OK + THEN_OK, (200, b"hi"), SAME),
    ("rubbish behind", THEN_OK + b"xx", (200, b"hi"), SAME),
    # Refused by both.
    ("switching protocols", b"HTTP/1.1 101 x\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", BROKEN, SAME),
    ("lengths differ", OK + CL2 + b"Content-Length: 3\r\n\r\nhi!", BROKEN, SAME),
    ("length with sign", OK + b"Content-Length: +2\r\n\r\nhi", BROKEN, SAME),
    ("length below zero", OK + b"Content-Length: -2\r\n\r\nhi", BROKEN, SAME),
    ("length empty", OK + b"Content-Length: \r\n\r\nhi", BROKEN, SAME),
    ("length of two words", OK + b"Content-Length: 1 2\r\n\r\nhi", BROKEN, SAME),
    ("length without end", OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nhi", BROKEN, SAME),
    ("white space before the colon", OK + b"X : a\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("no colon", OK + b"X\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("no name", OK + b": a\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("NUL in a value", OK + b"X: a\0b\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("bare CR in a value", OK + b"X: a\rb\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("bare CR in the reason", b"HTTP/1.1 200 O\rK\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("space before the first field", OK + b" X: a\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("coding gzip", OK + b"Transfer-Encoding: gzip\r\n\r\nhi", BROKEN, SAME),
    ("coding gzip, chunked", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + HI, BROKEN, SAME),
    ("coding chunked, gzip", OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + HI, BROKEN, SAME),
    ("coding chunked twice", OK + CHUNKED + CHUNKED + b"\r\n" + HI, BROKEN, SAME),
    ("coding xchunked", OK + b"Transfer-Encoding: xchunked\r\n\r\n" + HI, BROKEN, SAME),
    ("coding empty", OK + b"Transfer-Encoding:\r\n\r\n" + HI, BROKEN, SAME),
    ("chunk size with 0x", OK + CHUNKED + b"\r\n0x2\r\nhi\r\n0\r\n\r\n", BROKEN, SAME),
    ("chunk size below zero", OK + CHUNKED + b"\r\n-2\r\nhi\r\n0\r\n\r\n", BROKEN, SAME),
    ("chunk size without end", OK + CHUNKED + b"\r\n" + b"f" * 30 + b"\r\nhi", BROKEN, SAME),
    ("bare LF behind a chunk", OK + CHUNKED + b"\r\n2\r\nhi\n0\r\n\r\n", BROKEN, SAME),
    ("ends in the head", OK + b"X: a", BROKEN, SAME),
    ("ends before the head", b"", BROKEN, SAME),
    ("ends in the body", OK + b"Content-Length: 3\r\n\r\nhi", BROKEN, SAME),
    ("ends in a chunk", OK + CHUNKED + b"\r\n3\r\nhi", BROKEN, SAME),
    ("ends before the last chunk", OK + CHUNKED + b"\r\n2\r\nhi\r\n", BROKEN, SAME),
    ("not HTTP", b"SSH-2.0-x\r\n\r\n", BROKEN, SAME),
    ("lower case", b"http/1.1 200 OK\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("no slatencies", b"HTTP/1.1 200OK\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("two slatencies", b"HTTP/1.1  200 OK\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("status 99", b"HTTP/1.1 99 x\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("status 1000", b"HTTP/1.1 1000 x\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    ("status 000", b"HTTP/1.1 000 x\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
    # Only we refuse: framing that two parsers may read differently must not be guessed (T37).
    ("length and coding", OK + CL2 + CHUNKED + b"\r\n" + HI, BROKEN, (200, b"hi")),
    ("coding and length", OK + CHUNKED + CL2 + b"\r\n" + HI, BROKEN, (200, b"hi")),
    ("length twice, the same", OK + CL2 + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("length as a list", OK + b"Content-Length: 2, 2\r\n\r\nhi", BROKEN, (200, b"hi")),
    ("coding in 1.0", b"HTTP/1.0 200 OK\r\n" + CHUNKED + b"\r\n" + HI, BROKEN, (200, b"hi")),
    ("obs-fold", OK + b"X: a\r\n b\r\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("obs-fold with a tab", OK + b"X: a\r\n\tb\r\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("obs-fold behind nothing", OK + b"X:\r\n b\r\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("bare LF everywhere", b"HTTP/1.1 200 OK\n" + b"Content-Length: 2\n\nhi", BROKEN, (200, b"hi")),
    ("bare LF in the head", OK + b"X: a\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("bare LF ends the head", OK + CL2 + b"\nhi", BROKEN, (200, b"hi")),
    ("status 600", b"HTTP/1.1 600 x\r\n" + CL2 + b"\r\nhi", BROKEN, (600, b"hi")),
    ("control character in a value", OK + b"X: a\x01b\r\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("HTTP/2.0", b"HTTP/2.0 200 OK\r\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("HTTP/0.9", b"HTTP/0.9 200 OK\r\n" + CL2 + b"\r\nhi", BROKEN, (200, b"hi")),
    ("space behind a chunk size", OK + CHUNKED + b"\r\n2 \r\nhi\r\n0\r\n\r\n", BROKEN, (200, b"hi")),
    ("length in a trailer", OK + CHUNKED + b"\r\n2\r\nhi\r\n0\r\n" + CL2 + b"\r\n", BROKEN, (200, b"hi")),
    ("obs-fold in a trailer", OK + CHUNKED + b"\r\n2\r\nhi\r\n0\r\nX: a\r\n b\r\n\r\n", BROKEN, (200, b"hi")),
    ("empty line first", b"\r\n" + THEN_OK, BROKEN, SAME),
    ("LF first", b"\n" + THEN_OK, BROKEN, SAME),
    ("RTSP", b"RTSP/1.0 200 OK\r\n" + CL2 + b"\r\nhi", BROKEN, SAME),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "ours", "theirs"), [row[1:] for row in ODD], ids=[row[0] for row in ODD])
async def test_an_odd_response_is_read_or_refused_however_it_is_split(
    raw: bytes, ours: tuple[int, bytes] | None, theirs: tuple[int, bytes] | str | None
) -> None:
    # T37
    whole = await play([raw])
    assert (None if whole.error else (whole.status, whole.body)) == ours
    assert whole.error in (None, UpstreamProtocolError)
    assert await play(raw[i : i + 1] for i in range(len(raw))) == whole
    assert h11_outcome(raw) == (ours if theirs is SAME else theirs)


def test_the_table_lists_every_difference_from_h11() -> None:
    assert [name for name, _, ours, theirs in ODD if theirs != SAME and ours == theirs] == []


@pytest.mark.parametrize(
    "raw",
    [OK + b"Content-Length: 100\r\n\r\n", OK + CHUNKED + b"\r\n", OK + b"\r\n", b"HTTP/1.1 204 x\r\n\r\n"],
)
async def test_the_response_to_head_has_no_body_and_is_not_waited_for(raw: bytes) -> None:
    outcome = await play([raw], b"HEAD", end=False)
    assert (outcome.status in (200, 204), outcome.body, outcome.error) == (True, b"", None)


async def test_a_response_without_body_loses_its_content_length() -> None:
    outcome = await play([b"HTTP/1.1 304 x\r\nContent-Length: 100\r\nETag: a\r\n\r\n"])
    assert response_headers(outcome.headers)[0] == (b"etag", b"a")
    assert b"content-length" not in dict(outcome.headers)


@pytest.mark.parametrize(
    ("raw", "reused"),
    [
        (OK + CL2 + b"\r\nhi", True),
        (OK + CHUNKED + b"\r\n" + HI, True),
        (b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (OK + b"Connection: close\r\n" + CL2 + b"\r\nhi", False),
        (OK + b"Connection: keep-alive, Close\r\n" + CL2 + b"\r\nhi", False),
        (b"HTTP/1.0 200 OK\r\n" + CL2 + b"\r\nhi", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + CL2 + b"\r\nhi", False),
        (THEN_OK + THEN_OK, False),
        (THEN_OK + b"HTT", False),
        (THEN_OK + b"rubbish", False),
        (b"HTTP/1.1 204 x\r\nContent-Length: 2\r\n\r\nhi", False),
    ],
)
async def test_a_connection_is_released_only_after_a_complete_response(raw: bytes, reused: bool) -> None:
    outcome = await play([raw], end=False)
    assert (outcome.error, outcome.reused) == (None, reused)


async def test_a_large_body_is_written_in_pieces_while_others_have_their_turn() -> None:  # T82
    line, body = Line(), b"0123456789" * (BODY_PIECE // 4)
    line.ask(body=body)
    assert line.wire.written == b"head" + body[:BODY_PIECE]
    await asyncio.sleep(0)
    assert line.wire.written == b"head" + body[: 2 * BODY_PIECE]
    line.connection.pause_writing()
    await asyncio.sleep(0)
    line.connection.resume_writing()
    line.connection.pause_writing()
    await asyncio.sleep(0)
    assert line.wire.written == b"head" + body[: 2 * BODY_PIECE]
    line.connection.resume_writing()
    await asyncio.sleep(0)
    assert line.wire.written == b"head" + body


async def test_a_response_before_all_of_the_body_was_written_ends_the_connection() -> None:  # T82
    line = Line()
    waiter = line.ask(body=b"x" * 3 * BODY_PIECE)
    line.receive(b"HTTP/1.1 413 X\r\nContent-Length: 2\r\n\r\nno")
    assert (await waiter).status == 413
    written = line.wire.written
    await asyncio.sleep(0)
    assert (line.wire.written, line.wire.closed, line.owner.back) == (written, "closed", [])


async def test_tiny_chunks_that_nobody_takes_are_joined() -> None:  # T82
    line = Line()
    waiter = line.ask()
    line.receive(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n" + b"2\r\nab\r\n" * (READ_AHEAD // 2 + 1))
    response = await waiter
    assert not line.wire.is_reading()
    assert len(response._chunks) == 1
    assert await response.read() == b"ab" * (READ_AHEAD // 2 + 1)


async def test_a_connection_with_part_of_the_request_unsent_is_not_used_again() -> None:
    line = Line()
    line.wire.unsent = 1
    line.ask()
    line.receive(THEN_OK)
    assert (line.wire.closed, line.owner.back) == ("closed", [])


async def test_unsolicited_bytes_close_an_idle_connection() -> None:
    line = Line()
    line.ask()
    line.receive(THEN_OK)
    line.receive(THEN_OK)
    assert (line.wire.closed, line.owner.lost) == ("closed", [True])


async def test_a_connection_carries_one_request_after_another() -> None:
    line = Line()
    for body in (b"a", b"bc", b""):
        answer = line.ask()
        line.receive(OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert await (await answer).read() == body
    assert line.wire.written == b"headbody" * 3


async def test_a_close_before_the_response_is_stale_on_a_reused_connection() -> None:
    line = Line()
    line.ask()
    line.receive(THEN_OK)
    answer = line.ask()
    line.end()
    assert isinstance(answer.exception(), StaleConnection)
    assert line.owner.stale_after == [0.0]


@pytest.mark.parametrize("size", [HEAD_LIMIT - 1, HEAD_LIMIT, HEAD_LIMIT + 1, 3 * HEAD_LIMIT])
@pytest.mark.parametrize("step", [1000, READ_SIZE])
@pytest.mark.parametrize("where", ["value", "name", "reason", "interim"])
async def test_a_head_is_read_up_to_its_limit(size: int, step: int, where: str) -> None:
    before, after = {
        "value": (OK + b"X: ", b"\r\n" + CL2 + b"\r\n"),
        "name": (OK, b": x\r\n" + CL2 + b"\r\n"),
        "reason": (b"HTTP/1.1 200 ", b"\r\n" + CL2 + b"\r\n"),
        "interim": (b"HTTP/1.1 103 x\r\nX: ", b"\r\n\r\n" + OK + CL2 + b"\r\n"),
    }[where]
    raw = before + b"a" * (size - len(before) - len(after)) + after + b"hi"
    outcome = await play([raw[i : i + step] for i in range(0, len(raw), step)])
    assert (outcome.error is None) == (size <= HEAD_LIMIT)


@pytest.mark.parametrize("count", [FIELD_LIMIT - 1, FIELD_LIMIT])
async def test_a_head_has_a_bounded_number_of_fields(count: int) -> None:
    outcome = await play([OK + CL2 + b"".join(b"X-%d: a\r\n" % i for i in range(count)) + b"\r\nhi"])
    assert (outcome.error is None) == (count < FIELD_LIMIT)


@pytest.mark.parametrize("filler", [b"1;" + b"a" * 4 * HEAD_LIMIT, b"0\r\nX: " + b"a" * 4 * HEAD_LIMIT])
async def test_endless_chunk_extensions_and_trailers_are_refused(filler: bytes) -> None:
    line = Line()
    response = await _head(line, OK + CHUNKED + b"\r\n")
    line.receive(filler)
    assert line.wire.closed == "aborted"
    with pytest.raises(UpstreamProtocolError, match="framing without content"):
        await response.read()


async def _head(line: Line, raw: bytes) -> Response:
    answer = line.ask()
    line.receive(raw)
    return await answer


async def test_bytes_before_a_break_are_delivered_first() -> None:
    # F4
    line = Line()
    response = await _head(line, OK + b"Content-Length: 9\r\n\r\nhello")
    line.end()
    assert await response.read() == b"hello"
    assert not response.complete
    with pytest.raises(
        UpstreamProtocolError, match=r"up\.example:80: the connection closed in the middle of the response"
    ):
        await response.read()


async def test_reading_pauses_at_the_limit_and_resumes_when_the_body_is_read() -> None:
    # T39
    line = Line()
    response = await _head(line, OK + b"Content-Length: 1000000\r\n\r\n")
    line.receive(b"x" * READ_AHEAD)
    assert line.wire.is_reading()
    line.receive(b"x")
    assert not line.wire.is_reading()
    assert len(await response.read()) == READ_AHEAD + 1
    assert line.wire.is_reading()


async def test_a_response_that_ends_while_reading_is_paused_frees_the_connection() -> None:
    line = Line()
    response = await _head(line, OK + b"Content-Length: %d\r\n\r\n" % (2 * READ_AHEAD))
    line.receive(b"x" * READ_AHEAD)
    line.receive(b"x" * READ_AHEAD)
    assert line.wire.is_reading()
    assert line.owner.back == [line.connection]
    assert len(await response.read()) == 2 * READ_AHEAD
    assert response.complete


async def test_closing_an_incomplete_response_aborts_only_its_connection() -> None:
    line = Line()
    response = await _head(line, OK + b"Content-Length: 9\r\n\r\nhello")
    response.close()
    response.close()
    assert (line.wire.closed, line.owner.lost) == ("aborted", [False])
    line = Line()
    response = await _head(line, THEN_OK)
    response.close()
    assert not line.wire.closed


async def test_a_cancelled_read_closes_the_connection() -> None:
    # T40
    line = Line()
    response = await _head(line, OK + b"\r\n")
    reading = asyncio.create_task(response.read())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert line.wire.closed == "aborted"


# A body pushed into callbacks


class Consumer:
    """Keeps what is pushed, in order: the parts of a body, then its end."""

    def __init__(self) -> None:
        self.events: list[bytes | UpstreamError | None] = []

    def on_data(self, data: bytes) -> None:
        self.events.append(data)

    def on_end(self, error: UpstreamError | None) -> None:
        self.events.append(error)

    def follow(self, response: Response) -> None:
        response.consume(self.on_data, self.on_end)


async def test_a_consumer_gets_what_has_arrived_at_once_and_the_rest_read_by_read() -> None:
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + CHUNKED + b"\r\n1\r\na\r\n1\r\nb\r\n")
    consumer.follow(response)
    assert consumer.events == [b"ab"]
    line.receive(b"1\r\nc\r\n1\r\nd\r\n")
    assert consumer.events == [b"ab", b"cd"]
    line.receive(b"1\r\n")
    assert consumer.events == [b"ab", b"cd"]
    line.receive(b"e\r\n0\r\n\r\n")
    assert consumer.events == [b"ab", b"cd", b"e", None]
    assert line.owner.back == [line.connection]
    assert response.complete


@pytest.mark.parametrize("body", [b"hi", b""])
async def test_a_consumer_of_a_whole_body_gets_it_with_its_end_at_once(body: bytes) -> None:
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    consumer.follow(response)
    assert consumer.events == [*([body] if body else []), None]


async def test_whole_is_true_when_the_last_part_is_pushed() -> None:
    line = Line()
    response = await _head(line, OK + CHUNKED + b"\r\n1\r\na\r\n")
    last: list[bool] = []
    response.consume(lambda _: last.append(response.whole), lambda _: None)
    line.receive(b"1\r\nb\r\n0\r\n\r\n")
    assert last == [False, True]


async def test_the_connection_can_be_reused_as_soon_as_the_consumer_gets_the_end() -> None:
    line = Line()
    response = await _head(line, OK + CHUNKED + b"\r\n")
    seen: list[list[HttpConnection]] = []
    response.consume(lambda _: seen.append(list(line.owner.back)), lambda _: seen.append(list(line.owner.back)))
    line.receive(b"1\r\na\r\n0\r\n\r\n")
    assert seen == [[line.connection], [line.connection]]


async def test_a_body_until_close_ends_with_the_connection() -> None:
    line, consumer = Line(), Consumer()
    consumer.follow(await _head(line, OK + b"\r\na"))
    line.end()
    assert consumer.events == [b"a", None]


@pytest.mark.parametrize("how", ["closed", "not HTTP", "expired", "shut down"])
async def test_a_consumer_gets_the_error_of_a_broken_body_once(how: str) -> None:
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + CHUNKED + b"\r\n1\r\na\r\n")
    consumer.follow(response)
    if how == "closed":
        line.connection.eof_received()
    elif how == "not HTTP":
        line.receive(b"1\r\nb\r\nrubbish")
    elif how == "expired":
        response._expire(0.1)
    else:
        line.connection.fail(UpstreamProtocolError("the proxy is shutting down."))
    line.connection.connection_lost(None)
    *parts, error = consumer.events
    assert parts == ([b"a", b"b"] if how == "not HTTP" else [b"a"])
    assert isinstance(error, UpstreamProtocolError)
    assert str(error).startswith("up.example:80: ")


async def test_a_consumer_that_closes_the_response_is_not_called_again() -> None:
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + CHUNKED + b"\r\n1\r\na\r\n")

    def on_data(data: bytes) -> None:
        consumer.on_data(data)
        response.close()

    response.consume(on_data, consumer.on_end)
    line.receive(b"1\r\nb\r\n0\r\n\r\n")
    assert consumer.events == [b"a"]
    assert (line.wire.closed, line.owner.lost) == ("aborted", [False])


async def test_a_consumer_may_pause_reading() -> None:  # T39
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + b"Content-Length: 1000000\r\n\r\n")
    consumer.follow(response)
    response.pause()
    response.pause()
    assert not line.wire.is_reading()
    response.resume()
    assert line.wire.is_reading()
    line.receive(b"x" * 1_000_000)
    assert consumer.events[-1] is None
    # The connection belongs to another response by now.
    response.pause()
    assert line.wire.is_reading()


async def test_a_paused_body_that_ends_frees_a_connection_that_reads() -> None:
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + CHUNKED + b"\r\n")
    response.consume(lambda _: response.pause(), consumer.on_end)
    line.receive(b"1\r\na\r\n")
    assert not line.wire.is_reading()
    line.receive(b"0\r\n\r\n")
    assert consumer.events == [None]
    assert line.wire.is_reading()
    assert line.owner.back == [line.connection]


async def test_a_consumer_takes_over_a_body_that_paused_its_connection() -> None:
    line, consumer = Line(), Consumer()
    response = await _head(line, OK + b"Content-Length: 1000000\r\n\r\n")
    line.receive(b"x" * (READ_AHEAD + 1))
    assert not line.wire.is_reading()
    consumer.follow(response)
    assert line.wire.is_reading()
    assert consumer.events == [b"x" * (READ_AHEAD + 1)]


async def test_the_head_latency_averages_quick_responses_and_follows_a_slow_one_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(connection_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    line = Line()
    latencies = []
    for took in (*[0.00004] * 100, 2.0, *[0.00004] * 100):
        line.ask()
        now[0] += took
        line.receive(THEN_OK)
        latencies.append(line.connection.head_latency)
    assert latencies[0] > BUSY_POLL_THRESHOLD
    assert latencies[99] < BUSY_POLL_THRESHOLD
    assert latencies[100] == pytest.approx(2.0)
    assert latencies[110] > BUSY_POLL_THRESHOLD > latencies[-1]


async def test_each_request_has_its_full_time_on_one_timer() -> None:
    line = Line()
    loop = asyncio.get_running_loop()
    for timeout in (0.3, 60.0, 0.2):
        line.ask(timeout=timeout)
        line.receive(THEN_OK)
    started = loop.time()
    with pytest.raises(UpstreamTimeout, match=r"no answer within 0\.25 s"):
        await line.ask(timeout=0.25)
    assert 0.24 <= loop.time() - started < 5


async def test_a_head_that_does_not_come_in_time_is_a_timeout() -> None:
    line = Line()
    with pytest.raises(UpstreamTimeout, match=r"up\.example:80: no answer within 0\.01 s"):
        await line.ask(timeout=0.01)
    assert line.wire.closed == "aborted"


async def test_a_body_may_be_given_a_deadline() -> None:
    line = Line()
    response = await _head(line, OK + CL2 + b"\r\nh")
    response.expire_after(0.01)
    assert await response.read() == b"h"
    with pytest.raises(UpstreamProtocolError, match=r"not complete after 0\.01 s"):
        await response.read()
    line = Line()
    response = await _head(line, THEN_OK)
    response.expire_after(0.0)
    assert await response.read() == b"hi"


@pytest.mark.parametrize(
    ("value", "life"),
    [(b"timeout=5, max=100", 4.0), (b"Timeout = 1", 0.0), (b"timeout=0", 0.0), (b"max=3", None), (b"timeout=-1", None),
     (b"timeout=99999999999999", None), (b"", None)],
)  # fmt: skip
async def test_the_announced_idle_timeout_is_shortened_by_a_second(value: bytes, life: float | None) -> None:
    line = Line()
    await _head(line, OK + CL2 + b"Keep-Alive: " + value + b"\r\n\r\nhi")
    assert line.connection.idle_timeout == (float("inf") if life is None else life)


async def test_a_large_body_is_sent_whole() -> None:
    got: list[bytes] = []

    async def script(peer: Peer) -> None:
        got.append(await peer.request())
        await peer.send(THEN_OK)
        await peer.until_gone()

    body = bytes(range(256)) * 16_384
    async with RawServer(script) as server:
        upstream = HttpClient(connections_per_origin=1)
        origin = parse(server.url).origin
        head = b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
        response = await upstream.send(origin, head, body, method=b"POST", head_timeout=5)
        assert await response.read() == b"hi"
        await upstream.aclose()
    assert got == [head + body]


# Bytes at random


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@st.composite
def valid_responses(draw: st.DrawFn) -> tuple[bytes, int, bytes]:
    """A response, its status and its body."""
    interim = b"".join(
        draw(st.lists(st.sampled_from([b"HTTP/1.1 100 x\r\n\r\n", b"HTTP/1.1 103\r\nA: b\r\n\r\n"]), max_size=2))
    )
    status = draw(st.sampled_from([200, 202, 400, 404, 503]))
    names = st.from_regex(rb"\AX-[A-Za-z0-9!#$%&'*+.^_`|~-]{0,8}\Z")
    values = st.from_regex(rb"\A([!-~\x80-\xff]([ -~\t]{0,10}[!-~])?)?\Z")
    head = b"".join(b"%s:%s%s\r\n" % (n, draw(st.sampled_from([b"", b" ", b"\t "])), v)
                    for n, v in draw(st.lists(st.tuples(names, values), max_size=4)))  # fmt: skip
    parts = draw(st.lists(st.binary(min_size=1, max_size=30), max_size=4))
    body = b"".join(parts)
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    if framing == "length":
        rest = b"content-length: %d\r\n\r\n%s" % (len(body), body)
    elif framing == "chunked":
        chunks = b"".join(b"%x%s\r\n%s\r\n" % (len(p), draw(st.sampled_from([b"", b";a", b";a=b"])), p) for p in parts)
        rest = (
            b"Transfer-Encoding: Chunked\r\n\r\n"
            + chunks
            + b"0\r\n"
            + draw(st.sampled_from([b"", b"T: x\r\n"]))
            + b"\r\n"
        )
    else:
        rest = b"\r\n" + body
    return interim + b"HTTP/1.1 %d x\r\n" % status + head + rest, status, body


def cut(raw: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(place % (len(raw) + 1) for place in at)})
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


places = st.lists(st.integers(0, 2000), max_size=12)


@settings(deadline=None, max_examples=150)
@given(valid_responses(), places)
def test_a_valid_response_is_read_the_same_whatever_the_split(
    runner: asyncio.Runner, response: tuple[bytes, int, bytes], at: list[int]
) -> None:
    raw, status, body = response
    outcome = runner.run(play(cut(raw, at)))
    assert (outcome.status, outcome.body, outcome.error) == (status, body, None)
    assert outcome == runner.run(play([raw]))


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda b: OK + b)), places)
@example(b"H", [])
def test_any_bytes_end_in_a_response_or_an_upstream_error(runner: asyncio.Runner, raw: bytes, at: list[int]) -> None:
    assert runner.run(play(cut(raw, at))) == runner.run(play([raw]))


@settings(deadline=None, max_examples=300)
@given(
    valid_responses(),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.sampled_from(b"\r\n\0 :;,\t0f\xffHT") ), max_size=3),
    places,
)  # fmt: skip
def test_a_damaged_response_has_the_same_outcome_whatever_the_split(
    runner: asyncio.Runner, response: tuple[bytes, int, bytes], damage: list[tuple[int, int, int]], at: list[int]
) -> None:
    raw = bytearray(response[0])
    for place, removed, added in damage:
        start = place % (len(raw) or 1)
        raw[start : start + removed] = bytes([added])
    whole = runner.run(play([bytes(raw)]))
    assert runner.run(play(cut(bytes(raw), at))) == whole
    assert whole.error in (None, UpstreamProtocolError)
