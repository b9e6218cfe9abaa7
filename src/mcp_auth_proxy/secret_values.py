"""The values of the secrets that this process has, so that a text from outside that repeats one is masked.

A server may put what it was sent, or what it has issued, into its errors. Values are found whatever stands around them,
also cut off, percent-encoded, in base64 or hexadecimal. Only texts that are shown are searched: errors and log lines.
"""

import base64
import re
import threading
from bisect import bisect, bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from html import escape
from urllib.parse import quote

MASK = "****"

_PREFIX = 8
"""Characters. Shorter values are words, such as the secret of a test setup: they would be found everywhere."""

_ENOUGH = 12
"""Characters at the beginning of a secret that are masked even if the rest is missing."""

_ENOUGH_WORDS = 20
"""The same if they look like words, as in ``authorization-code-1``: such words stand in many texts."""

_HEAD = 64
"""Characters of each value that are kept. JWTs of one issuer often have the same ones."""

_MOST = 40_000
"""Values kept, some twenty for each secret; beyond that the oldest is dropped."""

_WORDS = re.compile(r"[a-z_.-]*")
_RUN = re.compile(r"\S*")


class SecretValues:
    """A bounded set of values. The time to search a text does not grow with their number."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._lengths: dict[str, int] = {}
        """The beginning of each value → the length of the longest such value; the oldest first."""
        self._sorted: list[str] = []
        self._prefixes: Counter[str] = Counter()
        self._lock = threading.Lock()  # errors are made in other threads too

    def remember(self, *values: str | None) -> None:
        """Mask these values from now on. Values that are too short, or URLs, are ignored."""
        for value in values:
            # A server that issues a URL as its token must not blot out that URL in the errors of others.
            if value and len(value) >= _PREFIX and "://" not in value:
                with self._lock:
                    if self._lengths.get(value[:_HEAD], 0) < len(value):
                        for spelling in _spellings(value):
                            self._add(spelling)

    def masked(self, text: str) -> str:
        """Return a text with every value in it masked."""
        if len(text) < _PREFIX or not self._prefixes:
            return text
        with self._lock:
            return "".join(self._pieces(text))

    def _pieces(self, text: str) -> Iterator[str]:
        prefixes = self._prefixes
        shown = start = 0
        while start <= len(text) - _PREFIX:
            length = self._found_at(text, start) if text[start : start + _PREFIX] in prefixes else 0
            if length:
                yield text[shown:start] + MASK
                shown = start = start + length
            else:
                start += 1
        yield text[shown:]

    def _found_at(self, text: str, start: int) -> int:
        """Return how many characters to mask from ``start`` on, 0 if no value begins there."""
        window = text[start : start + _HEAD]
        place = bisect(self._sorted, window)
        longest = 0
        # Of all values in order, the two neighbors have most in common with the text.
        for head in self._sorted[max(place - 1, 0) : place + 1]:
            common = _common(head, window)
            if common == len(head):
                run = _RUN.match(text, start + common)
                end = run.end() if run else start + common
                longest = max(longest, min(self._lengths[head], end - start), common)
            elif common >= (_ENOUGH_WORDS if _WORDS.fullmatch(window, 0, common) else _ENOUGH):
                longest = max(longest, common)
        return longest

    def _add(self, value: str) -> None:
        head = value[:_HEAD]
        if head not in self._lengths:
            if len(self._lengths) >= self._most:
                self._drop(next(iter(self._lengths)))
            insort(self._sorted, head)
            self._prefixes[head[:_PREFIX]] += 1
        self._lengths[head] = max(len(value), self._lengths.pop(head, 0))

    def _drop(self, head: str) -> None:
        del self._lengths[head], self._sorted[bisect_left(self._sorted, head)]
        self._prefixes[head[:_PREFIX]] -= 1
        if not self._prefixes[head[:_PREFIX]]:
            del self._prefixes[head[:_PREFIX]]


def _common(one: str, other: str) -> int:
    """Return how many characters at the beginning of two texts are the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _spellings(value: str) -> Iterator[str]:
    """Yield a value as it is and as a server may write it; in base64 also amid other text, without the ends."""
    data = value.encode("utf-8", "surrogatepass")
    yield value
    percent = quote(value, safe="")
    found = {percent, percent.lower(), quote(percent), quote(value), value.replace("/", r"\/"), escape(value)}
    # Every character may be written as its code.
    for codes in (data.hex("%"), data.hex("%").upper()):
        found |= {codes.replace("%", ""), f"%{codes}", r"\u00" + codes.replace("%", r"\u00")}
    found.add("".join(f"&#{code};" for code in data))
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + data).decode().rstrip("=")
        # The first characters depend on what stands before the value, the last one on what follows.
        inner = encoded[(0, 2, 3)[shift] : len(encoded) - bool((shift + len(data)) % 3)]
        found |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    yield from (spelling for spelling in found - {value} if len(spelling) >= _PREFIX)


_known = SecretValues()
remember = _known.remember
masked = _known.masked
