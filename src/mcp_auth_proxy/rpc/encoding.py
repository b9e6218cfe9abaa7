"""JSON as RFC 8259 defines it, without Python's extensions."""

import json
from typing import Any


def decode(data: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, and RecursionError if it is nested too deep."""
    return json.loads(data, parse_constant=_refuse_constant)


def encode(value: object) -> bytes:
    """Return a value as JSON. Raises ValueError for infinities and NaN, RecursionError if it is nested too deep."""
    # ASCII: an id or argument may hold half a surrogate pair, which JSON can express and UTF-8 cannot.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
