"""Reads one mapping of the configuration after another and gathers everything that is wrong on the way."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mcp_auth_proxy.config.settings import Secret
from mcp_auth_proxy.errors import ConfigError

T = TypeVar("T")
D = TypeVar("D")

NOT_YET = "is not supported in this version"

_YES = frozenset({"true", "yes", "on"})
_NO = frozenset({"false", "no", "off"})
_LARGEST_SECRET = 64 * 1024


class LeftOut(Exception):
    """A secret was not looked for: it is not needed."""


@dataclass(frozen=True, slots=True)
class Context:
    """What reading needs besides the text: the environment, the folder of the file, and the faults so far."""

    environ: Mapping[str, str]
    folder: Path
    faults: list[ConfigError] = field(default_factory=list)
    secrets: bool = True
    """False: secrets are left out, so that they need not be there."""
    secret_files: set[Path] = field(default_factory=set)
    """The files that were read for secrets, or should have been."""

    def without_secrets(self) -> "Context":
        """The same, and the same list of faults, for what is read but not used with its secrets."""
        return replace(self, secrets=False)

    def path(self, text: str) -> Path:
        """A path made absolute; relative ones start at the file's folder. ValueError for an unknown ``~user``."""
        try:
            return (self.folder / Path(text).expanduser()).absolute()
        except RuntimeError:
            raise ValueError("names a home folder that is not there (~)") from None

    def variable(self, name: str) -> str:
        """The value of an environment variable. ValueError when it is unset or empty."""
        value = self.environ.get(name)
        if value is None:
            raise ValueError(f"the environment variable {name!r} is not set")
        if not value:
            raise ValueError(f"the environment variable {name!r} is empty")
        return value

    def file_text(self, name: str) -> str:
        """The text of a file without its last line end. ValueError when it can't be read or is empty."""
        path = self.path(name)
        try:
            with path.open("rb") as file:
                text = file.read(_LARGEST_SECRET + 1).decode()
        except OSError as error:
            raise ValueError(f"the file {path} can't be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ValueError(f"the file {path} is not text") from None
        if len(text) > _LARGEST_SECRET:
            raise ValueError(f"the file {path} is too large for a secret")
        text = text.rstrip("\r\n")
        if not text:
            raise ValueError(f"the file {path} is empty")
        return text

    def secret(self, text: str) -> Secret:
        """The secret behind ``env:NAME`` or ``file:PATH``, or the text itself. LeftOut where none is to be read."""
        if not self.secrets:
            raise LeftOut
        kind, _, name = text.partition(":")
        if kind == "env":
            return Secret(self.variable(name))
        if kind == "file":
            self.secret_files.add(self.path(name))
            return Secret(self.file_text(name))
        return Secret(text)


class Section:
    """One mapping. A key counts as known once it has been asked for; ``close`` reports the others."""

    def __init__(self, value: object, path: str, context: Context) -> None:
        self.path = path
        self.context = context
        self._known: dict[str, None] = {}
        self._content: Mapping[object, object] = {}
        if isinstance(value, Mapping):
            self._content = value
        elif value is not None:
            self.fault("", "must be a mapping (key: value lines)")

    def fault(self, key: str, problem: str) -> None:
        """Notes that a key, or with ``""`` the section itself, is wrong."""
        self.context.faults.append(ConfigError(self.inner(key) if key else self.path, problem))

    def inner(self, key: str) -> str:
        """The dotted path of a key."""
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Whether a key stands here with a value."""
        return self._content.get(key) is not None

    def parsed(self, key: str, parse: Callable[[str], T], default: D) -> T | D:
        """The value of a key as ``parse`` reads it; the default where it is absent or wrong."""
        text = self._text(key)
        return default if text is None else self._apply(key, text, parse, default)

    def text(self, key: str) -> str | None:
        """The text of a key; None where it is absent."""
        return self.parsed(key, str, None)

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        return self.parsed(key, _boolean, default)

    def choice(self, key: str, choices: Mapping[str, T], default: D) -> T | D:
        """One of the named values."""

        def choose(text: str) -> T:
            if text not in choices:
                raise ValueError(f"must be one of {', '.join(choices)}, not {text[:40]!r}")
            return choices[text]

        return self.parsed(key, choose, default)

    def each(self, key: str, parse: Callable[[str], T], *, least: int = 0) -> tuple[T, ...] | None:
        """A list of at least ``least`` items that ``parse`` reads; None where it is absent."""
        self._known[key] = None
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fault(key, "must be a list, for example [a, b]")
            return None
        if len(value) < least:
            self.fault(key, f"must have at least {least} item")
        found: list[T] = []
        for number, item in enumerate(value):
            place = f"{key}[{number}]"
            if not isinstance(item, str) or not item:
                self.fault(place, "must be text")
                continue
            parsed = self._apply(place, item, parse, None)
            if parsed is not None:
                found.append(parsed)
        return tuple(found)

    def section(self, key: str) -> "Section":
        """The mapping under a key; an empty one where it is absent."""
        self._known[key] = None
        return Section(self._content.get(key), self.inner(key), self.context)

    def entries(self) -> Iterator[tuple[str, object]]:
        """Every key with its value as it stands, all of them known from now on."""
        for key, value in self._content.items():
            name = str(key)
            self._known[name] = None
            yield name, value

    def close(self) -> None:
        """Reports every key that nobody asked for, with the known one that looks most like it."""
        for key in self._content:
            if key in self._known:
                continue
            near = difflib.get_close_matches(str(key), self._known, n=1)
            self.fault(str(key), f"unknown key; did you mean {near[0]}?" if near else "unknown key")

    def _text(self, key: str) -> str | None:
        self._known[key] = None
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fault(key, "must be a single value, not a list or a mapping")
            return None
        if not value:
            self.fault(key, "must not be empty")
            return None
        return value

    def _apply(self, key: str, text: str, parse: Callable[[str], T], default: D) -> T | D:
        try:
            return parse(text)
        except LeftOut:
            return default
        except ValueError as error:
            self.fault(key, str(error))
            return default


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise ValueError("must be true or false")
