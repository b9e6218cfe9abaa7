"""Heads of HTTP/1.1 messages: the one place that encodes them, and what is kept of those that come again."""

Headers = list[tuple[bytes, bytes]]

HOPS = b"mcp-auth-proxy-hops"
"""How many proxies of this kind a request has come through. Each writes the field itself: nothing of what came is
sent on but the number."""

MAX_HOPS = 3
"""Proxies in a row; a chain of two is usual, and what comes through more goes in a circle."""


class Fields:
    """The header fields of a message, without Content-Length.

    The messages of a connection mostly have the same fields, one after the other. They then share this object, so that
    the fields are checked and encoded once.
    """

    __slots__ = ("events", "forwarded", "forwarded_for", "headers", "plain", "verdict")

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        self.forwarded: bytes | None = None
        """What whoever forwards the message has made of the fields; None until then."""
        self.forwarded_for: object = None
        """The rules by which ``forwarded`` was made: other rules make something else of the same fields."""
        self.verdict: object = None
        """What whoever identifies callers has found out, and until when it holds; None until then."""
        self.events: bool | None = None
        """Whether the content is an event stream; None until somebody has found out."""
        self.plain: bool | None = None
        """Whether the content is sent as it is, without a content coding; None until somebody has found out."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fields) and self.headers == other.headers

    __hash__ = None  # type: ignore[assignment]  # the list can't be hashed either


def encode_fields(headers: Headers) -> bytes:
    """Return ``name: value`` lines, each with its line end. Raises ValueError as ``encode_head`` does."""
    return check_lines(b"".join([b"%b: %b\r\n" % field for field in headers]), len(headers))


def encode_head(lines: list[bytes]) -> bytes:
    """Return a head: the first line and the fields, ``name: value`` each, with the empty line that ends them.

    Raises ValueError if a line contains a line break or NUL: it would become two (RFC 9110 §5.5).
    """
    return check_lines(b"\r\n".join((*lines, b"", b"")), len(lines) + 1)


def check_lines(data: bytes, count: int) -> bytes:
    """Return data that has just ``count`` line ends. Raises ValueError if it has another line break, or NUL."""
    # One check of the whole costs less than one of each part.
    if len(data.translate(None, b"\r\n\0")) != len(data) - 2 * count:
        raise ValueError("a header field holds a line break or NUL")
    return data
