"""Requests of clients and responses of servers. Each input is what one side of a connection sends.

Every input is cut in several ways, which must not change what is read. What is accepted is read by h11 too: it may
refuse more, but must not read another message, and must read the head that is sent on as one head.
"""

import asyncio
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import h11

from fuzz.checks import check_error, check_fields, cuttings
from mcp_auth_proxy.errors import RequestRejected, UpstreamError
from mcp_auth_proxy.net.http_connection import FIELD_LIMIT, READ_SIZE, HttpConnection
from mcp_auth_proxy.net.http_head import Fields
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.net.request_parser import MAX_FIELDS, MAX_HEAD, RequestHead, RequestParser
from mcp_auth_proxy.proxy.headers import encoded_response_fields, request_head

H11_LIMIT = 2 * MAX_HEAD

AUTHORIZATION = b"Bearer of-the-proxy"


@dataclass(slots=True)
class Message:
    """A message as one of the parsers read it."""

    start: tuple[bytes | int, ...]
    """Method and target, or the status."""
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    complete: bool = False
    length: int | None = None


@dataclass(slots=True)
class Requests:
    """The requests that ``RequestParser`` reports, and the status of the refusal that ends them, or 0."""

    heads: list[RequestHead] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    ended: int = 0
    status: int = 0

    def on_request(self, head: RequestHead) -> None:
        assert self.ended == len(self.heads), "a head before the end of the request before"
        self.heads.append(head)
        self.bodies.append(b"")

    def on_body(self, data: bytes) -> None:
        assert data, "an empty part of a body"
        assert self.ended == len(self.heads) - 1, "a body without a head"
        self.bodies[-1] += data

    def on_request_end(self) -> None:
        self.ended += 1
        assert self.ended == len(self.heads), "an end without a head"


def read_requests(parts: Iterable[bytes]) -> Requests:
    requests = Requests()
    parser = RequestParser(requests)
    try:
        for part in parts:
            parser.feed(part)
    except RequestRejected as error:
        requests.status = error.status
        check_error(error)
    finally:
        parser.close()
    return requests


def request(data: bytes) -> None:
    """Check what is read of a client's bytes."""
    whole, *others = map(read_requests, cuttings(data))
    assert all(other == whole for other in others), "another result if the bytes come in other pieces"
    assert whole.status in (0, 400, 431, 501), f"refused with {whole.status}"
    assert sum(map(len, whole.bodies)) <= len(data), "more body than came"
    for number, head in enumerate(whole.heads):
        _check_request(head, whole.bodies[number] if number < whole.ended else None)
    _compare_requests(data, whole)


def _check_request(head: RequestHead, body: bytes | None) -> None:
    check_fields(head.headers)
    assert len(head.headers) <= MAX_FIELDS, "too many fields"
    assert sum(name == b"host" for name, _ in head.headers) == 1, "not one Host"
    assert head.path.startswith(b"/"), f"not a path: {head.path!r}"
    assert head.http_version in ("1.0", "1.1")
    if body is not None and head.content_length is not None:
        assert len(body) == head.content_length, "a body of another length"
    sent = request_head(b"POST", b"/mcp", b"h", head.fields, AUTHORIZATION, head.content_length)
    server = h11.Connection(h11.SERVER, H11_LIMIT)
    server.receive_data(sent)
    event = server.next_event()
    assert isinstance(event, h11.Request), f"sent on as {event!r}"
    assert server.trailing_data == (b"", False), "sent on as more than a head"
    fields = dict(event.headers)
    assert [value for name, value in event.headers if name == b"authorization"] == [AUTHORIZATION]
    assert not {b"cookie", b"transfer-encoding", b"upgrade", b"connection"} & fields.keys()
    assert fields[b"host"] == b"h"


def _compare_requests(data: bytes, ours: Requests) -> None:
    for number, (head, theirs) in enumerate(zip(ours.heads, _requests_of_h11(data), strict=False)):
        target = head.path + (b"?" + head.query if head.query else b"")
        method, their_target = theirs.start
        assert isinstance(their_target, bytes)
        assert (method, their_target.removesuffix(b"?")) == (head.method, target), f"h11 reads {theirs!r}"
        left = [(name, value) for name, value in theirs.fields if name not in (b"upgrade", b"content-length")]
        assert left == _as_h11_spells(head.headers), f"h11 reads {left}"
        if number < ours.ended:
            assert not theirs.complete or ours.bodies[number] == theirs.body, f"h11 reads the body {theirs.body!r}"
        else:
            assert not theirs.complete or ours.status, "h11 reads the end of the request"


def _as_h11_spells(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in fields]


def _requests_of_h11(data: bytes) -> list[Message]:
    found: list[Message] = []
    if not data:
        return found  # to h11 it is the end of the connection
    server = h11.Connection(h11.SERVER, H11_LIMIT)
    server.receive_data(data)
    try:
        while (event := server.next_event()) is not h11.NEED_DATA and event is not h11.PAUSED:
            if isinstance(event, h11.Request):
                found.append(Message((event.method, event.target), list(event.headers)))
            elif isinstance(event, h11.Data):
                found[-1].body += event.data
            elif isinstance(event, h11.EndOfMessage):
                found[-1].complete = True
                server.send(h11.Response(status_code=204, headers=[]))
                server.send(h11.EndOfMessage())
                if server.our_state is not h11.DONE or server.their_state is not h11.DONE:
                    break
                server.start_next_cycle()
    except h11.ProtocolError:
        pass
    return found


class Wire(asyncio.Transport):
    """A connection on which nothing is sent."""

    def __init__(self) -> None:
        super().__init__()
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def abort(self) -> None:
        self._closing = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


class Pool:
    """The owner of a connection, and the receiver of its response."""

    name = ""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ_SIZE))
        self.reused = False
        self.response: Response | None = None
        self.error: UpstreamError | None = None

    def connection_released(self, connection: HttpConnection) -> None:
        self.reused = True

    def connection_stale(self, connection: HttpConnection) -> None:
        raise AssertionError("stale at its first use")

    def connection_closed(self, connection: HttpConnection, *, idle: bool) -> None:
        self.reused = False

    def done(self) -> bool:
        return False

    def set_result(self, result: Response, /) -> None:
        assert self.response is None and self.error is None, "a second result"
        self.response = result

    def set_exception(self, exception: UpstreamError, /) -> None:
        assert self.response is None and self.error is None, "a second result"
        self.error = exception


_RUNNER = asyncio.Runner()
_SOCKET = socket.socket()


async def _read_response(parts: Sequence[bytes], bodiless: bool) -> tuple[Message | None, str]:
    """Return the response and the error that ended it. A connection that can be used again is used again."""
    pool = Pool()
    connection = HttpConnection(pool, _SOCKET)
    connection.connection_made(Wire())
    connection.send(pool, b"", b"", bodiless=bodiless, timeout=60)
    _receive(connection, parts)
    if pool.reused:
        await _check_reuse(connection)
    elif not connection.closed:
        connection.eof_received()
    connection.connection_lost(None)
    if pool.error is not None:
        check_error(pool.error)
        return None, str(pool.error)
    response = pool.response
    assert response is not None, "neither a response nor an error"
    message = Message((response.status,), response.fields.headers, response.take(), response.whole)
    message.length = response.content_length
    try:
        await response.read()
    except UpstreamError as error:
        check_error(error)
        return message, str(error)
    return message, ""


def _receive(connection: HttpConnection, parts: Iterable[bytes]) -> None:
    for part in parts:
        for start in range(0, len(part), READ_SIZE):
            piece = part[start : start + READ_SIZE]
            connection.get_buffer(-1)[: len(piece)] = piece
            connection.buffer_updated(len(piece))


async def _check_reuse(connection: HttpConnection) -> None:
    """Check that nothing of the response before is left to become a part of the next one."""
    waiter = Pool()
    connection.send(waiter, b"", b"", bodiless=False, timeout=60)
    _receive(connection, [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond"])
    assert waiter.response is not None, f"no second response: {waiter.error!r}"
    assert (waiter.response.whole, waiter.response.fields.headers) == (True, []), "another second response"
    assert waiter.response.take() == b"second", "another second response"


def response(data: bytes) -> None:
    """Check what is read of a server's bytes, as the response to a POST and to HEAD."""
    for bodiless in (False, True):
        whole, *others = [_RUNNER.run(_read_response(parts, bodiless)) for parts in cuttings(data)]
        assert all(other == whole for other in others), "another result if the bytes come in other pieces"
        message, error = whole
        assert message is not None or error, "neither a response nor an error"
        if message is not None:
            _check_response(message, data, bodiless)


def _check_response(message: Message, data: bytes, bodiless: bool) -> None:
    check_fields(message.fields)
    assert len(message.fields) <= FIELD_LIMIT, "too many fields"
    (status,) = message.start
    assert isinstance(status, int) and 200 <= status <= 599, f"the status {status!r}"
    assert len(message.body) <= len(data), "more body than came"
    assert not (bodiless and message.body), "a body in response to HEAD"
    if message.complete and message.length is not None and not bodiless:
        assert len(message.body) == message.length, "a body of another length"
    sent = b"HTTP/1.1 200 OK\r\n%s\r\n" % encoded_response_fields(Fields(message.fields))
    client = h11.Connection(h11.CLIENT, H11_LIMIT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
    client.receive_data(sent)
    event = client.next_event()
    assert isinstance(event, h11.Response), f"sent on as {event!r}"
    assert client.trailing_data == (b"", False), "sent on as more than a head"
    assert not {b"set-cookie", b"www-authenticate", b"connection"} & {name for name, _ in event.headers}
    theirs = _response_of_h11(data, bodiless)
    if theirs is None or not message.complete:
        return
    assert theirs.start == message.start, f"h11 reads {theirs!r}"
    left = [(name, value) for name, value in theirs.fields if name != b"content-length"]
    assert left == _as_h11_spells(message.fields), f"h11 reads {left}"
    if theirs.complete:
        assert theirs.body == message.body, f"h11 reads the body {theirs.body!r}"


def _response_of_h11(data: bytes, bodiless: bool) -> Message | None:
    client = h11.Connection(h11.CLIENT, H11_LIMIT)
    client.send(h11.Request(method="HEAD" if bodiless else "POST", target="/", headers=[("host", "h")]))
    client.send(h11.EndOfMessage())
    found: Message | None = None
    try:
        if data:
            client.receive_data(data)
        client.receive_data(b"")
        while (event := client.next_event()) is not h11.NEED_DATA and event is not h11.PAUSED:
            if isinstance(event, h11.Response):
                found = Message((event.status_code,), list(event.headers))
            elif isinstance(event, h11.Data) and found is not None:
                found.body += event.data
            elif isinstance(event, h11.EndOfMessage) and found is not None:
                found.complete = True
                break
            elif isinstance(event, h11.ConnectionClosed):
                break
    except h11.ProtocolError:
        pass
    return found
