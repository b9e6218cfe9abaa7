"""Strict reading of JSON from the network: one object, UTF-8, no NaN, no duplicates of the keys that are read."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import TypeGuard

from mcp_auth_proxy.errors import DocumentRefused
from mcp_auth_proxy.rpc.encoding import count_values

MAX_TEXT = 4096
"""Maximum length of a string."""

MAX_VALUES = 10_000
"""Values in a document: one with 256 KiB of ``{},`` would stop the event loop for 0.1 s."""

_LONGEST_INTEGER = 30
"""Digits. Longer integers become floats, because ``int`` takes quadratic time and then raises."""


class _Object(dict[str, object]):
    """A JSON object that remembers its duplicate keys."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated: frozenset[str] = frozenset()
        if len(self) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            self.repeated = frozenset(name for name, count in counts.items() if count > 1)


def parse_object(body: bytes) -> dict[str, object]:
    """Return the JSON object in ``body`` (RFC 8259). Raises ValueError with the reason in words."""
    if count_values(body) > MAX_VALUES:
        raise ValueError(f"it is over {MAX_VALUES} values long")
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
    """A JSON object from a known URL. The readers raise DocumentRefused if a member breaks its rule.

    A member that is null counts as absent: some servers write null for members without a value.
    """

    def __init__(self, values: Mapping[str, object], *, name: str, url: str, clause: str) -> None:
        self._values = values
        self._repeated = values.repeated if isinstance(values, _Object) else frozenset[str]()
        self._name = name
        self._url = url
        self._clause = clause

    @classmethod
    def parse(cls, body: bytes, *, name: str, url: str, clause: str, form: str = "") -> "Document":
        """Return the document in ``body``. Raises DocumentRefused. ``form``: the clause that requires an object."""
        try:
            values = parse_object(body)
        except ValueError as problem:
            raise DocumentRefused(name, url, str(problem), form or clause) from None
        return cls(values, name=name, url=url, clause=clause)

    def refusal(self, problem: str, clause: str = "") -> DocumentRefused:
        """Return the DocumentRefused for a problem, for the caller to raise."""
        return DocumentRefused(self._name, self._url, problem, clause or self._clause)

    def get(self, member: str) -> object:
        """Return a member as it is; None if it is absent."""
        if member in self._repeated:
            raise self.refusal(f"it has {member} more than once", "RFC 8259 §4")
        return self._values.get(member)

    def string(self, member: str) -> str | None:
        """Return a member that is a string of printable characters; None if it is absent."""
        value = self.get(member)
        if value is None:
            return None
        if not _is_text(value):
            raise self.refusal(f"{member} is not a string of at most {MAX_TEXT} printable characters")
        return value

    def required_string(self, member: str) -> str:
        """Return a member that must be a non-empty string."""
        value = self.string(member)
        if not value:
            raise self.refusal(f"it has no {member}")
        return value

    def strings(self, member: str) -> tuple[str, ...] | None:
        """Return a member that is a list of strings; None if it is absent."""
        value = self.get(member)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.refusal(f"{member} is not a list of printable strings")
        items = tuple(item for item in value if _is_text(item))
        if len(items) != len(value):
            raise self.refusal(f"{member} is not a list of printable strings")
        return items

    def boolean(self, member: str) -> bool:
        """Return a member that is true or false; False if it is absent."""
        value = self.get(member)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.refusal(f"{member} is neither true nor false")
        return value


def _is_text(value: object) -> TypeGuard[str]:
    # isprintable() also excludes lone surrogates, which would make a later encode() fail.
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _refuse_constant(name: str) -> object:
    raise ValueError(f"it contains {name}, which is not JSON")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)
