"""Reads YAML: every scalar stays the text that was written, and a key that is given twice is a fault.

YAML 1.1 would make False of ``dpop: off`` and a number of ``client_id: 0123``; what a text means is for the
one who knows the key. Only an unquoted ``null``, ``~`` or nothing at all means None.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml
from yaml.composer import Composer

from mcp_auth_proxy.errors import ConfigError, ConfigurationError

_NULL = ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"))
_MERGE = ("tag:yaml.org,2002:merge", re.compile(r"<<\Z"))


# All other tags, such as !!int or !!python/…, are refused with their place.
_TAGS = (*(f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "seq", "map")), None)

_Base: type[yaml.SafeLoader] = yaml.SafeLoader
if yaml.__with_libyaml__:

    class _Fast(Composer, yaml.CSafeLoader):
        # The parser is libyaml's, ten times as fast. Its composer is not used: it overflows the C stack on a
        # file of deeply nested brackets, where Python's raises RecursionError and takes no longer.
        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)

    _Base = _Fast  # type: ignore[assignment]  # not a subclass, but all that is used of one


class _Loader(_Base):  # type: ignore[misc, valid-type]  # chosen when the module is imported
    # This is how PyYAML is told which unquoted scalars and which tags mean something.
    yaml_implicit_resolvers = {first: [_NULL] for first in ("", "~", "n", "N")} | {"<": [_MERGE]}
    yaml_constructors = {tag: _Base.yaml_constructors[tag] for tag in _TAGS}  # noqa: RUF012


@dataclass(frozen=True, slots=True)
class Document:
    """``content`` is made of dict, list, str and None; ``lines`` tells where a dotted path stands, from 1."""

    content: object
    lines: Mapping[str, int]
    faults: tuple[ConfigError, ...]

    def line(self, path: str) -> int:
        """The line of a path, or of the nearest thing around it; 0 for the document."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path, 0)


def parse(data: bytes) -> Document:
    """Parses one YAML document. Raises ConfigurationError, with line and column, when it is no YAML."""
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
        if error.context_mark and mark and error.context_mark.line != mark.line:
            problem += f" (it begins on line {error.context_mark.line + 1})"
        if mark and text[mark.index : mark.index + 1] == "\t":
            problem += ": a tab; YAML is indented with spaces"
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
        # Merge keys change the nodes while they are constructed, so what stands in the file is looked at before.
        lines: dict[str, int] = {}
        faults = tuple(_survey(node, lines))
        return Document(loader.construct_document(node), lines, faults)
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
            yield ConfigError(inner, f"given twice: again on line {line}, first on line {lines[inner]}")
        own.add(key.value)
        lines.setdefault(inner, line)
        if not isinstance(value, yaml.ScalarNode):
            open_nodes.append((value, inner))
