"""Server-sent events (WHATWG HTML §9.2)."""

from collections.abc import Iterable

CONTENT_TYPE = b"text/event-stream"

MESSAGE_START = b"event: message\ndata: "
MESSAGE_END = b"\n\n"

_BREAKS_AS_SPACES = bytes.maketrans(b"\r\n", b"  ")


def is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether header fields, names in lower case, are those of an event stream."""
    return any(name == b"content-type" and value.lower().startswith(CONTENT_TYPE) for name, value in headers)


def message_event(document: bytes) -> bytes:
    """Return a JSON document as one ``message`` event."""
    return MESSAGE_START + one_line(document) + MESSAGE_END


def one_line(document: bytes) -> bytes:
    """Return a JSON document, or a part of one, without line breaks."""
    # JSON allows line breaks between tokens only, and white space may take their place there.
    return document.translate(_BREAKS_AS_SPACES)


def comment(text: bytes) -> bytes:
    """Return a comment: clients ignore it, and see that the stream is alive."""
    return b": " + text + b"\n\n"
