"""Edit JSON files of other programs as text: layout, comments and trailing commas of all else stay as they are.

Such files are JSON with ``//`` and ``/* */`` comments, and a comma may follow the last member (as in VS Code's). A text
without any value is read as an empty object.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mcp_auth_proxy.cli.install.undo import Entry, Insertion, InvalidDocument

MAX_DEPTH = 100
"""Levels of nesting that are read."""

_SPACE = " \t\r\n"
_COMMENT = r"//[^\r\n]*+|/\*(?:[^*]++|\*(?!/))*+\*/"
_BLANK = re.compile(rf"(?:[ \t\r\n]++|{_COMMENT})*+")
_LAST_COMMENT = re.compile(rf"(?:[ \t\r\n]*+(?:{_COMMENT}))*+")
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4}))*+"')
_PLAIN = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?")
_INDENT = re.compile(r"[ \t]*+")
_LINE_BREAK = re.compile(r"[ \t]*+\r?\n")


@dataclass(slots=True)
class _Node:
    """A value from ``start`` to ``end``. ``members`` are those of an object, None for other values."""

    start: int
    end: int
    value: Any
    members: list["_Member"] | None = None


@dataclass(slots=True)
class _Member:
    """``start`` is that of the key, ``comma`` the place of the comma behind the value, if there is one."""

    key: str
    start: int
    value: _Node
    comma: int | None = None


@dataclass(slots=True)
class _Parser:
    text: str
    depth: int = field(default=0)

    def document(self) -> _Node | None:
        """Return the value of the text; None if it has only space and comments. Raises InvalidDocument."""
        at = self.blank(0)
        if at == len(self.text):
            return None
        root = self.value(at)
        if self.blank(root.end) != len(self.text):
            raise self.error(self.blank(root.end), "there is more after the end")
        return root

    def blank(self, at: int) -> int:
        match = _BLANK.match(self.text, at)
        return at if match is None else match.end()

    def value(self, at: int) -> _Node:
        first = self.text[at : at + 1]
        if first == '"':
            end = self.string(at)
            return _Node(at, end, json.loads(self.text[at:end]))
        if first and first in "{[":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.error(at, f"it is nested more than {MAX_DEPTH} levels deep")
            node = self.object(at) if first == "{" else self.array(at)
            self.depth -= 1
            return node
        match = _PLAIN.match(self.text, at)
        if match is None:
            raise self.error(at, "a value is missing")
        return _Node(at, match.end(), _plain(match[0]))

    def string(self, at: int) -> int:
        match = _STRING.match(self.text, at)
        if match is None:
            raise self.error(at, "a text in double quotes is missing, or has no end")
        return match.end()

    def object(self, start: int) -> _Node:
        members: list[_Member] = []
        at = self.blank(start + 1)
        while self.text[at : at + 1] != "}":
            if members and members[-1].comma is None:
                raise self.error(at, "a comma or } is missing")
            end = self.string(at)
            colon = self.blank(end)
            if self.text[colon : colon + 1] != ":":
                raise self.error(colon, "a colon is missing")
            value = self.value(self.blank(colon + 1))
            members.append(_Member(json.loads(self.text[at:end]), at, value))
            at = self.blank(value.end)
            if self.text[at : at + 1] == ",":
                members[-1].comma = at
                at = self.blank(at + 1)
        return _Node(start, at + 1, {each.key: each.value.value for each in members}, members)

    def array(self, start: int) -> _Node:
        items: list[Any] = []
        at, comma = self.blank(start + 1), True
        while self.text[at : at + 1] != "]":
            if not comma:
                raise self.error(at, "a comma or ] is missing")
            item = self.value(at)
            items.append(item.value)
            at = self.blank(item.end)
            comma = self.text[at : at + 1] == ","
            if comma:
                at = self.blank(at + 1)
        return _Node(start, at + 1, items)

    def error(self, at: int, problem: str) -> InvalidDocument:
        line = self.text.count("\n", 0, at) + 1
        return InvalidDocument(f"line {line}, column {at - self.text.rfind(chr(10), 0, at)}: {problem}")


@lru_cache(maxsize=4)
def _parsed(text: str) -> _Node | None:
    # One edit asks several times, and such a file may have megabytes.
    return _Parser(text).document()


def _plain(word: str) -> Any:
    """Return what a number, true, false or null stands for."""
    try:
        return json.loads(word)
    except ValueError:
        # Python reads no integers of thousands of digits.
        return word


class JsonEditor:
    """Edit the entries of one member of the root, the container: an object with an object for each entry."""

    def __init__(self, container: str) -> None:
        self.container = container

    def content(self, text: str) -> Mapping[str, Any]:
        """Return the whole document. Raises InvalidDocument."""
        root, _ = self._read(text)
        return {} if root is None else dict(root.value)

    def entries(self, text: str) -> dict[str, Any]:
        """Return the entries by name, in their order. Raises InvalidDocument."""
        _, container = self._read(text)
        return {} if container is None else dict(container.value)

    def has_container(self, text: str) -> bool:
        """Return whether there is something that has the entries, maybe none. Raises InvalidDocument."""
        return self._read(text)[1] is not None

    def insertions(self, text: str, name: str, entry: Entry) -> list[Insertion]:
        """Return how a new entry is added. Raises InvalidDocument."""
        root, container = self._read(text)
        if container is not None:
            return _Layout(text, root).new_member(container, name, entry)
        if root is not None:
            return _Layout(text, root).new_member(root, self.container, {name: entry}, name)
        newline = "\r\n" if "\r\n" in text else "\n"
        lead = newline if text and not text.endswith("\n") else ""
        document = json.dumps({self.container: {name: entry}}, indent=2, ensure_ascii=False)
        added = lead + document.replace("\n", newline) + newline
        told = added.index(_quoted(name), added.index(_quoted(self.container)) + len(self.container) + 2)
        return [Insertion(len(text), added, told)]

    def place(self, text: str, name: str) -> int | None:
        """Return where an entry begins; None if there is none. Raises InvalidDocument."""
        _, container = self._read(text)
        member = None if container is None else _find(container, name)
        return None if member is None else member.start

    def replaced(self, text: str, name: str, entry: Entry) -> str:
        """Return the text with another value for an entry that is there. Raises InvalidDocument."""
        root, container = self._read(text)
        member = _find(container, name) if container is not None else None
        if container is None or member is None:
            raise KeyError(name)
        value = _Layout(text, root).dumped(container, entry, member.start)
        return text[: member.value.start] + value + text[member.value.end :]

    def removed(self, text: str, name: str, *, with_container: bool) -> str:
        """Return the text without an entry. ``with_container``: also without the container, once that is empty."""
        root, container = self._read(text)
        while container is not None and (member := _find(container, name)) is not None:
            text = _without(text, container, member)
            root, container = self._read(text)
        if with_container and root is not None and container is not None and not container.members:
            inner = text[container.start + 1 : container.end - 1]
            if not inner.strip(_SPACE):
                text = _without(text, root, next(each for each in root.members or () if each.value is container))
        return text

    def _read(self, text: str) -> tuple[_Node | None, _Node | None]:
        """Return the root and the container."""
        root = _parsed(text)
        if root is None:
            return None, None
        if root.members is None:
            raise InvalidDocument("it is not a JSON object")
        member = _find(root, self.container)
        if member is not None and member.value.members is None:
            raise InvalidDocument(f"{self.container} is not an object")
        return root, None if member is None else member.value


def _find(node: _Node, key: str) -> _Member | None:
    """Return the member with a key: the last one, which is what counts if there are several."""
    return next((each for each in reversed(node.members or ()) if each.key == key), None)


def _quoted(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)


class _Layout:
    """How a document is laid out: what is added looks like what is there."""

    def __init__(self, text: str, root: _Node | None) -> None:
        self._text = text
        self._newline = "\r\n" if "\r\n" in text else "\n"
        members = root.members if root is not None and root.members else []
        own_lines = [each for each in members if self._begins_line(each.start)]
        self._unit = (self._indent(own_lines[0].start) if own_lines else "") or "  "
        spaced = [text[each.value.start - 1] in _SPACE for each in members]
        self._separators = (", ", ": ") if all(spaced) else (",", ":")

    def new_member(self, node: _Node, key: str, value: Any, name: str | None = None) -> list[Insertion]:
        """Return how a member is added at the end of an object. ``name``: the key inside of the value that is told."""
        text, members = self._text, node.members or []
        spread = not members or self._is_spread(node)
        last = members[-1] if members else None
        behind = node.start + 1 if last is None else last.value.end if last.comma is None else last.comma + 1
        match = _LAST_COMMENT.match(text, behind)
        at = behind if match is None else match.end()
        lead = trail = ""
        if spread or at > behind:
            indent = self._indent(members[0].start) if members else self._indent(node.start) + self._unit
            lead = self._newline + indent
            if not members and "\n" not in text[at : node.end - 1]:
                trail = self._newline + self._indent(node.start)
            dumped = self._spread(value, indent)
        else:
            lead = self._separators[0].removeprefix(",")
            dumped = json.dumps(value, separators=self._separators, ensure_ascii=False)
        if last is not None and last.comma is not None:
            trail = "," + trail
        colon = ": " if spread else self._separators[1]
        added = f"{lead}{_quoted(key)}{colon}{dumped}{trail}"
        start = len(lead) if name is None else added.index(_quoted(name), len(lead) + len(_quoted(key)))
        found = [Insertion(at, added, start)]
        return found if last is None or last.comma is not None else [Insertion(last.value.end, ","), *found]

    def dumped(self, node: _Node, value: Any, at: int) -> str:
        """Return the value of a member that begins at a place."""
        if self._is_spread(node):
            return self._spread(value, self._indent(at))
        return json.dumps(value, separators=self._separators, ensure_ascii=False)

    def _spread(self, value: Any, indent: str) -> str:
        document = json.dumps(value, indent=self._unit, ensure_ascii=False)
        return document.replace("\n", self._newline + indent)

    def _is_spread(self, node: _Node) -> bool:
        return bool(node.members) and self._begins_line((node.members or [])[0].start)

    def _begins_line(self, at: int) -> bool:
        start = self._text.rfind("\n", 0, at) + 1
        return start > 0 and not self._text[start:at].strip(" \t")

    def _indent(self, at: int) -> str:
        """Return the space at the beginning of the line of a place."""
        match = _INDENT.match(self._text, self._text.rfind("\n", 0, at) + 1)
        return "" if match is None else match[0]


def _without(text: str, node: _Node, member: _Member) -> str:
    """Return the text without a member, its comma and the space before it. Comments stay."""
    members = node.members or []
    place = next(number for number, each in enumerate(members) if each is member)
    start, end = len(text[: member.start].rstrip(_SPACE)), member.value.end
    behind = text[end:] if member.comma is None else text[end : member.comma] + text[member.comma + 1 :]
    after = members[place - 1].value.end if place else node.start
    if _ends_in_line_comment(text[after:start]) and not _LINE_BREAK.match(behind):
        # The line break is the end of that comment.
        start = text.index("\n", start) + 1
    if len(members) == 1 and not (text[node.start + 1 : start] + text[end : node.end - 1]).strip(_SPACE + ","):
        return f"{text[: node.start]}{{}}{text[node.end :]}"
    comma = members[place - 1].comma if place and member.comma is None else None
    if comma is None:
        return text[:start] + behind
    # Without this member nothing is left that the comma before it divides.
    return text[:comma] + text[comma + 1 : start] + behind


def _ends_in_line_comment(text: str) -> bool:
    """Return whether what is between two members ends with a ``//`` comment."""
    found = [each[0] for each in re.finditer(_COMMENT, text)]
    return bool(found) and found[-1].startswith("//") and text.endswith(found[-1])
