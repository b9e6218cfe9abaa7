"""The one place that puts the head of an HTTP/1.1 message together."""


def encode_head(lines: list[bytes]) -> bytes:
    """Return a head: the first line and the fields, ``name: value`` each, with the empty line that ends them.

    Raises ValueError if a line holds a line break or NUL: it would become two (RFC 9110 §5.5).
    """
    expected = len(lines) + 1
    head = b"\r\n".join((*lines, b"", b""))
    # One check of the whole costs less than one of each part.
    if head.count(b"\n") != expected or head.count(b"\r") != expected or b"\0" in head:
        raise ValueError("a header field holds a line break or NUL")
    return head
