"""JSON from the network, read strictly: one object, UTF-8, no NaN, no key given twice where we read it."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import TypeGuard

from mcp_auth_proxy.errors import DocumentRefused

MAX_TEXT = 4096
"""Characters of one string."""

_LONGEST_INTEGER = 30
"""Digits; longer ones become floats, for ``int`` takes quadratic time and then refuses."""


class _Object(dict[str, object]):
    """A JSON object that remembers which keys came more than once."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated: frozenset[str] = frozenset()
        if len(self) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            self.repeated = frozenset(name for name, count in counts.items() if count > 1)


def parse_object(body: bytes) -> dict[str, object]:
    """Return the JSON object in ``body``. Raises ValueError, saying in words why there is none (RFC 8259)."""
    try:
        value = json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_Object, parse_constant=_refuse_constant, parse_int=_integer
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError:
        raise ValueError("it is not JSON") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


class Document:
    """A JSON object from a named place; each reader refuses the document where a member breaks its rule.

    A member that is null counts as absent: servers write out members that they have no value for.
    """

    def __init__(self, values: Mapping[str, object], *, name: str, url: str, clause: str) -> None:
        self._values = values
        self._repeated = values.repeated if isinstance(values, _Object) else frozenset[str]()
        self._name = name
        self._url = url
        self._clause = clause

    @classmethod
    def parse(cls, body: bytes, *, name: str, url: str, clause: str, form: str = "") -> "Document":
        """Return the document in ``body``. Raises DocumentRefused; ``form`` is the clause that wants a JSON object."""
        try:
            values = parse_object(body)
        except ValueError as problem:
            raise DocumentRefused(name, url, str(problem), form or clause) from None
        return cls(values, name=name, url=url, clause=clause)

    def refuse(self, problem: str, clause: str = "") -> DocumentRefused:
        """Return the error that refuses this document, to be raised."""
        return DocumentRefused(self._name, self._url, problem, clause or self._clause)

    def get(self, member: str) -> object:
        """Return a member as it is; None where it is absent."""
        if member in self._repeated:
            raise self.refuse(f"it has {member} more than once", "RFC 8259 §4")
        return self._values.get(member)

    def string(self, member: str) -> str | None:
        """Return a member that is a string of printable characters; None where it is absent."""
        value = self.get(member)
        if value is None:
            return None
        if not _is_text(value):
            raise self.refuse(f"{member} is not a string of at most {MAX_TEXT} printable characters")
        return value

    def required_string(self, member: str) -> str:
        """Return a member that is a string and not empty."""
        value = self.string(member)
        if not value:
            raise self.refuse(f"it has no {member}")
        return value

    def strings(self, member: str) -> tuple[str, ...] | None:
        """Return a member that is a list of strings; None where it is absent."""
        value = self.get(member)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.refuse(f"{member} is not a list of printable strings")
        items = tuple(item for item in value if _is_text(item))
        if len(items) != len(value):
            raise self.refuse(f"{member} is not a list of printable strings")
        return items

    def boolean(self, member: str) -> bool:
        """Return a member that is true or false; False where it is absent."""
        value = self.get(member)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refuse(f"{member} is neither true nor false")
        return value


def _is_text(value: object) -> TypeGuard[str]:
    # isprintable() also excludes lone surrogates, which no later encode() would survive.
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _refuse_constant(name: str) -> object:
    raise ValueError(f"it has {name} in it, which is not JSON")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)
