"""Add an entry to a text, and find the text as it was before, also if something else was changed meanwhile."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

Entry = Mapping[str, Any]
Ours = Callable[[object, str], bool]
"""Whether an entry with a name is one that was added, and not its user's."""


class InvalidDocument(ValueError):
    """A text is not of its format, or of a form that can't be edited. The message says why."""


class Insertion(NamedTuple):
    """A text that is added at a place of another. ``entry``: where in it the entry begins, if it has the entry."""

    at: int
    text: str
    entry: int | None = None


class Editor(Protocol):
    """The entries in a text of one format. Every method raises InvalidDocument."""

    container: str
    """The name of what has the entries."""

    def content(self, text: str) -> Mapping[str, Any]:
        """Return the whole document."""

    def entries(self, text: str) -> dict[str, Any]:
        """Return the entries by name, in their order."""

    def has_container(self, text: str) -> bool:
        """Return whether there is something that has the entries, maybe none."""

    def insertions(self, text: str, name: str, entry: Entry) -> list[Insertion]:
        """Return how a new entry is added."""

    def place(self, text: str, name: str) -> int | None:
        """Return where an entry begins; None if there is none."""

    def replaced(self, text: str, name: str, entry: Entry) -> str:
        """Return the text with another value for an entry that is there."""

    def removed(self, text: str, name: str, *, with_container: bool) -> str:
        """Return the text without an entry; ``with_container``: also without what had it, once that is empty."""


def applied(text: str, insertions: Iterable[Insertion]) -> str:
    """Return the text with what is added."""
    pieces: list[str] = []
    behind = 0
    for each in sorted(insertions, key=lambda insertion: insertion.at):
        pieces += [text[behind : each.at], each.text]
        behind = each.at
    return "".join([*pieces, text[behind:]])


def put(editor: Editor, text: str, name: str, entry: Entry) -> str:
    """Return the text with an entry, new or in place of the one with its name. Raises InvalidDocument."""
    if name in editor.entries(text):
        return editor.replaced(text, name, entry)
    return applied(text, editor.insertions(text, name, entry))


def replayed(editor: Editor, text: str, base: str | None) -> dict[str, Any] | None:
    """Return the entries whose addition to ``base`` makes the text; None if something else was changed too.

    ``base`` is None if there was no file. Raises InvalidDocument.
    """
    before = editor.entries(base or "")
    # Not by ==, for which a number that is none differs from itself.
    added = {
        name: entry for name, entry in editor.entries(text).items() if repr(before.get(name, before)) != repr(entry)
    }
    try:
        return added if _with(editor, base, added) == text else None
    except InvalidDocument:
        # Not all that others write can be written here.
        return None


def without(editor: Editor, text: str, base: str | None, names: Collection[str], ours: Ours) -> str | None:
    """Return the text without some of its entries; None if there was no file before them.

    ``base``: the text before entries were added, as far as it is known. An entry of its user that one of them has
    replaced is there again. Raises InvalidDocument.
    """
    added = replayed(editor, text, base)
    if added is not None and added.keys() >= set(names):
        left = {name: entry for name, entry in added.items() if name not in names}
        if not left and base is None:
            return None
        text = _with(editor, base, left)
    before = editor.entries(base or "")
    for name in names:
        if name in before and not ours(before[name], name):
            text = put(editor, text, name, before[name]) if editor.entries(text).get(name) != before[name] else text
        else:
            text = _cut(editor, text, base, name)
    return text


def _with(editor: Editor, base: str | None, added: Mapping[str, Any]) -> str:
    text = base or ""
    for name, entry in added.items():
        text = put(editor, text, name, entry)
    return text


def _cut(editor: Editor, text: str, base: str | None, name: str) -> str:
    """Return the text without an entry: just what its addition had added, if it is still there as it was."""
    entries, place = editor.entries(text), editor.place(text, name)
    if name not in entries:
        return text
    plain = editor.removed(text, name, with_container=base is not None and not editor.has_container(base))
    if place is None or name in editor.entries(base or ""):
        return plain
    insertions = editor.insertions(base or "", name, entries[name])
    if len(insertions) > 1:
        # A comma was added too: then all space before the entry is its own.
        return plain
    start = place - (insertions[0].entry or 0)
    added = insertions[0].text
    if start < 0 or text[start : start + len(added)] != added:
        return plain
    # The line break that began it ends the line before, if something was added behind it.
    for kept in ("", "\n"):
        exact = text[:start] + kept + text[start + len(added) :]
        if _is(editor, exact, plain):
            return exact
    return plain


def _is(editor: Editor, text: str, other: str) -> bool:
    """Return whether two texts say the same."""
    try:
        return repr(editor.content(text)) == repr(editor.content(other))
    except InvalidDocument:
        return False
