"""Bases and common types of the models of bodies and answers."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta, Struct

__all__ = ["LINE", "Body", "Check", "Fault", "Name", "PartsInvalid", "Text", "View", "moment", "moment_or_none"]


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object that a client sends, or the parameters of a query."""


class View(Struct, kw_only=True):
    """A JSON object of an answer. Times are RFC 3339 in UTC."""


class PartsInvalid(ValueError):
    """Several parts of a value are not valid: ``parts`` are their names, and what is wrong with each."""

    def __init__(self, parts: list[tuple[str, str]]) -> None:
        self.parts = parts
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in parts))


@dataclass(frozen=True, slots=True)
class Check:
    """A rule in a field's ``Annotated`` that msgspec has no constraint for; ``test`` raises ValueError."""

    test: Callable[[Any], object]


class Fault(View):
    """One fault of a request: where it is (``body`` or ``query``, then names and indexes), and what is wrong."""

    loc: list[str | int]
    msg: str
    type: str


LINE = r"^[^\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]*$"
"""No control character, and none that reverses what follows. A pattern, so that the OpenAPI document has it too."""

Text = Annotated[str, Meta(max_length=1000, pattern=LINE)]
"""One line of text."""

Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=LINE)]
"""What people call something."""


def moment(seconds: float) -> datetime:
    """Return a time of an answer, from Unix seconds, to the millisecond."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)


def moment_or_none(seconds: float | None) -> datetime | None:
    """Return a time of an answer; None stays None."""
    return None if seconds is None else moment(seconds)
