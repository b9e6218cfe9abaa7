"""Escape the characters that control a terminal: texts from servers are printed and logged."""

import re

_CONTROLS = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
"""DEL, C1, what starts another line or turns its direction (Unicode bidi controls), and halves of characters."""

_IN_TEXT = re.compile(rf"[\x00-\x1f{_CONTROLS}]")
_IN_JSON = re.compile(rf"[{_CONTROLS}]")


def escaped(line: str) -> str:
    """Return one line of text without control characters, which become ``\\n``, ``\\x1b``, ``\\u202e``."""
    return _IN_TEXT.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), line)


def escaped_json(document: str) -> str:
    """Return a JSON document with the same content and no control character but the line breaks between members."""
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", document)
