"""Comments in event streams whose server is silent: when they are sent, and where they are not."""

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fakes.forwarding import ForwardingServer, ScriptedBroker, access_token, forwarding, pending_authorization
from fakes.proxy import until
from fakes.raw_client import RawClient
from fakes.raw_server import Peer, RawServer, ok
from mcp_auth_proxy.config.settings import AuthorizationSettings, LimitSettings
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.proxy import consent_wait, pings
from mcp_auth_proxy.proxy.pings import Pings, _Stream

INTERVAL = 0.05
PING = b": ping\n\n"
PINGED = b"8\r\n: ping\n\n\r\n"
CALL = b'{"jsonrpc":"2.0","id":9,"method":"tools/call","params":{"name":"pay"}}'
TYPE = "Content-Type: text/event-stream"
CHUNKED = "Transfer-Encoding: chunked"


def head(*fields: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# Where: between two events, however they are cut and whatever ends their lines


class Recorder:
    """A request whose client reads, or not."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.on_write: Callable[[bytes], None] = lambda data: None
        self.started = self.may_write = True
        self.complete = False

    def write_nowait(self, data: bytes) -> None:
        self.sent.append(data)
        self.on_write(data)


def watched() -> tuple[_Stream, Recorder]:
    request = Recorder()
    streams: OrderedDict[ClientRequest, _Stream] = OrderedDict()
    stream = _Stream(streams, cast(ClientRequest, request), float)
    streams[cast(ClientRequest, request)] = stream
    request.on_write = stream.wrote
    return stream, request


def dispatched(stream: bytes) -> list[list[bytes]]:
    """The events as WHATWG HTML §9.2.6 reads them: the lines of each, without comments."""
    events: list[list[bytes]] = [[]]
    for line in re.split(rb"\r\n|\n|\r", stream):
        if not line:
            events.append([])
        elif not line.startswith(b":"):
            events[-1].append(line)
    return [event for event in events if event]


def pinged_after(*parts: bytes) -> bytes:
    """The stream, with a silence after each part."""
    stream, request = watched()
    for part in parts:
        request.write_nowait(part)
        stream.ping()
    return b"".join(request.sent)


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"\n\n", b":", b"data: x", b"id", b""]), max_size=14))
@example([b"data: x\r\n\r", b"\n", b"data: y\r\n\r\n"])
@example([b"data: x\r", b"\r\n", b"data: y\n\n"])
@example([b"data: x\r\r", b"data: y\r\r"])
def test_comments_change_no_event_whatever_its_line_ends_and_wherever_it_is_cut(parts: list[bytes]) -> None:
    assert dispatched(pinged_after(*parts)) == dispatched(b"".join(parts))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\r\n", b"\n\r"])
def test_a_comment_follows_an_event_however_its_end_is_cut(end: bytes) -> None:
    event = b"data: x" + end
    for cut in range(len(event) - len(end), len(event)):
        assert pinged_after(event[:cut], event[cut:]).endswith(PING)
    assert pinged_after(*[event[at : at + 1] for at in range(len(event))]).endswith(PING)


@pytest.mark.parametrize("part", [b"d", b"data: x\n", b"data: x\r\n", b"data: x\r", b"data: x\r\n\r", b": note\n"])
def test_nothing_is_sent_within_an_event(part: bytes) -> None:
    assert pinged_after(part) == part


def test_a_stream_without_events_yet_gets_a_comment() -> None:
    assert pinged_after(b"") == PING


@pytest.mark.parametrize(("name", "value"), [("may_write", False), ("complete", True), ("started", False)])
def test_nothing_is_sent_to_a_client_that_does_not_read_or_has_its_response(name: str, value: bool) -> None:
    stream, request = watched()
    setattr(request, name, value)
    stream.ping()
    assert request.sent == []


# When: after a silence


@asynccontextmanager
async def streaming(
    *parts: bytes, fast: bool = False, lines: str = "", interval: float = INTERVAL
) -> AsyncIterator[tuple[RawClient, Callable[[bytes], None], ForwardingServer]]:
    """A client of a server that answers with ``parts`` and then with what the yielded function is given."""
    more: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(peer: Peer) -> None:
        if fast:
            await peer.request()
            await peer.send(ok())
        await peer.request()
        for part in parts:
            await peer.send(part)
        while data := await more.get():
            await peer.send(data)

    broker = ScriptedBroker(access_token(1))
    async with (
        RawServer(script) as upstream,
        forwarding(broker, upstream.url, sse_ping=interval) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        if fast:
            client.post(CALL)
            await client.answer()
            client.post(CALL)
        else:
            client.send(lines or "GET /notes/mcp HTTP/1.1\nHost: HOST\nAccept: text/event-stream\n\n")
        try:
            yield client, more.put_nowait, proxy
        finally:
            more.put_nowait(b"")


async def seconds(wanted: int = 3) -> None:
    """Wait until a silent stream has had some comments, in which time any other would have had one too."""
    async with streaming(head(TYPE, CHUNKED)) as (client, _, _), asyncio.timeout(10):
        await client.head()
        assert await client.reader.readexactly(wanted * len(PINGED)) == wanted * PINGED


@pytest.mark.parametrize("fast", [False, True], ids=["slow-path", "fast-path"])
async def test_a_silent_stream_gets_comments_between_its_events(fast: bool) -> None:
    event = chunk(b"data: 1\n\n")
    async with streaming(head(TYPE, CHUNKED), event, fast=fast) as (client, send, proxy), asyncio.timeout(10):
        status, fields = await client.head()
        assert (status, dict(fields)["x-accel-buffering"]) == (200, "no")
        assert len(proxy.forwarder.fast_requests) == fast
        for data in (event, PINGED, PINGED):
            assert await client.reader.readexactly(len(data)) == data
        begun = chunk(b"data: 2\n")
        send(begun)
        received = b""
        while begun not in received:
            received += await client.reader.read(1000)
        assert received.removesuffix(begun).replace(PINGED, b"") == b""
        await seconds()
        send(chunk(b"\n") + b"0\r\n\r\n")
        assert await client.reader.readexactly(len(chunk(b"\n"))) == chunk(b"\n")
        rest = await client.reader.readuntil(b"0\r\n\r\n")
        assert rest.replace(PINGED, b"") == b"0\r\n\r\n"
        await until(lambda: not proxy.forwarder.pings._streams, "a stream that is forgotten")


@pytest.mark.parametrize(
    "parts",
    [
        (head(TYPE, CHUNKED, "Content-Encoding: gzip"), chunk(b"\x1f\x8b\n\n")),
        (head("Content-Type: application/json", CHUNKED), chunk(b"{}\n\n")),
        (head("Content-Type: text/plain", CHUNKED), chunk(b"\n\n")),
        (head(TYPE, "Content-Length: 90"), b"data: 1\n\n"),
        (head(TYPE, CHUNKED, status="404 Not Found"), chunk(b"data: 1\n\n")),
    ],
    ids=["encoded", "json", "text", "length", "error"],
)
@pytest.mark.parametrize("fast", [False, True], ids=["slow-path", "fast-path"])
async def test_only_a_plain_event_stream_gets_comments(parts: tuple[bytes, ...], fast: bool) -> None:
    async with streaming(*parts, fast=fast) as (client, _, _), asyncio.timeout(10):
        await client.head()
        assert await client.reader.readexactly(len(parts[1])) == parts[1]
        await seconds()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), 0.001)


async def test_an_identity_encoding_is_none() -> None:
    async with streaming(head(TYPE, CHUNKED, "Content-Encoding: Identity")) as (client, _, _), asyncio.timeout(10):
        await client.head()
        assert await client.reader.readexactly(len(PINGED)) == PINGED


async def test_a_client_of_http_1_0_gets_comments_without_chunks() -> None:
    lines = "GET /notes/mcp HTTP/1.0\nHost: HOST\nAccept: text/event-stream\n\n"
    async with streaming(head(TYPE, CHUNKED), lines=lines) as (client, send, _), asyncio.timeout(10):
        await client.head()
        assert await client.reader.readexactly(2 * len(PING)) == 2 * PING
        send(chunk(b"data: 1\n\n") + b"0\r\n\r\n")
        assert (await client.rest()).replace(PING, b"") == b"data: 1\n\n"


@pytest.mark.parametrize("status", ["200 OK", "304 Not Modified"])
async def test_a_response_without_a_body_gets_none(status: str) -> None:
    """The connection is used again: a comment would be read as the next response."""
    lines = "HEAD /notes/mcp HTTP/1.1\nHost: HOST\nAccept: text/event-stream\n\n"
    async with streaming(head(TYPE, status=status), lines=lines) as (client, _, proxy), asyncio.timeout(10):
        assert (await client.head())[0] == int(status[:3])
        assert not proxy.forwarder.pings._streams


async def test_a_slow_reader_gets_none_and_holds_the_server_back() -> None:
    # T39, T82
    size = 1 << 16
    event = b"data: " + b"x" * (size - 8) + b"\n\n"
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(head(TYPE, CHUNKED))
        for _ in range(400):
            await peer.send(chunk(event))
            sent += 1
        await peer.send(b"0\r\n\r\n")
        await peer.until_gone()

    broker = ScriptedBroker(access_token(1))
    async with (
        RawServer(script) as upstream,
        forwarding(broker, upstream.url, sse_ping=INTERVAL) as proxy,
        RawClient.to(proxy.origin, buffer=64 * 1024) as client,
    ):
        client.get()
        await client.head()
        (request,) = proxy.forwarder.pings._streams
        await until(lambda: not request.may_write, "a client that does not keep up")
        before, total = request.sent, proxy.forwarder.memory.total
        await seconds()
        assert (request.sent, proxy.forwarder.memory.total) == (before, total)
        assert sent < 400
        body, ended = await client._chunks()
        assert (body.replace(PING, b"") == event * 400, ended) == (True, True)


async def test_a_held_request_gets_comments_while_its_server_thinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", INTERVAL)
    thinking = asyncio.Event()
    answer = b'{"jsonrpc":"2.0","id":9,"result":{}}'

    async def script(peer: Peer) -> None:
        await peer.request()
        await thinking.wait()
        await peer.send(head("Content-Type: application/json", f"Content-Length: {len(answer)}") + answer)
        await peer.until_gone()

    broker = ScriptedBroker()
    broker.waiting = pending = pending_authorization()
    async with (
        RawServer(script) as upstream,
        forwarding(broker, upstream.url, sse_ping=INTERVAL) as proxy,
        RawClient.to(proxy.origin) as client,
        asyncio.timeout(10),
    ):
        client.post(CALL, "Accept: application/json, text/event-stream")
        assert dict((await client.head())[1])["content-type"] == "text/event-stream"
        assert b"waiting for the user" in await client.reader.readuntil(b"\n\n\r\n")
        pending.release(access_token(1))
        while PING not in await client.reader.readuntil(b"\n\n\r\n"):
            pass
        thinking.set()
        assert dispatched((await client._chunks())[0]) == [[b"event: message", b"data: " + answer]]


async def test_a_reload_changes_the_interval_and_0_turns_comments_off() -> None:
    limits = [LimitSettings(sse_ping=interval) for interval in (INTERVAL, 0.0)]
    async with streaming(head(TYPE, CHUNKED), interval=3600.0) as (client, _, proxy), asyncio.timeout(10):
        await client.head()
        proxy.forwarder.configure(
            limits=limits[0], authorization=AuthorizationSettings(cold_start=False), several=False
        )
        assert await client.reader.readexactly(len(PINGED)) == PINGED
        proxy.forwarder.configure(
            limits=limits[1], authorization=AuthorizationSettings(cold_start=False), several=False
        )
        (request,) = proxy.forwarder.pings._streams
        before = request.sent
        await seconds()
        assert request.sent == before
    async with streaming(head(TYPE, CHUNKED), interval=0.0) as (client, _, proxy):
        await client.head()
        assert not proxy.forwarder.pings._streams


async def test_many_streams_take_turns_in_the_order_of_their_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pings, "MAX_AT_ONCE", 2)
    watcher = Pings(INTERVAL)
    requests = [Recorder() for _ in range(7)]
    for request in requests:
        watcher.watch(cast(ClientRequest, request))
    await until(lambda: all(request.sent for request in requests), "a comment for each")
    requests[0].write_nowait(b"data: 1\n\n")
    assert next(reversed(cast(Any, watcher._streams))) is requests[0]
    for request in requests:
        watcher.forget(cast(ClientRequest, request))
    assert not watcher._streams
