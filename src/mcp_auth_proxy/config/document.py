"""Read YAML. Every scalar stays a string as written, and a duplicate key is an error.

YAML 1.1 would read ``dpop: off`` as False and ``client_id: 0123`` as a number; here the reader of each key decides
what its text means. Only an unquoted ``null``, ``~`` or an empty value means None.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from yaml.composer import Composer

from mcp_auth_proxy.errors import ConfigError, ConfigurationError

_NULL = ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"))
_MERGE = ("tag:yaml.org,2002:merge", re.compile(r"<<\Z"))

_MAX_KEYS = 200_000
"""Keys of all mappings together. A merged key counts in every mapping that it is merged into: a few lines can merge so
often that neither time nor memory would suffice."""

_QUOTED = re.compile(r"(alias|anchor|tag handle|tag) ['\"].*['\"]", re.DOTALL)

# All other tags, such as !!int or !!python/…, are refused with line and column.
_TAGS = (*(f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "seq", "map")), None)

_Base: type[yaml.SafeLoader] = yaml.SafeLoader
if yaml.__with_libyaml__:

    class _Fast(Composer, yaml.CSafeLoader):
        # libyaml's parser is ten times as fast as Python's. Its composer is not used: deeply nested brackets
        # overflow the C stack, while Python's composer raises RecursionError and is as fast.
        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)

    _Base = _Fast  # type: ignore[assignment]  # not a subclass, but has all methods used here


class _Loader(_Base):  # type: ignore[misc, valid-type]  # chosen at import time
    # PyYAML's way to say which unquoted scalars and which tags have a meaning.
    yaml_implicit_resolvers = {first: [_NULL] for first in ("", "~", "n", "N")} | {"<": [_MERGE]}
    yaml_constructors = {tag: _Base.yaml_constructors[tag] for tag in _TAGS}  # noqa: RUF012
    _keys = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Called for each mapping, and for a merged one each time before its keys are copied.
        super().flatten_mapping(node)
        self._keys += len(node.value)
        if self._keys > _MAX_KEYS:
            problem = f"over {_MAX_KEYS} keys, with merged keys (<<)"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML document: ``content`` of dict, list, str and None; ``lines`` has the line of each dotted path, from 1."""

    content: object
    lines: Mapping[str, int]
    errors: tuple[ConfigError, ...]

    def line(self, path: str) -> int:
        """Return the line of a path, or of its nearest parent; 0 for the document itself."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path, 0)

    def located(self, errors: Iterable[ConfigError]) -> list[ConfigError]:
        """Return errors with their lines, in file order."""
        found = [error if error.line else replace(error, line=self.line(error.path)) for error in errors]
        return sorted(found, key=lambda error: error.line)


def located(errors: Collection[ConfigError], source: Path) -> list[ConfigError]:
    """Return errors that were found after a file was read, with their lines in it."""
    try:
        return parse(source.read_bytes()).located(errors)
    except (OSError, ConfigurationError):
        # The file was changed meanwhile.
        return list(errors)


def parse(data: bytes) -> Document:
    """Parse one YAML document. Raises ConfigurationError with line and column if it is not valid YAML."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError([ConfigError("", f"line {line}: the file is not UTF-8 text")]) from None
    try:
        return _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        # What PyYAML quotes here may be an unquoted secret that begins with *, & or !.
        problem, quoted = _QUOTED.subn(r"\1", problem)
        if quoted:
            problem += " (put a value that begins with *, & or ! in quotes)"
        if error.context_mark and mark and error.context_mark.line != mark.line:
            problem += f" (it begins on line {error.context_mark.line + 1})"
        if mark and text[mark.index : mark.index + 1] == "\t":
            problem += ": a tab; indent YAML with spaces"
        raise ConfigurationError([ConfigError("", f"{where}not valid YAML: {problem}")]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigurationError([ConfigError("", f"line {line}: not valid YAML: {error.reason}")]) from None
    except RecursionError:
        raise ConfigurationError([ConfigError("", "not usable: it is nested too deeply")]) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigurationError([ConfigError("", f"not valid YAML: {error}")]) from None


def _parse(text: str) -> Document:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None, {}, ())
        # Construction applies merge keys to the nodes, so the file's own keys are collected before it.
        lines: dict[str, int] = {}
        errors = tuple(_survey(node, lines))
        return Document(loader.construct_document(node), lines, errors)
    finally:
        loader.dispose()


def _survey(root: yaml.Node, lines: dict[str, int]) -> Iterator[ConfigError]:
    seen: set[int] = set()
    open_nodes: list[tuple[yaml.Node, str]] = [(root, "")]
    while open_nodes:
        node, path = open_nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield from _survey_mapping(node, path, lines, open_nodes)
        elif isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                inner = f"{path}[{number}]"
                lines.setdefault(inner, item.start_mark.line + 1)
                if not isinstance(item, yaml.ScalarNode):
                    open_nodes.append((item, inner))


def _survey_mapping(
    node: yaml.MappingNode, path: str, lines: dict[str, int], open_nodes: list[tuple[yaml.Node, str]]
) -> Iterator[ConfigError]:
    own: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE[0]:
            continue
        line = key.start_mark.line + 1
        inner = f"{path}.{key.value}" if path else key.value
        if key.value in own:
            yield ConfigError(inner, f"duplicate key, first on line {lines[inner]}", line)
        own.add(key.value)
        lines.setdefault(inner, line)
        if not isinstance(value, yaml.ScalarNode):
            open_nodes.append((value, inner))
