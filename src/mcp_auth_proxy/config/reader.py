"""Read the mappings of the configuration and collect all errors."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from mcp_auth_proxy.config.location import VARIABLE, platform_file
from mcp_auth_proxy.config.settings import Secret
from mcp_auth_proxy.errors import ConfigError

T = TypeVar("T")
D = TypeVar("D")

_YES = frozenset({"true", "yes", "on"})
_NO = frozenset({"false", "no", "off"})
_LARGEST_SECRET = 64 * 1024


class SecretSkipped(Exception):
    """A secret was not read because it is not needed."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the readers share: the environment, the folder of the file, and the errors so far."""

    environ: Mapping[str, str]
    folder: Path
    errors: list[ConfigError] = field(default_factory=list)
    secrets: bool = True
    """False: secrets are not read, so they may be missing."""
    secret_files: set[Path] = field(default_factory=set)
    """The files that were read for secrets, or should have been."""
    programs: bool = True
    """False: the file was not chosen by the user, so what would run a program is refused."""

    def without_secrets(self) -> "Context":
        """Return a copy that skips secrets but shares the list of errors."""
        return replace(self, secrets=False)

    def require_programs(self, what: str) -> None:
        """Raise ValueError if the file may run no program. ``what`` would."""
        if not self.programs:
            place = platform_file()
            raise ValueError(
                f"{what}, and this file was only found in the current folder: one that came with a cloned repository "
                f"could run anything. If it is yours, name it with --config or ${VARIABLE}"
                f"{'' if place is None else f', or move it to {place}'}"
            )

    def path(self, text: str) -> Path:
        """Return an absolute path, relative to the file's folder. Raises ValueError for an unknown ``~user``."""
        try:
            return (self.folder / Path(text).expanduser()).absolute()
        except RuntimeError:
            raise ValueError("names a home folder that does not exist (~)") from None

    def variable(self, name: str) -> str:
        """Return an environment variable. Raises ValueError if it is unset or empty."""
        value = self.environ.get(name)
        if value is None:
            raise ValueError(f"the environment variable {name!r} is not set")
        if not value:
            raise ValueError(f"the environment variable {name!r} is empty")
        return value

    def file_text(self, name: str) -> str:
        """Return the text of a file without trailing newlines. Raises ValueError if it can't be read or is empty."""
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
        """Return the secret of ``env:NAME`` or ``file:PATH``, or the text itself.

        Raises ValueError, or SecretSkipped if secrets are not needed.
        """
        if not self.secrets:
            raise SecretSkipped
        kind, _, name = text.partition(":")
        if kind == "env":
            return Secret(self.variable(name))
        if kind == "file":
            self.secret_files.add(self.path(name))
            return Secret(self.file_text(name))
        return Secret(text)


class Section:
    """One mapping. Each key that is read counts as known; ``close`` reports the others.

    One mistake is one error: a key has at most one, and a section that is not a mapping lacks no keys.
    """

    def __init__(self, value: object, path: str, context: Context) -> None:
        self.path = path
        self.context = context
        self._known: dict[str, None] = {}
        self._content: Mapping[object, object] = {}
        self._faulty: set[str] = set()
        self.usable = value is None or isinstance(value, Mapping)
        """False if the value is not a mapping, which has been reported."""
        if isinstance(value, Mapping):
            self._content = value
        elif value is not None:
            context.errors.append(ConfigError(path, "must be a mapping (key: value lines)"))

    def without_secrets(self) -> "Section":
        """Return the same mapping to read without its secrets, which may be missing then."""
        return Section(self._content, self.path, self.context.without_secrets())

    def error(self, key: str, problem: str) -> None:
        """Record an error of a key, unless another mistake explains it."""
        if self.usable and key not in self._faulty:
            self._faulty.add(key)
            self.context.errors.append(ConfigError(self.inner(key), problem))

    def is_faulty(self, key: str) -> bool:
        """Return whether an error of a key was recorded: what depends on its value can't be judged then."""
        return key in self._faulty

    def inner(self, key: str) -> str:
        """Return the dotted path of a key."""
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Return whether a key is present with a value."""
        return self._content.get(key) is not None

    def parsed(self, key: str, parse: Callable[[str], T], default: D) -> T | D:
        """Return the value of a key, read by ``parse``; the default if it is absent or invalid."""
        text = self._text(key)
        return default if text is None else self._apply(key, text, parse, default)

    def text(self, key: str) -> str | None:
        """Return the text of a key; None if it is absent."""
        return self.parsed(key, str, None)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return a boolean; the default if it is absent or invalid."""
        return self.parsed(key, _boolean, default)

    def choice(self, key: str, choices: Mapping[str, T], default: D) -> T | D:
        """Return the choice that a key names; the default if it is absent or invalid."""

        def choose(text: str) -> T:
            if text not in choices:
                raise ValueError(f"must be one of {', '.join(choices)}, not {text[:40]!r}")
            return choices[text]

        return self.parsed(key, choose, default)

    def each(self, key: str, parse: Callable[[str], T], *, min_items: int = 0) -> tuple[T, ...] | None:
        """Return a list of at least ``min_items`` items, read by ``parse``; None if it is absent."""
        self._known[key] = None
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            self.error(key, "must be a list, for example [a, b]")
            return None
        if len(value) < min_items:
            self.error(key, f"must have at least {min_items} item")
        found: list[T] = []
        for number, item in enumerate(value):
            place = f"{key}[{number}]"
            if not isinstance(item, str) or not item:
                self.error(place, "must be text")
                continue
            parsed = self._apply(place, item, parse, None)
            if parsed is not None:
                found.append(parsed)
        return tuple(found)

    def one_or_more(self, key: str, parse: Callable[[str], T]) -> tuple[T, ...] | None:
        """Return a list of at least one item, or a single value as such a list; None if it is absent or invalid."""
        if isinstance(self._content.get(key), list):
            return self.each(key, parse, min_items=1)
        found = self.parsed(key, parse, None)
        return None if found is None else (found,)

    def sections(self, key: str) -> list["Section"]:
        """Return the mappings of a list under a key; none if it is absent."""
        self._known[key] = None
        value = self._content.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.error(key, "must be a list of mappings (- key: value lines)")
            return []
        return [
            Section("" if item is None else item, f"{self.inner(key)}[{number}]", self.context)
            for number, item in enumerate(value)
        ]

    def section(self, key: str) -> "Section":
        """Return the mapping under a key; an empty one if it is absent."""
        self._known[key] = None
        return Section(self._content.get(key), self.inner(key), self.context)

    def entries(self) -> Iterator[tuple[str, object]]:
        """Yield each key with its raw value, and count all of them as known."""
        for key, value in self._content.items():
            name = str(key)
            self._known[name] = None
            yield name, value

    def close(self) -> None:
        """Record an error for each unknown key, with the most similar known one, which is not called missing too."""
        for key in self._content:
            if key in self._known:
                continue
            near = difflib.get_close_matches(str(key), self._known, n=1)
            if near and near[0] not in self._content:
                self._retract(near[0])
            self.error(str(key), f"unknown key; did you mean {near[0]}?" if near else "unknown key")

    def _retract(self, key: str) -> None:
        errors = self.context.errors
        errors[:] = [error for error in errors if error.path != self.inner(key)]

    def _text(self, key: str) -> str | None:
        self._known[key] = None
        value = self._content.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self.error(key, "must be a single value, not a list or a mapping")
            return None
        if not value:
            self.error(key, "must not be empty")
            return None
        return value

    def _apply(self, key: str, text: str, parse: Callable[[str], T], default: D) -> T | D:
        try:
            return parse(text)
        except SecretSkipped:
            return default
        except ValueError as error:
            self.error(key, str(error))
            return default


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in _YES:
        return True
    if word in _NO:
        return False
    raise ValueError("must be true or false")
