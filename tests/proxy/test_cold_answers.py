"""The answers in place of a server, whatever it is called and whatever it said earlier."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.models import Account, Catalog
from mcp_auth_proxy.proxy import cold_answers
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.messages import Message

LINK = "http://127.0.0.1:8787/connect/notes?flow=F"
NOTES = Account("local", "notes")
NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def message(method: str, *, modern: bool = False, **params: Any) -> Message:
    return Message(method=method, id=1, is_request=True, modern=modern, url_elicitation=False, params=params)


@given(NAMES)
def test_the_names_of_the_tools_are_short_and_have_the_marker(server: str) -> None:
    for name in (cold_answers.authorize_tool(server), cold_answers.call_tool(server)):
        assert len(name) <= 40
        assert cold_answers.marker(server) in encode({"params": {"name": name}})


@given(NAMES, JSON, JSON)
def test_whatever_a_server_said_the_results_have_what_clients_need(server: str, capabilities: Any, said: Any) -> None:
    known = {"protocolVersion": "2025-06-18", "capabilities": capabilities, "instructions": said}
    catalog = Catalog(initialize={"2025-06-18": known}, discover=known, lists={})
    for result in (
        cold_answers.initialize_result(Account("local", server), "2025-06-18", catalog, LINK),
        cold_answers.discover_result(Account("local", server), catalog, LINK) or {},
    ):
        assert LINK in result["instructions"]
        for name in ("tools", "prompts", "resources"):
            assert result["capabilities"][name]["listChanged"] is True
        encode(result)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("2025-03-26", "2025-03-26"), ("2025-11-25", "2025-06-18"), ("1999-01-01", "2025-11-25"), (None, "2025-11-25")],
)
def test_the_revision_is_what_the_server_would_answer(asked: Any, answered: str) -> None:
    catalog = Catalog(initialize={"2025-11-25": {"protocolVersion": "2025-06-18"}})
    assert cold_answers.announced_version(catalog, asked) == answered


def test_a_tool_of_the_server_is_not_replaced() -> None:
    own = {"name": "authorize_notes", "inputSchema": {"type": "object"}}
    result = cold_answers.list_result(message("tools/list"), NOTES, Catalog(lists={"tools": [own]}), LINK)
    assert result["tools"] == [own]


def test_who_may_not_authorize_gets_no_link() -> None:
    result = cold_answers.list_result(message("tools/list"), NOTES, None, None)
    assert all("an admin" in tool["description"] for tool in result["tools"])
    assert "admin" in cold_answers.initialize_result(NOTES, "2025-11-25", None, None)["instructions"]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b'data: {"method":"notifications/subscriptions/acknowledged"}\n\n', True),
        (
            b': x\r\nevent: message\r\ndata: {"method":\r\ndata: "notifications/subscriptions/acknowledged"}\r\n\r\n',
            True,
        ),
        (b'data: {"method":"notifications/message"}\n\n', False),
        (b"data: []\n\n", False),
        (b"data: {\n\n", False),
    ],
)
def test_acknowledgments_are_recognized(event: bytes, expected: bool) -> None:
    assert cold_answers.is_acknowledgment(event) is expected
