"""The header fields that repeat parts of a message (MCP 2026-07-28, Streamable HTTP, "Request Metadata").

``MCP-Protocol-Version`` and ``Mcp-Method`` are for every request, ``Mcp-Name`` is for three methods, and
``Mcp-Param-*`` has the arguments of a tool whose schema marks them with ``x-mcp-header``.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

Fields = list[tuple[bytes, bytes]]

Annotations = Mapping[tuple[str, ...], str]
"""The marked properties of a tool's schema: path → the name in ``Mcp-Param-{name}``."""

HEADER_MISMATCH = -32020
"""The code with which a server refuses fields that do not match the body."""

NAMED_BY = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
"""Method → the parameter that ``Mcp-Name`` repeats."""

_ANNOTATION = "x-mcp-header"
_TYPES = frozenset({"string", "integer", "boolean"})
_MAX_VALUE = 8 * 1024
"""Bytes of a value: longer ones make heads that servers refuse."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_PLAIN = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_ENCODED = re.compile(r"=\?base64\?.*\?=")

_SCHEMAS = frozenset(
    {
        "additionalProperties",
        "contains",
        "contentSchema",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS = frozenset({"patternProperties", "dependentSchemas", "$defs", "definitions"})
"""The keywords of JSON Schema 2020-12 whose values are a schema, a list of them, and a mapping to them."""


def request_fields(
    method: str, params: Mapping[str, Any], version: str, annotations: Annotations | None = None
) -> Fields:
    """Return the fields of a request. What can't be a header field is left out, and the server says so."""
    fields: Fields = []
    if _PLAIN.fullmatch(version):
        fields.append((b"mcp-protocol-version", version.encode()))
    if _PLAIN.fullmatch(method):
        fields.append((b"mcp-method", method.encode()))
    name = params.get(NAMED_BY.get(method, ""))
    if isinstance(name, str):
        _add(fields, "mcp-name", name)
    arguments = params.get("arguments")
    if annotations and method == "tools/call" and isinstance(arguments, Mapping):
        for path, token in annotations.items():
            value = _text(_at(arguments, path))
            if value is not None:
                _add(fields, f"mcp-param-{token.lower()}", value)
    return fields


def annotations_of(schema: object) -> dict[tuple[str, ...], str]:
    """Return the marked properties of a tool's ``inputSchema``.

    Raises ValueError with the reason if a mark breaks a rule: clients must not use such a tool.
    """
    found: dict[tuple[str, ...], str] = {}
    for path, part in _parts(schema):
        if _ANNOTATION not in part:
            continue
        token = part[_ANNOTATION]
        if not path:
            raise ValueError(f"{_ANNOTATION} stands where no property is reached by `properties` alone")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise ValueError(f"{_ANNOTATION} is not the name of a header field (RFC 9110 §5.1)")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ValueError(f"{_ANNOTATION} is on a property that is neither string, integer nor boolean")
        if token.lower() in (each.lower() for each in found.values()):
            raise ValueError(f"{_ANNOTATION} has one name for two properties")
        found[path] = token
    return found


def encoded(value: str) -> str:
    """Return a text as the value of a field: as it is, or in base64 if a field can't carry it."""
    if (not value or _PLAIN.fullmatch(value)) and not _ENCODED.fullmatch(value):
        return value
    return f"=?base64?{base64.b64encode(value.encode()).decode()}?="


def _add(fields: Fields, name: str, value: str) -> None:
    try:
        text = encoded(value)
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can express and UTF-8 can't.
        return
    if len(text) <= _MAX_VALUE:
        fields.append((name.encode(), text.encode()))


def _text(value: object) -> str | None:
    match value:
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer():
            return str(int(value))
        case str() | int() | float():
            return str(value)
    return None


def _at(arguments: Mapping[str, Any], path: tuple[str, ...]) -> object:
    value: object = arguments
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _parts(schema: object) -> Iterator[tuple[tuple[str, ...] | None, Mapping[str, Any]]]:
    """Yield each schema in a schema, and its path; None if more than ``properties`` leads there."""
    stack: list[tuple[tuple[str, ...] | None, object]] = [((), schema)]
    while stack:
        path, part = stack.pop()
        if not isinstance(part, Mapping):
            continue
        yield path, part
        for keyword, value in part.items():
            if keyword == "properties" and isinstance(value, Mapping):
                stack += [(None if path is None else (*path, name), each) for name, each in value.items()]
            elif keyword in _SCHEMAS:
                stack.append((None, value))
            elif keyword in _LISTS and isinstance(value, list):
                stack += [(None, each) for each in value]
            elif keyword in _MAPS and isinstance(value, Mapping):
                stack += [(None, each) for each in value.values()]
