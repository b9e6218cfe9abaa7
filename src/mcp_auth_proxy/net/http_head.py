"""Encode the head of an HTTP/1.1 message; every head is encoded here."""


def encode_head(lines: list[bytes]) -> bytes:
    """Return a head: the first line and the fields, ``name: value`` each, with the empty line that ends them.

    Raises ValueError if a line contains a line break or NUL: it would become two (RFC 9110 §5.5).
    """
    expected = len(lines) + 1
    head = b"\r\n".join((*lines, b"", b""))
    # One check of the whole head costs less than one of each line.
    if head.count(b"\n") != expected or head.count(b"\r") != expected or b"\0" in head:
        raise ValueError("a header field contains a line break or NUL")
    return head
