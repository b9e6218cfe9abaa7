"""What every target expects of what a parser returns, and how it cuts its input."""

import random
import re
import zlib
from collections.abc import Iterable
from itertools import pairwise

from mcp_auth_proxy.errors import MAX_MESSAGE, McpAuthProxyError

BYTEWISE = 1024
"""Bytes of the longest input that is also fed byte by byte."""

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")


def check_fields(fields: Iterable[tuple[bytes, bytes]]) -> None:
    """Check header fields: names are tokens in lower case, values have no control character (RFC 9110 §5.1, §5.5)."""
    for name, value in fields:
        assert _NAME.fullmatch(name), f"not a field name: {name!r}"
        assert _VALUE.fullmatch(value), f"not a field value: {value!r}"


def check_error(error: McpAuthProxyError, secrets: Iterable[str] = ()) -> None:
    """Check the text of an error, which goes to logs and clients: one line, bounded, and without the secrets sent."""
    text = str(error)
    assert len(text) <= MAX_MESSAGE + 1, f"an error of {len(text)} characters"
    assert text.isprintable(), f"an error with control characters: {text!r}"
    assert not any(secret in text for secret in secrets), f"an error with a secret: {text!r}"


def cuttings(data: bytes) -> list[list[bytes]]:
    """Return ways to cut an input, always the same for the same input: as it is, at random places, byte by byte."""
    chance = random.Random(zlib.crc32(data))
    places = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(8))})
    ways = [[data], [data[start:end] for start, end in pairwise(places)]]
    if len(data) <= BYTEWISE:
        ways.append([data[place : place + 1] for place in range(len(data))])
    return ways
