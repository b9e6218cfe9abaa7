"""Parse HTTP/1.1 requests, sans-I/O: bytes in, calls of ``RequestEvents`` out; no sockets, timers or event loop.

The parser is llhttp without its lenient flags. This module adds bounds and refusals that uvicorn lacks: uvicorn 0.54
accepts heads of any size, absolute-form targets, requests with two Hosts or none, and those of ICE and RTSP.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import httptools

from mcp_auth_proxy.errors import RequestRejected
from mcp_auth_proxy.net.http_head import Fields, Headers

MAX_HEAD = 64 * 1024
"""Bytes of request line and header fields; also of trailers, and of framing between two parts of a body."""

MAX_FIELDS = 200

_NOT_SERVED = {b"CONNECT": 501, b"TRACE": 405}
"""RFC 9110 §9.3.6: CONNECT would start a tunnel; §9.3.8: TRACE echoes the request, and our token with it."""

_OTHER_PROTOCOL = re.compile(rb" (?:ICE|RTSP)/[0-9.]+\r")
"""How a request line of the other protocols that llhttp knows ends. It does not tell which protocol it has read."""

_LINE_END = 64
"""Bytes that are kept of an incomplete request line: more than such an end has."""

_SPECIAL = frozenset({b"expect", b"origin", b"sec-fetch-site", b"transfer-encoding", b"upgrade"})
"""Fields that change how a request is read. Most requests have none of them."""

_BROWSER = frozenset({b"origin", b"sec-fetch-site"})


class RequestHead(NamedTuple):
    """Request line and header fields."""

    method: bytes
    path: bytes
    """As it was sent, without the query."""
    query: bytes
    headers: Headers
    """In the order they came, names in lower case, without ``Upgrade`` and ``Content-Length``."""
    host: bytes
    """Empty if a web page may have sent the request (it has Origin or Sec-Fetch-Site). The host of such a request
    is not enough to trust it, so a look-up by ``host`` alone fails."""
    http_version: str
    """``1.0`` or ``1.1``."""
    keep_alive: bool
    """Whether the client keeps the connection after the response (RFC 9112 §9.3); never with 1.0."""
    expects_continue: bool
    """Whether the client waits for 100 Continue before it sends the body (RFC 9110 §10.1.1)."""
    content_length: int | None
    fields: Fields
    """``headers``, in the same object as in the request before if they are the same."""

    def __repr__(self) -> str:
        """Leave out the fields: they may hold credentials."""
        return f"RequestHead({self.method!r}, {self.path!r})"


class RequestEvents(Protocol):
    """The handler that a parser calls, in the order of the bytes."""

    def on_request(self, head: RequestHead) -> None:
        """Handle a complete head."""

    def on_body(self, data: bytes) -> None:
        """Handle a part of the body, decoded from its chunks; never empty."""

    def on_request_end(self) -> None:
        """Handle the end of a request; called for each one, even without a body."""


class RequestParser:
    """Parse the requests of one connection, one after the other.

    Methods whose names begin with ``on_`` are the callbacks of llhttp.
    """

    __slots__ = (
        "_body_left",
        "_content_length",
        "_events",
        "_fields",
        "_head_bytes",
        "_headers",
        "_host",
        "_line_end",
        "_maybe_long",
        "_overhead",
        "_parser",
        "_path",
        "_query",
        "_split_url",
        "_trailer_bytes",
        "_upgrade",
        "_url",
        "in_body",
        "in_head",
    )

    def __init__(self, events: RequestEvents) -> None:
        self._events = events
        self._parser = _llhttp(self)
        self.in_head = False
        """Whether a head has begun and is not complete."""
        self.in_body = False
        """Whether the head is complete and the body is not."""
        self._url = b""
        self._headers: Headers = []
        """Without Content-Length."""
        self._content_length: int | None = None
        self._body_left = 0
        """Bytes of the body that have not arrived; 0 or less if it comes in chunks."""
        self._fields: Fields | None = None
        """Those of the last request that had nothing special about it: they are checked."""
        self._host = b""
        """The Host of ``_fields``."""
        self._head_bytes = 0
        """Bytes of the head so far, empty lines before it included. If the previous request ended in the same read,
        the bytes of that read are not counted."""
        self._maybe_long = False
        """Whether a head that ends in this read may exceed ``MAX_HEAD``, so that its fields have to be added up."""
        self._overhead = 0
        """Bytes since the last part of the body: chunk extensions and trailers."""
        self._line_end = b""
        """The last bytes of a read that ended before the first field of a head was complete."""
        self._trailer_bytes = 0
        self._upgrade: bytes | None = None
        """The framing fields of a request that asked for an upgrade, until llhttp reports its end."""
        self._split_url = b""
        """The last target that was split: a client uses few of them."""
        self._path = self._query = b""

    @property
    def idle(self) -> bool:
        """Whether nothing of the next request has arrived, not even an empty line before it."""
        return not self.in_body and not self._head_bytes and not self.in_head

    def feed(self, data: bytes) -> None:
        """Parse the next bytes and call the handler for what they complete.

        Raises RequestRejected with the status to answer. Calls before that were for valid requests, or for the valid
        beginning of the rejected one. The parser can't be used afterwards.
        """
        self._maybe_long = self.in_head or len(data) > MAX_HEAD
        if self.in_body:
            self._overhead += len(data)
        else:
            self._head_bytes += len(data)
        try:
            if self.in_body and self._body_left >= len(data):
                self._feed(data)  # no request line in it
            elif self._line_end or data.find(b" RTSP/") >= 0 or data.find(b"SOURCE ") >= 0:
                # SOURCE is the one method of ICE. Not ``in``, which makes an exception first when it searches bytes.
                self._feed_http_only(data)
            else:
                self._feed(data)
        except httptools.HttpParserCallbackError as error:
            # A callback raised, ours or the handler's. httptools keeps the reason as the context.
            raise error.__context__ or error from None
        except httptools.HttpParserError:
            raise RequestRejected(400, "not HTTP/1.1") from None
        if self.in_head:
            if self._head_bytes > MAX_HEAD:
                raise RequestRejected(431, "the head is too long")
            self._line_end = b"" if self._headers else (self._line_end + data)[-_LINE_END:]
        elif self.in_body and self._overhead > MAX_HEAD:
            raise RequestRejected(400, "too many bytes of framing without a byte of body")

    def close(self) -> None:
        """Release llhttp, which refers to bound methods of this object, and the handler, which refers to it too.

        Else only the garbage collector would end these cycles, with 64 KiB of an incomplete head in each.
        """
        del self._parser, self._events

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # llhttp takes the rest for another protocol. We support none (RFC 9110 §7.8), so it is the body: a
                # second parser reads it after a head with the same framing.
                framing, self._upgrade = self._upgrade, None
                self._parser = _llhttp(_AfterHead(self))
                self._parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % (framing or b""))
                data = data[upgrade.args[0] :]
            else:
                return

    def _feed_http_only(self, data: bytes) -> None:
        """Parse the data up to each end of a line of another protocol, and refuse it if it is a request line."""
        seen, fed = self._line_end + data, len(self._line_end)
        for match in _OTHER_PROTOCOL.finditer(seen):
            if match.end() <= fed:
                continue
            self._feed(seen[fed : match.end()])
            fed = match.end()
            # Before the first field is complete, this may be its value too: then the target is not in front of it.
            if self.in_head and not self._headers:
                before = seen[: match.start()].rstrip(b" ")
                if before.endswith(self._url) or self._url.endswith(before):
                    raise RequestRejected(400, "another protocol")
        self._feed(seen[fed:])

    def on_message_begin(self) -> None:
        self.in_head = True
        self._url = b""
        self._headers = []
        self._content_length = None

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            name = name.lower()
            if name == b"content-length":
                # llhttp has checked that it is a number, and the only one (RFC 9112 §6.3).
                self._content_length = int(value)
            else:
                self._headers.append((name, value))
            return
        # Trailers must not be merged into the header fields (RFC 9110 §6.5.1), so they are dropped.
        self._trailer_bytes += len(name) + len(value) + 4
        if self._trailer_bytes > MAX_HEAD:
            raise RequestRejected(400, "the trailers are too long")

    def on_headers_complete(self) -> None:
        headers, url = self._headers, self._url
        if len(headers) > MAX_FIELDS or (self._maybe_long and len(url) + _size_of(headers) > MAX_HEAD):
            raise RequestRejected(431, "the head is too long")
        self.in_head = False
        self.in_body = True
        self._line_end = b""
        self._body_left = self._content_length or 0
        self._head_bytes = self._overhead = self._trailer_bytes = 0
        if url != self._split_url:
            self._split(url)
        method: bytes = self._parser.get_method()
        version: str = self._parser.get_http_version()
        if version != "1.1" and version != "1.0":
            raise RequestRejected(400, "another major version has another syntax (RFC 9112 §2.3)")
        if method in _NOT_SERVED:
            raise RequestRejected(_NOT_SERVED[method], "a method that is not served")
        expects_continue = False
        fields, host = self._fields, self._host
        if fields is None or headers != fields.headers:
            # White space after a value is not part of it (RFC 9112 §5); llhttp removes only what comes before.
            headers = [(name, value.rstrip(b" \t")) for name, value in headers]
            by_name = dict(headers)
            host = _host_of(by_name, headers)
            if _SPECIAL.isdisjoint(by_name):
                self._fields = fields = Fields(headers)
                self._host = host
            else:
                expects_continue = version == "1.1" and by_name.get(b"expect", b"").lower() == b"100-continue"
                if not _BROWSER.isdisjoint(by_name):
                    host = b""
                fields = Fields(self._without_upgrade(by_name, headers, version))
        keep_alive = version == "1.1" and self._parser.should_keep_alive()
        self._events.on_request(
            RequestHead(
                method,
                self._path,
                self._query,
                fields.headers,
                host,
                version,
                keep_alive,
                expects_continue,
                self._content_length,
                fields,
            )
        )

    def _without_upgrade(self, by_name: dict[bytes, bytes], headers: Headers, version: str) -> Headers:
        """Check the framing, and return the fields without Upgrade. Raises RequestRejected."""
        if b"transfer-encoding" in by_name:
            _check_coding(_values(headers, b"transfer-encoding"), version)
        if b"upgrade" not in by_name:
            return headers
        if self._parser.should_upgrade():
            self._upgrade = self._framing(by_name)
        return [field for field in headers if field[0] != b"upgrade"]

    def _framing(self, by_name: dict[bytes, bytes]) -> bytes:
        """Return the line of the field that says where the body ends."""
        if b"transfer-encoding" in by_name:
            return b"transfer-encoding: %b\r\n" % by_name[b"transfer-encoding"]
        return b"" if self._content_length is None else b"content-length: %d\r\n" % self._content_length

    def _split(self, url: bytes) -> None:
        # An origin server is asked in origin-form only (RFC 9112 §3.2.1).
        if not url.startswith(b"/") or b"#" in url:
            raise RequestRejected(400, "the target is not in origin-form")
        try:
            parts = httptools.parse_url(url)
        except httptools.HttpParserError:
            raise RequestRejected(400, "the target is not a path") from None
        self._path, self._query = parts.path, parts.query or b""
        self._split_url = url

    def on_body(self, data: bytes) -> None:
        self._overhead = 0
        self._body_left -= len(data)
        self._events.on_body(data)

    def on_message_complete(self) -> None:
        if self._upgrade is None:
            self.in_body = False
            self._events.on_request_end()
        # else: llhttp stops after the head, but the request continues (see _feed).


class _AfterHead:
    """Callbacks that skip one head, which the handler has seen already, and continue with the body."""

    def __init__(self, parser: RequestParser) -> None:
        self._parser = parser
        self._skipped = False
        self.on_body = parser.on_body
        self.on_message_complete = parser.on_message_complete

    def on_message_begin(self) -> None:
        if self._skipped:
            self._parser.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._skipped:
            self._parser.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._skipped:
            self._parser.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._skipped:
            self._parser.on_headers_complete()
        self._skipped = True


def _llhttp(callbacks: RequestParser | _AfterHead) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(callbacks)
    # The connection ignores what follows a request with "Connection: close".
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _check_coding(codings: list[bytes], version: str) -> None:
    """Accept "chunked" alone (RFC 9112 §6.1). Raises RequestRejected."""
    if version == "1.0":
        raise RequestRejected(400, "Transfer-Encoding in HTTP/1.0")
    if len(codings) != 1 or codings[0].lower() != b"chunked":
        raise RequestRejected(501, "a transfer coding that is not known")


def _host_of(by_name: dict[bytes, bytes], headers: Headers) -> bytes:
    host = by_name.get(b"host")
    if host is None or (len(by_name) != len(headers) and len(_values(headers, b"host")) != 1):
        raise RequestRejected(400, "not exactly one Host (RFC 9112 §3.2)")
    return host


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for field, value in headers if field == name]


def _size_of(headers: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)
