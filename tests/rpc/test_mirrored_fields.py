"""The header fields of MCP 2026-07-28, as its specification and the official SDK have them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.shared.inbound import decode_header_value, find_invalid_x_mcp_header, mcp_param_headers, x_mcp_header_map

from fakes.mcp_client import MODERN
from mcp_auth_proxy.rpc.mirrored_fields import annotations_of, encoded, request_fields


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def marked(token: object = "Region", kind: object = "string") -> dict[str, object]:
    return {"type": kind, "x-mcp-header": token}


def params_of(annotations: dict[tuple[str, ...], str], arguments: object) -> dict[str, str]:
    fields = request_fields("tools/call", {"name": "t", "arguments": arguments}, MODERN, annotations)
    return {name.decode(): value.decode() for name, value in fields if name.startswith(b"mcp-param-")}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("us-west1", "us-west1"),
        ("", ""),
        ("Hello, 世界", "=?base64?SGVsbG8sIOS4lueVjA==?="),
        (" padded ", "=?base64?IHBhZGRlZCA=?="),
        ("line1\nline2", "=?base64?bGluZTEKbGluZTI=?="),
        ("=?base64?literal?=", "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?="),
    ],
)
def test_a_value_is_encoded_as_the_specification_shows(value: str, field: str) -> None:
    assert encoded(value) == field


@given(st.text(st.characters(codec="utf-8")))
def test_the_official_sdk_reads_every_value(value: str) -> None:
    field = encoded(value)
    assert field.isascii()
    assert field == "" or field.isprintable()
    assert decode_header_value(field) == value


@pytest.mark.parametrize(
    ("method", "params", "fields"),
    [
        ("tools/list", {"name": "x"}, [(b"mcp-method", b"tools/list")]),
        ("tools/call", {"name": "echo"}, [(b"mcp-method", b"tools/call"), (b"mcp-name", b"echo")]),
        ("prompts/get", {"name": "p"}, [(b"mcp-method", b"prompts/get"), (b"mcp-name", b"p")]),
        ("resources/read", {"uri": "a:/b"}, [(b"mcp-method", b"resources/read"), (b"mcp-name", b"a:/b")]),
        ("tools/call", {"name": 1}, [(b"mcp-method", b"tools/call")]),
        ("tools/call", {"name": "\ud800"}, [(b"mcp-method", b"tools/call")]),
        ("tools/call", {"name": "x" * 9000}, [(b"mcp-method", b"tools/call")]),
        ("x\r\ny", {}, []),
    ],
)
def test_a_request_has_method_and_name(method: str, params: dict[str, Any], fields: list[tuple[bytes, bytes]]) -> None:
    assert request_fields(method, params, MODERN) == [(b"mcp-protocol-version", MODERN.encode()), *fields]


def test_a_version_that_no_field_can_carry_is_left_out() -> None:
    assert request_fields("ping", {}, "2026\r\nx: y") == [(b"mcp-method", b"ping")]


def test_the_marked_arguments_are_repeated() -> None:
    tool = schema(
        region=marked(),
        confirm=marked("Confirm", "boolean"),
        options=schema(limit=marked("Limit", "integer")),
        absent=marked("Absent"),
        nothing=marked("Nothing"),
        plain={"type": "string"},
    )
    arguments = {"region": "eu", "confirm": True, "options": {"limit": 42.0}, "nothing": None, "plain": "p"}
    expected = {"mcp-param-region": "eu", "mcp-param-confirm": "true", "mcp-param-limit": "42"}
    assert params_of(annotations_of(tool), arguments) == expected
    assert params_of(annotations_of(tool), {"options": 1, "region": [], "confirm": {}}) == {}
    assert params_of(annotations_of(tool), "none") == {}


@pytest.mark.parametrize(
    "tool",
    [
        schema(a=marked("")),
        schema(a=marked("a b")),
        schema(a=marked("a\r\nb")),
        schema(a=marked(1)),
        schema(a=marked(kind="number")),
        schema(a=marked(kind=["string"])),
        schema(a=marked("X"), b=marked("x")),
        {"x-mcp-header": "X", "type": "string"},
        schema(a={"type": "array", "items": marked()}),
        schema(a={"anyOf": [marked()]}),
        {"$defs": {"a": marked()}},
        {"if": schema(a=marked())},
    ],
)
def test_a_tool_whose_marks_break_a_rule_is_refused_as_by_the_sdk(tool: dict[str, Any]) -> None:
    assert find_invalid_x_mcp_header(tool) is not None
    with pytest.raises(ValueError, match="x-mcp-header"):
        annotations_of(tool)


@pytest.mark.parametrize("tool", [None, [], {}, {"properties": 1}, schema(default={"default": marked(1)})])
def test_what_is_no_mark_marks_nothing(tool: object) -> None:
    assert find_invalid_x_mcp_header(tool) is None
    assert annotations_of(tool) == {}


kinds = st.sampled_from(["string", "integer", "boolean", "number", "object", None])
parts = st.recursive(
    st.builds(
        lambda kind, token: {"type": kind, "x-mcp-header": token}, kinds, st.sampled_from(["A", "B", "b", "", 1])
    ),
    lambda inner: st.dictionaries(
        st.sampled_from(["properties", "items", "anyOf", "$defs", "not", "default"]),
        st.dictionaries(st.sampled_from("xyz"), inner, max_size=2) | inner | st.lists(inner, max_size=2),
        max_size=3,
    ),
    max_leaves=5,
)


@given(
    parts,
    st.dictionaries(
        st.sampled_from("xyz"), st.text(st.characters(codec="utf-8"), max_size=3) | st.integers() | st.booleans()
    ),
)
def test_marks_are_read_as_the_sdk_reads_them(tool: Any, arguments: dict[str, Any]) -> None:
    if find_invalid_x_mcp_header(tool) is not None:
        with pytest.raises(ValueError, match="x-mcp-header"):
            annotations_of(tool)
        return
    annotations = annotations_of(tool)
    assert annotations == x_mcp_header_map(tool)
    theirs = {name.lower(): value for name, value in mcp_param_headers(annotations, arguments).items()}
    assert params_of(annotations, arguments) == theirs
