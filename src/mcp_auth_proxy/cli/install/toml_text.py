"""Edit TOML files of other programs as text: each entry is a table of its own, all else stays as it is."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.cli.install.undo import Entry, Insertion, InvalidDocument

_TOKEN = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+"""(?:"{0,2})'
    r"|'''(?:[^']++|'(?!''))*+'''(?:'{0,2})"
    r'|"(?:[^"\\\n]++|\\.)*+"'
    r"|'[^'\n]*+'"
    r"|\#[^\n]*+"
    r"|[\[{]|[\]}]|\n"
    r"|[^\"'\#\[\]{}\n]++",
    re.DOTALL,
)
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK_LINE = re.compile(r"[ \t]*\r?\n")


@dataclass(frozen=True, slots=True)
class _Table:
    """A header and what is under it. ``end`` is behind its last key; comments and empty lines that follow are left."""

    path: tuple[str, ...]
    start: int
    end: int


class TomlEditor:
    """Edit the tables ``[container.NAME]``."""

    def __init__(self, container: str) -> None:
        self.container = container

    def content(self, text: str) -> Mapping[str, Any]:
        """Return the whole document. Raises InvalidDocument."""
        try:
            document = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
            raise InvalidDocument(str(error)) from None
        if not isinstance(document.get(self.container, {}), dict):
            raise InvalidDocument(f"{self.container} is not a table")
        return document

    def entries(self, text: str) -> dict[str, Any]:
        """Return the entries by name, in their order. Raises InvalidDocument."""
        return dict(self.content(text).get(self.container, {}))

    def has_container(self, text: str) -> bool:
        """Return True: a table of tables needs no header."""
        return True

    def insertions(self, text: str, name: str, entry: Entry) -> list[Insertion]:
        """Return how a new entry is added. Raises InvalidDocument."""
        newline = "\r\n" if "\r\n" in text else "\n"
        table = newline.join(self._lines(name, entry)) + newline
        lead = ""
        if text:
            lead = "" if text.endswith("\n") else newline
            lead += "" if not text.strip() or re.search(r"\n[ \t]*\r?\n\Z", text) else newline
        self.content(text)
        try:
            self.content(text + lead + table)
        except InvalidDocument:
            raise InvalidDocument(f"{self.container} is not written as tables ([{self.container}.NAME])") from None
        return [Insertion(len(text), lead + table, len(lead))]

    def place(self, text: str, name: str) -> int | None:
        """Return where an entry begins; None if there is none, or no table of its own. Raises InvalidDocument."""
        return next((table.start for table in _tables(text) if table.path == (self.container, name)), None)

    def replaced(self, text: str, name: str, entry: Entry) -> str:
        """Return the text with another table for an entry that is there. Raises InvalidDocument."""
        own = self._own(text, name)
        for table in reversed(own[1:]):
            text = text[: table.start] + text[table.end :]
        newline = "\r\n" if "\r\n" in text else "\n"
        written = newline.join(self._lines(name, entry)) + newline
        return text[: own[0].start] + written + text[own[0].end :]

    def removed(self, text: str, name: str, *, with_container: bool) -> str:
        """Return the text without an entry, its subtables and one empty line before it."""
        for table in reversed(self._own(text, name)):
            before, behind = text[: table.start], text[table.end :]
            follows = not behind or _BLANK_LINE.match(behind)
            if follows and (line := re.search(r"(?<=\n)[ \t]*\r?\n\Z", before)):
                before = before[: line.start()]
            text = before + behind
        return text

    def _own(self, text: str, name: str) -> list[_Table]:
        """Return the table of an entry and its subtables. Raises InvalidDocument if it has another form."""
        own = [table for table in _tables(text) if table.path[:2] == (self.container, name)]
        if not own or len(own[0].path) != 2:
            raise InvalidDocument(f"{self.container}.{name} is not a table of its own; edit it by hand")
        return own

    def _lines(self, name: str, entry: Entry) -> list[str]:
        values = [f"{_key(key)} = {_value(value)}" for key, value in entry.items()]
        return [f"[{_key(self.container)}.{_key(name)}]", *values]


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key)


def _value(value: Any) -> str:
    """Return a value on one line. Raises InvalidDocument for what is never written here."""
    if isinstance(value, bool | int | float | str):
        return json.dumps(value).replace("\x7f", r"\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_key(key)} = {_value(each)}' for key, each in value.items())} }}"
    raise InvalidDocument(f"a {type(value).__name__} can't be written")


def _tables(text: str) -> list[_Table]:
    """Return the tables of a valid document that have a header, in their order."""
    found: list[_Table] = []
    for start, end, is_header in _statements(text):
        if is_header:
            found.append(_Table(_path(text[start:end]), start, end))
        elif found:
            found[-1] = _Table(found[-1].path, found[-1].start, end)
    return found


def _statements(text: str) -> Iterator[tuple[int, int, bool]]:
    """Yield where each header and each key with its value begins and ends, its line with it, and whether it is one."""
    at = 0
    while at < len(text):
        start, depth, first = at, 0, ""
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise InvalidDocument("it is not TOML")
            token, at = match[0], match.end()
            first = first or token.strip()[:1]
            if token in ("[", "{"):
                depth += 1
            elif token in ("]", "}"):
                depth -= 1
            elif token == "\n" and depth == 0:
                break
        if first and first != "#":
            yield start, at, first == "["


def _path(header: str) -> tuple[str, ...]:
    """Return the keys of a header, that of a table or of one in an array."""
    found: Any = tomllib.loads(header)
    path: list[str] = []
    while isinstance(found, dict) and found:
        ((key, found),) = found.items()
        path.append(key)
        found = found[0] if isinstance(found, list) else found
    return tuple(path)
