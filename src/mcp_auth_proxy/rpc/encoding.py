"""JSON as RFC 8259 defines it, without Python's extensions."""

import json
from bisect import bisect_right
from typing import Any

MAX_PARSED = 1024 * 1024
"""Bytes of the longest JSON text that is parsed."""

MAX_VALUES = 16_384
"""Values in a JSON text that is parsed: 1 MiB of ``[],`` takes 40 ms, and the event loop serves all clients."""

_FEW_VALUES = 4096
_MAX_DIGITS = 128 * 1024
"""Digits in a text with more than ``_FEW_VALUES``: a long fraction takes 2 µs to read and to write again."""

_LONG_INTEGER = b"0" * 1024
_MAX_LONG_INTEGERS = 64
"""How many times as many digits may follow each other: to read an integer takes quadratic time."""

_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)


def count_values(data: bytes) -> int:
    """Return how many values a JSON text has at most. What is in strings counts too, because a search must be cheap."""
    return 1 + data.count(b",") + data.count(b"[") + data.count(b"{")


def is_cheap(data: bytes) -> bool:
    """Return whether a text can be parsed within a few milliseconds."""
    if len(data) <= MAX_VALUES:
        return True
    if len(data) > MAX_PARSED:
        return False
    values = count_values(data)
    if values > MAX_VALUES:
        return False
    digits = data.translate(_AS_ZEROS)
    if values > _FEW_VALUES and digits.count(b"0") > _MAX_DIGITS:
        return False
    return digits.count(_LONG_INTEGER) <= _MAX_LONG_INTEGERS


def decode_value(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a position, and where it ends. Raises as ``decode`` does."""
    return _DECODER.raw_decode(text, at)


def decode(data: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, and RecursionError if it is nested too deep."""
    return json.loads(data, parse_constant=_refuse_constant)


def encode(value: object) -> bytes:
    """Return a value as JSON. Raises ValueError for infinities and NaN, RecursionError if it is nested too deep."""
    # ASCII: an id or argument may hold half a surrogate pair, which JSON can express and UTF-8 can't.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def shortened(text: str, limit: int) -> str:
    """Return as much of a text as ``encode`` writes in ``limit`` bytes, without the quotes; "…" marks a cut."""
    text = text[: limit + 1]
    if len(json.dumps(text)) - 2 <= limit:
        return text
    left = limit - len(r"\u2026")
    return text[: bisect_right(range(1, limit), left, key=lambda end: len(json.dumps(text[:end])) - 2)] + "…"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
