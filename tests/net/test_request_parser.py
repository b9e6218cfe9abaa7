"""The request parser: bytes in, events out."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_auth_proxy.errors import RequestRejected
from mcp_auth_proxy.net.http_head import Fields
from mcp_auth_proxy.net.request_parser import MAX_FIELDS, MAX_HEAD, RequestHead, RequestParser

END = "end"
GET = b"GET /good HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"POST /good HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"

Event = RequestHead | bytes | str


class Events:
    """Record the events; the parts of one body are joined."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_request(self, head: RequestHead) -> None:
        self.events.append(head)

    def on_body(self, data: bytes) -> None:
        assert data
        last = self.events[-1]
        if isinstance(last, bytes):
            self.events[-1] = last + data
        else:
            self.events.append(data)

    def on_request_end(self) -> None:
        self.events.append(END)


def parse(parts: Iterable[bytes]) -> tuple[list[Event], int]:
    """Return the events, and the status of the refusal that ends them, or 0."""
    record = Events()
    parser = RequestParser(record)
    status = 0
    try:
        for part in parts:
            parser.feed(part)
    except RequestRejected as error:
        status = error.status
    parser.close()
    return record.events, status


def events_of(*parts: bytes) -> list[Event]:
    events, status = parse(parts)
    assert status == 0
    return events


def head_of(*parts: bytes) -> RequestHead:
    head = events_of(*parts)[0]
    assert isinstance(head, RequestHead)
    return head


def bodies_of(*parts: bytes) -> list[bytes]:
    """Return the bodies of the requests that are complete."""
    bodies: list[bytes] = []
    body = b""
    for event in events_of(*parts):
        if isinstance(event, bytes):
            body = event
        elif event == END:
            bodies.append(body)
            body = b""
    return bodies


def post(body: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join([b"POST /good HTTP/1.1", b"Host: a", b"Content-Length: %d" % len(body), *fields, b"", body])


def chunks(*parts: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailers + b"\r\n"


# Requests


def test_a_request_without_a_body() -> None:
    request = b"GET //a/%2e%2e/%2F;x?q=%20&q HTTP/1.1\r\nHOST: a:1\r\nX-A:  b c\r\nX-Empty:\r\nx-a: d\r\n\r\n"
    fields = [(b"host", b"a:1"), (b"x-a", b"b c"), (b"x-empty", b""), (b"x-a", b"d")]
    head = RequestHead(
        method=b"GET",
        path=b"//a/%2e%2e/%2F;x",
        query=b"q=%20&q",
        headers=fields,
        host=b"a:1",
        http_version="1.1",
        keep_alive=True,
        expects_continue=False,
        content_length=None,
        fields=Fields(fields),
    )
    assert events_of(request) == [head, END]


def test_white_space_around_a_value_is_not_part_of_it() -> None:
    """RFC 9112 §5: also after it, and also in fields that are checked."""
    fields = (b"X-A: \t b c \t", b"X-B: \t ", b"Expect: 100-continue ", b"Transfer-Encoding: chunked ")
    request = b"POST / HTTP/1.1\r\nHost: a \r\n%s\r\n\r\n" % b"\r\n".join(fields)
    for again in heads_of((request + chunks(b"a")) * 2):
        assert (again.host, again.expects_continue) == (b"a", True)
        assert again.headers[:3] == [(b"host", b"a"), (b"x-a", b"b c"), (b"x-b", b"")]


def test_a_body_with_content_length() -> None:
    head = head_of(post(b"hello"))
    assert (head.method, head.headers, head.content_length) == (b"POST", [(b"host", b"a")], 5)
    assert events_of(post(b"hello")) == [head, b"hello", END]


def test_a_body_in_chunks() -> None:
    head = head_of(CHUNKED)
    assert events_of(CHUNKED + chunks(b"he", b"llo")) == [head, b"hello", END]
    assert events_of(CHUNKED + chunks()) == [head, END]


def heads_of(*parts: bytes) -> list[RequestHead]:
    return [event for event in events_of(*parts) if isinstance(event, RequestHead)]


def test_requests_with_the_same_fields_share_them_whatever_their_length() -> None:
    first, second, other, third = heads_of(post(b"a"), post(b"bcd"), post(b"", b"X: y"), post(b"e"))
    assert first.fields is second.fields
    assert (first.content_length, second.content_length) == (1, 3)
    assert other.headers == [(b"host", b"a"), (b"x", b"y")]
    assert third.headers == first.headers


def test_fields_that_are_not_usual_are_checked_each_time() -> None:
    page = b"GET / HTTP/1.1\r\nHost: a\r\nOrigin: http://a\r\n\r\n"
    usual, first, second, again = heads_of(GET, page, page, GET)
    assert (usual.host, first.host, second.host, again.host) == (b"a", b"", b"", b"a")
    assert parse([GET, b"GET / HTTP/1.1\r\n\r\n"])[1] == 400
    assert parse([GET, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"])[1] == 400


def test_a_head_does_not_show_its_fields() -> None:
    assert "secret" not in repr(head_of(GET[:-2] + b"Authorization: secret\r\n\r\n"))


def test_pipelined_requests() -> None:
    assert bodies_of(post(b"a") + GET + CHUNKED + chunks(b"b", b"c") + post(b"d")) == [b"a", b"", b"bc", b"d"]


def test_a_request_is_complete_with_its_last_byte() -> None:
    record = Events()
    parser = RequestParser(record)
    assert parser.idle
    parser.feed(b"\r\n")
    assert (parser.idle, parser.in_head, parser.in_body) == (False, False, False)
    parser.feed(post(b"ab")[:-10])
    assert (parser.in_head, parser.in_body, record.events) == (True, False, [])
    parser.feed(post(b"ab")[-10:-1])
    assert (parser.in_head, parser.in_body, record.events[1:]) == (False, True, [b"a"])
    parser.feed(b"b")
    assert (parser.idle, record.events[1:]) == (True, [b"ab", END])
    parser.close()


@pytest.mark.parametrize(
    ("version", "fields", "keep_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: keep-alive\r\n", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.1", b"Connection: x, close\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_whether_the_connection_is_kept(version: bytes, fields: bytes, keep_alive: bool) -> None:
    head = head_of(b"GET / HTTP/%s\r\nHost: a\r\n%s\r\n" % (version, fields))
    assert (head.http_version.encode(), head.keep_alive) == (version, keep_alive)


def test_nothing_follows_a_request_that_closes_the_connection() -> None:
    assert len(bodies_of(post(b"a", b"Connection: close") + GET)) == 1


@pytest.mark.parametrize(
    ("version", "value", "expects"),
    [
        (b"1.1", b"100-continue", True),
        (b"1.1", b"100-Continue", True),
        (b"1.1", b"x", False),
        (b"1.0", b"100-continue", False),
    ],
)
def test_expect(version: bytes, value: bytes, expects: bool) -> None:
    request = b"POST / HTTP/%s\r\nHost: a\r\nContent-Length: 1\r\nExpect: %s\r\n\r\n" % (version, value)
    assert head_of(request).expects_continue is expects


@pytest.mark.parametrize("field", [b"Origin: http://a", b"Origin:", b"Sec-Fetch-Site: same-origin"])
def test_a_request_of_a_web_page_is_not_trusted_by_its_host(field: bytes) -> None:
    head = head_of(post(b"", field))
    assert head.host == b""
    assert (b"host", b"a") in head.headers


# Refusals

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
    "fragment": (400, b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
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
    "folded field": (400, b"POST / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n"),
    "chunked is not last": (
        400,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ),
    "chunked in 1.0": (400, b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "bad chunk size": (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    "signed chunk size": (400, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n"),
    "a tunnel": (501, b"CONNECT /good HTTP/1.1\r\nHost: a\r\n\r\n"),
    "an echo of the token": (405, b"TRACE /good HTTP/1.1\r\nHost: a\r\n\r\n"),
    "unknown coding": (
        501,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    "unknown coding in a field of its own": (
        501,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "chunked twice": (
        400,
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    "bare LF": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "bare CR in a field": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n"),
    "NUL in a field": (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n"),
    "not HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # T88
    "RTSP": (400, b"GET /good RTSP/1.0\r\nHost: a\r\n\r\n"),
    "RTSP with the version of HTTP": (400, b"POST /good RTSP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na"),
    "RTSP after many spaces": (400, b"OPTIONS /good" + b" " * 100 + b"RTSP/1.0\r\nHost: a\r\n\r\n"),
    "RTSP with a long target": (400, b"GET /" + b"a" * 300 + b" RTSP/1.0\r\nHost: a\r\n\r\n"),
    "a method of RTSP": (400, b"DESCRIBE /good RTSP/1.0\r\nHost: a\r\n\r\n"),
    "a method of RTSP in HTTP": (400, b"DESCRIBE /good HTTP/1.1\r\nHost: a\r\n\r\n"),
    "ICE": (400, b"SOURCE /good ICE/1.0\r\nHost: a\r\n\r\n"),
    "ICE with the version of HTTP": (400, b"SOURCE /good ICE/1.1\r\nHost: a\r\n\r\n"),
    "HTTP/0.9": (400, b"GET /good HTTP/0.9\r\nHost: a\r\n\r\n"),
    "HTTP/1.2": (400, b"GET /good HTTP/1.2\r\nHost: a\r\n\r\n"),
    "no version": (400, b"GET /good\r\nHost: a\r\n\r\n"),
    "HTTP/2 preface": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2.0 version": (400, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
}


@pytest.mark.parametrize(("status", "request_bytes"), REFUSED.values(), ids=REFUSED.keys())
def test_a_malformed_request_is_refused_however_it_is_split(status: int, request_bytes: bytes) -> None:
    # T25, T26, T27
    whole = parse([request_bytes])
    assert whole[1] == status
    assert END not in whole[0]
    for size in (1, 7):
        assert parse(request_bytes[start : start + size] for start in range(0, len(request_bytes), size)) == whole


@pytest.mark.parametrize(("status", "request_bytes"), REFUSED.values(), ids=REFUSED.keys())
def test_the_requests_before_a_malformed_one_are_complete(status: int, request_bytes: bytes) -> None:
    events, refused = parse([post(b"a") + GET + request_bytes])
    assert (events.count(END), refused) == (2, status)


def test_a_line_of_another_protocol_is_refused_only_as_a_request_line() -> None:
    # T88
    line = b"GET /good RTSP/1.0\r\n"
    value = b"POST /other HTTP/1.1\r\nUser-Agent: %sHost: a\r\nContent-Length: 60\r\nX-A: ICE/1.0\r\n\r\n" % line
    body = (line * 3 + b"SOURCE /good ICE/1.0\r\n")[:60]
    chunked = CHUNKED + chunks(line, line, trailers=b"x: %s" % line)
    wanted = [body, line * 2, body]
    stream = value + body + chunked + value + body
    assert bodies_of(stream) == wanted
    for size in (1, 7, 64):
        assert bodies_of(*(stream[start : start + size] for start in range(0, len(stream), size))) == wanted
    assert parse([value + body + line + b"Host: a\r\n\r\n"])[1] == 400
    assert parse([value + body[:30], body[30:] + line[:12], line[12:] + b"Host: a\r\n\r\n"])[1] == 400


def test_an_error_of_the_handler_is_not_taken_for_an_invalid_request() -> None:
    class Broken(Events):
        def on_request(self, head: RequestHead) -> None:
            raise KeyError("a bug")

    parser = RequestParser(Broken())
    with pytest.raises(KeyError, match="a bug"):
        parser.feed(GET)
    parser.close()


# Bounds

TOO_LONG = {
    "one field of 70 KB": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "a name of 70 KB": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x" * 70_000 + b": a\r\n\r\n",
    "many fields of 70 KB": (
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 700) for n in range(100)) + b"\r\n"
    ),
    "5,000 fields": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    "one field too many": b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * MAX_FIELDS + b"\r\n",
    "a target of 70 KB": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "target and fields together": (
        b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000 + b"\r\n\r\n"
    ),
}


@pytest.mark.parametrize("request_bytes", TOO_LONG.values(), ids=TOO_LONG.keys())
@pytest.mark.parametrize("before", [b"", GET, CHUNKED + chunks(b"x" * 1000)], ids=["first", "second", "after chunks"])
def test_a_head_over_the_limits_is_refused_however_it_is_split(request_bytes: bytes, before: bytes) -> None:  # T28
    stream = before + request_bytes
    for size in (len(stream), 100, 20_000):
        events, status = parse(stream[start : start + size] for start in range(0, len(stream), size))
        assert (events.count(END), status) == (1 if before else 0, 431)


def test_a_head_without_end_is_refused_before_it_is_complete() -> None:  # T28
    assert parse([GET[:-2] + b"X: " + b"x" * (MAX_HEAD + 100)])[1] == 431
    assert parse([GET[:-2], b"X: ", *[b"x" * 1000] * 70])[1] == 431
    assert parse([b"\r\n" * 1000] * 100 + [GET[:-2]])[1] == 431


def test_a_head_that_starts_after_a_body_is_bounded() -> None:  # T28
    fields = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(60))
    more = fields[:20_000].rpartition(b"X-")[0]
    events, status = parse([post(b"hi")[:-1], b"i" + GET[:-2] + fields, more + b"\r\n"])
    assert (events.count(END), status) == (1, 431)


def test_the_largest_allowed_head_passes() -> None:
    fields = b"".join(b"X-%03d: %s\r\n" % (n, b"x" * 318) for n in range(MAX_FIELDS - 1))
    request = GET[:-2] + fields + b"\r\n"
    assert len(request) > MAX_HEAD - 2000
    for size in (len(request), 1000, 1):
        assert len(head_of(*(request[start : start + size] for start in range(0, len(request), size))).headers) == 200


def test_what_is_read_with_a_head_does_not_count_as_part_of_it() -> None:
    assert bodies_of(post(b"x" * 300_000)) == [b"x" * 300_000]
    assert len(bodies_of(GET * 10_000)) == 10_000
    assert len(bodies_of(post(b"x" * MAX_HEAD) + GET[:-10], GET[-10:])) == 2


def test_trailers_are_dropped() -> None:
    """They are not header fields (RFC 9110 §6.5.1): the head was judged before they came."""
    trailers = b"Host: evil\r\nOrigin: http://evil\r\nX-Last: 1\r\n"
    first, body, _, second, _ = events_of(CHUNKED + chunks(b"ab", b"c", trailers=trailers) + GET)
    assert isinstance(first, RequestHead) and isinstance(second, RequestHead)
    assert first.headers == [(b"host", b"a"), (b"transfer-encoding", b"chunked")]
    assert body == b"abc"
    assert second.headers == [(b"host", b"a")]


@pytest.mark.parametrize(
    "endless",
    [b"0\r\nX: " + b"x" * 200_000, b"0\r\n" + b"X: y\r\n" * 30_000, b"1;" + b"x" * 200_000],
    ids=["trailer", "trailers", "chunk extension"],
)
def test_framing_without_a_byte_of_body_is_bounded(endless: bytes) -> None:
    for size in (1000, len(endless)):
        parts = [endless[start : start + size] for start in range(0, len(endless), size)]
        assert parse([CHUNKED, *parts])[1] == 400


def test_trailers_that_come_in_one_piece_with_their_body_are_bounded() -> None:
    assert parse([CHUNKED + chunks(b"a", trailers=b"X: y\r\n" * 30_000)])[1] == 400


def test_a_body_in_chunks_of_one_byte_passes() -> None:
    body = chunks(*[b"x"] * 50_000)
    for size in (len(body), 1000):
        assert bodies_of(CHUNKED, *(body[start : start + size] for start in range(0, len(body), size))) == [
            b"x" * 50_000
        ]


# Upgrades, which are ignored (RFC 9110 §7.8)

UPGRADE = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__")


def test_a_request_that_asks_for_an_upgrade_is_read_as_any_other() -> None:
    head, body, end, *rest = events_of(post(b"hello", *UPGRADE) + GET)
    assert isinstance(head, RequestHead)
    assert [name for name, _ in head.headers] == [b"host", b"connection", b"http2-settings"]
    assert (body, end) == (b"hello", END)
    assert rest == events_of(GET)


def test_an_upgrade_without_a_body_or_with_chunks() -> None:
    bodiless = GET[:-2] + b"\r\n".join(UPGRADE) + b"\r\n\r\n"
    in_chunks = CHUNKED[:-2] + b"\r\n".join(UPGRADE) + b"\r\n\r\n" + chunks(b"a", b"b", trailers=b"X: y\r\n")
    assert bodies_of(bodiless + in_chunks + bodiless + post(b"c")) == [b"", b"ab", b"", b"c"]


def test_an_upgrade_field_alone_changes_nothing() -> None:
    head = head_of(post(b"", b"Upgrade: websocket"))
    assert (head.headers, head.content_length) == ([(b"host", b"a")], 0)


def test_very_many_upgrades_in_one_read() -> None:
    one = GET[:-2] + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n"
    assert len(bodies_of(one * 3000)) == 3000


def test_the_body_after_an_upgrade_is_checked_as_any_other() -> None:
    request = CHUNKED[:-2] + b"\r\n".join(UPGRADE) + b"\r\n\r\n"
    assert parse([request + b"xyz\r\n"])[1] == 400
    assert parse([request + chunks(b"a") + REFUSED["two hosts"][1]])[1] == 400


# Whatever comes

names = st.sampled_from([b"X-A", b"Accept", b"Expect", b"Origin", b"Upgrade", b"Connection", b"Content-Type"])
values = st.sampled_from([b"", b"a", b"close", b"upgrade", b"100-continue", b"keep-alive, Upgrade", b"\xe9 b"])
fields = st.lists(st.tuples(names, values).map(lambda pair: b"%s: %s\r\n" % pair), max_size=4).map(b"".join)
bodies = st.binary(max_size=40)
sized = st.builds(
    lambda extra, body: b"POST /a?b HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s" % (extra, len(body), body),
    fields,
    bodies,
)
in_chunks = st.builds(
    lambda extra, parts: CHUNKED[:-2] + extra + b"\r\n" + chunks(*filter(None, parts), trailers=b"X: y\r\n"),
    fields,
    st.lists(bodies, max_size=3),
)
bodiless = fields.map(lambda extra: b"\r\nGET / HTTP/1.1\r\nHost: a\r\n%s\r\n" % extra)
requests = st.lists(sized | in_chunks | bodiless, min_size=1, max_size=4).map(b"".join)
cuts = st.lists(st.integers(0, 400), max_size=12)


def split(stream: bytes, positions: Iterable[int]) -> list[bytes]:
    ends = sorted({min(position, len(stream)) for position in positions} | {0, len(stream)})
    return [stream[start:end] for start, end in pairwise(ends)]


@given(requests, cuts)
def test_any_split_of_the_bytes_gives_the_same_events(stream: bytes, positions: list[int]) -> None:
    whole = parse([stream])
    assert whole[1] == 0
    assert END in whole[0]
    assert parse(split(stream, positions)) == whole
    assert parse(split(stream, range(len(stream)))) == whole


@settings(max_examples=300)
@given(requests, st.integers(0, 400), st.integers(0, 6), st.binary(max_size=6), cuts)
def test_any_split_of_a_damaged_request_gives_the_same_events_and_refusal(
    stream: bytes, start: int, length: int, inserted: bytes, positions: list[int]
) -> None:
    damaged = stream[:start] + inserted + stream[start + length :]
    assert parse(split(damaged, positions)) == parse([damaged])


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_garbage_is_refused_or_incomplete(parts: list[bytes]) -> None:
    events, status = parse(parts)
    assert events == []
    assert status in (0, 400)


def test_no_mutation_of_a_byte_raises_another_error() -> None:
    stream = CHUNKED + chunks(b"hello", trailers=b"X: y\r\n") + post(b"a", *UPGRADE)
    for position in range(len(stream)):
        for byte in (b"\x00", b"\n", b"\r", b" ", b":", b"\xff", b""):
            assert parse([stream[:position] + byte + stream[position + 1 :]])[1] in (0, 400, 501)
