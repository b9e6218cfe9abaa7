"""JSON as RFC 8259 defines it, without Python's extensions."""

import json
from bisect import bisect_right
from typing import Any


def decode(data: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, and RecursionError if it is nested too deep."""
    return json.loads(data, parse_constant=_refuse_constant)


def encode(value: object) -> bytes:
    """Return a value as JSON. Raises ValueError for infinities and NaN, RecursionError if it is nested too deep."""
    # ASCII: an id or argument may hold half a surrogate pair, which JSON can express and UTF-8 cannot.
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
