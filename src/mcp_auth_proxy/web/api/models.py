"""Bases and common types of the models of bodies and answers."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from msgspec import Meta, Struct

__all__ = ["Body", "Check", "Fault", "Name", "Text", "View", "moment", "moment_or_none"]


class Body(Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object that a client sends, or the parameters of a query."""


class View(Struct, kw_only=True):
    """A JSON object of an answer. Times are RFC 3339 in UTC."""


@dataclass(frozen=True, slots=True)
class Check:
    """A rule in a field's ``Annotated`` that msgspec has no constraint for; ``test`` raises ValueError."""

    test: Callable[[Any], object]


class Fault(View):
    """One fault of a request: where it is (``body`` or ``query``, then names and indexes), and what is wrong."""

    loc: list[str | int]
    msg: str
    type: str


def _printable(text: str) -> None:
    if not text.isprintable():
        raise ValueError("must not have control characters")


Text = Annotated[str, Meta(max_length=1000), Check(_printable)]
"""One line of text."""

Name = Annotated[str, Meta(min_length=1, max_length=100), Check(_printable)]
"""What people call something."""


def moment(seconds: float) -> datetime:
    """Return a time of an answer, from Unix seconds, to the millisecond."""
    return datetime.fromtimestamp(round(seconds, 3), UTC)


def moment_or_none(seconds: float | None) -> datetime | None:
    """Return a time of an answer; None stays None."""
    return None if seconds is None else moment(seconds)
