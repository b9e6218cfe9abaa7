"""Statements of the store, which have named parameters (``:name``), in the form that the server reads (``$1``)."""

import functools
import re
from dataclasses import dataclass

# What may contain a colon that begins no parameter: quoted text and names, comments, and casts (``::``).
_TOKENS = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | :: | (?<![:\w]):(?P<name>[A-Za-z_]\w*)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement with ``$1``, ``$2`` …, and which value each stands for."""

    text: str
    names: tuple[str, ...]


@functools.lru_cache(maxsize=512)
def numbered(sql: str) -> Statement:
    """Return a statement with numbers in place of its names; a name that stands there twice has one number."""
    places: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        name = found["name"]
        return found[0] if name is None else f"${places.setdefault(name, len(places) + 1)}"

    return Statement(_TOKENS.sub(number, sql), tuple(places))
