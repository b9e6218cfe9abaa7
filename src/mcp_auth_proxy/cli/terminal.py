"""All that the commands print. Control characters in it are escaped: names, tools and errors come from servers."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mcp_auth_proxy.observability.controls import escaped, escaped_json

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_FRAMES = "-\\|/"
_FRAME_SECONDS = 0.1
_LINE_SECONDS = 5.0
_ERASE_LINE = "\r\x1b[K"


class Styled(str):
    """A line with colors, made of our own words only. It is printed as it is."""


def styled(text: str, **style: Any) -> Styled:
    """Return a text in a color, as ``click.style`` takes it; control characters in it are escaped."""
    return Styled(click.style(escaped(text), **style))


def say(*lines: str, err: bool = False) -> None:
    """Print each text on a line of its own, on stdout or stderr. Colors are removed if that is not a terminal."""
    for line in lines:
        click.echo(line if isinstance(line, Styled) else escaped(line), err=err, color=_wants_color())


def say_json(document: object) -> None:
    """Print a document as JSON."""
    say(*escaped_json(json.dumps(document, indent=2, ensure_ascii=False)).split("\n"))


def complain(*lines: str) -> None:
    """Print each text on a line of its own, on stderr."""
    say(*lines, err=True)


def window_width() -> int | None:
    """Return the columns of the window that stdout is shown in; None if it is not a terminal."""
    return shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else None


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on stderr, if that is a terminal, that something is waited for, until the block ends."""
    if not _is_terminal(sys.stderr) or os.environ.get("TERM") == "dumb":
        yield
        return
    done = threading.Event()
    spinner = threading.Thread(target=_spin, args=(escaped(text), done), daemon=True)
    spinner.start()
    try:
        yield
    finally:
        done.set()
        spinner.join()


class ProgressLine:
    """A line on stderr that says how far something is; on a terminal it replaces itself, else it comes rarely."""

    def __init__(self) -> None:
        self._in_place = _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        self._shown_at = float("-inf")
        self._shown = False

    def show(self, text: str) -> None:
        """Show a text, unless the last one is too recent."""
        now = time.monotonic()
        if now < self._shown_at + (_FRAME_SECONDS if self._in_place else _LINE_SECONDS):
            return
        self._shown_at = now
        if not self._in_place:
            complain(text)
            return
        room = max(1, shutil.get_terminal_size().columns - 1)
        sys.stderr.write(f"{_ERASE_LINE}{escaped(text)[:room]}")
        sys.stderr.flush()
        self._shown = True

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._shown:
            sys.stderr.write(_ERASE_LINE)
            sys.stderr.flush()


def _spin(text: str, done: threading.Event) -> None:
    """Turn a wheel on the last line, which whatever else is printed replaces."""
    encoding = (sys.stderr.encoding or "").lower()
    frames = _FRAMES if encoding.startswith("utf") else _PLAIN_FRAMES
    room = max(1, shutil.get_terminal_size().columns - 4)
    number = 0
    while not done.is_set():
        sys.stderr.write(f"{_ERASE_LINE}{frames[number % len(frames)]} {text[:room]}\r")
        sys.stderr.flush()
        number += 1
        done.wait(_FRAME_SECONDS)
    sys.stderr.write(_ERASE_LINE)
    sys.stderr.flush()


def _wants_color() -> bool | None:
    """Return what the environment says about colors (https://no-color.org); None: where there is a terminal."""
    if os.environ.get("NO_COLOR") or (os.environ.get("TERM") == "dumb" and not os.environ.get("FORCE_COLOR")):
        return False
    force = os.environ.get("FORCE_COLOR")
    return None if not force else force != "0"


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())
