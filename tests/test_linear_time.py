"""Every pattern of the package, and everything that reads long texts, takes time in proportion to its input.

One event loop serves all clients: a pattern that takes quadratic time on 64 KB stops them all for seconds.
"""

import ast
import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

import mcp_auth_proxy
from mcp_auth_proxy.errors import without_query_values
from mcp_auth_proxy.oauth import challenge, oauth_error
from mcp_auth_proxy.observability.redaction import redact
from mcp_auth_proxy.web.cookies import read_cookies

SIZE = 64 * 1024
SMALL = 4 * 1024
CANDIDATES = 8
"""How many inputs are timed at full size: those that are slowest when they are small."""

FAST = 0.05
"""Seconds of CPU. Less than this is not compared: 64 KB in quadratic time take seconds."""

RATIO = 3.0
"""Twice the input may take this many times as long: 2 is linear, 4 is quadratic."""

ATOMS = (
    *("a", "A", "0", "é", " ", "\t", "-", ".", "_", "/", ":", "=", ",", '"', "'", "\\", "&", "?", "#", "%", "<", "\n"),
    *("http://", "HTTPS://a", "http://a?", "?.", "://a:", "a@", "a.", "a:", "0.", "a-", "a=", "a,", "a ", " ,", "%3d"),
    *("token=", 'token="', '"token":"', "token\\", '\\"', "secret", "a_", "cookie:", "Bearer ", "eyJ", "eyJaaaaa."),
    *("tag '", "00-", "-0", "a/", "&a=", "&#", "~"),
)
BEFORE = ("", "http://a?", "token=", '"', "a")
AFTER = ("", "\x00")

Subject = Callable[[Any], object]


def modules() -> Iterator[tuple[str, Any]]:
    for found in pkgutil.walk_packages(mcp_auth_proxy.__path__, "mcp_auth_proxy."):
        if not found.name.endswith("__main__"):
            yield found.name, importlib.import_module(found.name)


def uses(source: str) -> dict[str, set[str]]:
    """Return the methods with which a module uses each name."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.setdefault(node.value.id, set()).add(node.attr)
    return found


def patterns() -> Iterator[tuple[str, re.Pattern[Any], str]]:
    """Yield the name, the pattern and the method of each use of each pattern of the package."""
    for module_name, module in modules():
        methods = uses(Path(module.__file__).read_text())
        for name, value in vars(module).items():
            parts = value if isinstance(value, tuple) else (value,)
            for pattern in (part for part in parts if isinstance(part, re.Pattern)):
                # A pattern that is passed on is a scanner's, which matches at a position.
                for method in sorted(methods.get(name, set()) & {"match", "fullmatch", "search", "sub"}) or ["match"]:
                    yield f"{module_name.removeprefix('mcp_auth_proxy.')}.{name}.{method}", pattern, method


def applied(pattern: re.Pattern[Any], method: str) -> Subject:
    def apply(text: str) -> object:
        subject: Any = text.encode("latin-1") if isinstance(pattern.pattern, bytes) else text
        return sum(1 for _ in pattern.finditer(subject)) if method == "sub" else getattr(pattern, method)(subject)

    return apply


def with_cookie(text: str) -> Request:
    return Request({"type": "http", "headers": [(b"cookie", f'a="{text}"'.encode("latin-1"))]})


SUBJECTS: dict[str, Subject] = {
    **{name: applied(pattern, method) for name, pattern, method in patterns()},
    "without_query_values": without_query_values,
    "redact": redact,
    "challenge.parse": lambda text: challenge.parse([text.encode("latin-1")]),
    "challenge.parse of a quoted value": lambda text: challenge.parse([b'Bearer a="' + text.encode("latin-1")]),
    "read_cookies": lambda text: read_cookies(with_cookie(text)),
    "format_error": lambda text: oauth_error.format_error("e", text, secrets=["secret", "a"]),
}


def inputs(size: int) -> Iterator[tuple[str, str]]:
    """Yield a name and a text of this size: repetitions, with something before, in the middle and after."""
    for atom in ATOMS:
        for before in BEFORE:
            for after in AFTER:
                yield f"{before} {atom}* {after!r}", (before + atom * (size // len(atom)))[: size - 1] + after
        half = atom * (size // 2 // len(atom))
        yield f'{atom}* " {atom}*', f'token={half}"{half}'


def seconds(subject: Subject, text: str) -> float:
    begun = time.process_time()
    subject(text)
    return time.process_time() - begun


def test_the_patterns_of_the_package_are_found() -> None:
    assert {"errors._QUERY.sub", "observability.redaction._PARAMETERS.sub", "net.urls._URL.fullmatch"} < {*SUBJECTS}


@pytest.mark.parametrize("name", SUBJECTS)
def test_64_kb_of_the_worst_input_take_linear_time(name: str) -> None:  # T79
    subject = SUBJECTS[name]
    small = [seconds(subject, text) for _, text in inputs(SMALL)]
    slowest = sorted(range(len(small)), key=small.__getitem__)[-CANDIDATES:]
    for number, ((shape, text), (_, half)) in enumerate(zip(inputs(SIZE), inputs(SIZE // 2), strict=True)):
        if number not in slowest or seconds(subject, text) < FAST:
            continue
        # The shortest of three: whatever else the machine does only adds to the time.
        before, after = (min(seconds(subject, t) for _ in range(3)) for t in (half, text))
        assert after < RATIO * before, f"{shape}: {before:.2f} s for 32 KB, {after:.2f} s for 64 KB"
