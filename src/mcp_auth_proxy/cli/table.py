"""A table for the terminal: columns that are aligned, and a last one of prose that fits the window."""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mcp_auth_proxy.cli.terminal import Styled, styled
from mcp_auth_proxy.observability.controls import escaped

GAP = "  "
MIN_PROSE = 28
"""Columns that the prose needs beside the others; with fewer it stands below them."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: short texts, of which one may have a color, and the prose."""

    cells: tuple[str, ...]
    prose: str
    colored: int = -1
    color: str | None = None


def lay_out(lines: Collection[Line], *, width: int | None, headers: Sequence[str] = ()) -> list[Styled]:
    """Return the lines of a table. ``width`` is that of the window; if None, nothing is wrapped or titled."""
    if not lines:
        return []
    titles = [each.upper() for each in headers] if width is not None else []
    cells = [[escaped(cell) for cell in line.cells] for line in lines]
    measured = [titles[:-1], *cells] if titles else cells
    widths = [max(map(columns, column)) for column in zip(*measured, strict=True)]
    beside = sum(widths) + len(GAP) * len(widths)
    room = None if width is None else width - beside
    if room is not None and room < MIN_PROSE:
        return _stacked(lines, width or 0)
    found = [] if not titles else [Styled(styled(_row(titles[:-1], widths) + titles[-1], bold=True))]
    for line in lines:
        first, *more = _wrapped(escaped(line.prose), room)
        found.append(Styled((_row(line.cells, widths, line.colored, line.color) + first).rstrip()))
        found += [Styled(" " * (beside if columns(text) <= (room or 0) else 0) + text) for text in more]
    return found


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _stacked(lines: Collection[Line], width: int) -> list[Styled]:
    """Return a block for each line, for a narrow window."""
    found: list[Styled] = []
    for line in lines:
        texts = [styled(text, fg=line.color if at == line.colored else None) for at, text in enumerate(line.cells)]
        found.append(Styled(GAP.join(text for text in texts if text)))
        for text in _wrapped(escaped(line.prose), width - len(GAP)):
            found.append(Styled((GAP if columns(text) <= width - len(GAP) else "") + text))
    return found


def _row(cells: Sequence[str], widths: Sequence[int], colored: int = -1, color: str | None = None) -> str:
    row = ""
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        text = escaped(cell)
        row += styled(cell, fg=color) if at == colored else text
        row += " " * (width - columns(text)) + GAP
    return row


def _wrapped(text: str, width: int | None) -> list[str]:
    """Return a text in lines of at most ``width`` columns. A longer word, such as a link, is a line of its own."""
    if width is None:
        return [text]
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and columns(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]
