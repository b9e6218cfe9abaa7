"""Server-sent events, read as a browser reads them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.rpc.events import comment, message_event


def read(stream: bytes) -> list[tuple[str, str]]:
    """Return type and data of each event (WHATWG HTML §9.2.6)."""
    events: list[tuple[str, str]] = []
    kind, data = "", list[str]()
    for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        name, _, value = line.partition(":")
        match name, value.removeprefix(" "):
            case "", "" if not line:
                if data:
                    events.append((kind or "message", "\n".join(data)))
                kind, data = "", []
            case "event", kind:
                pass
            case "data", value:
                data.append(value)
    return events


@pytest.mark.parametrize("document", [b'{"a":\n 1}', b'{"a":\r\n1,\r"b":2}', b'{"a":"\\n\\r"}', b"[\n\n]", b"1"])
def test_a_document_with_line_breaks_is_one_event_with_one_line(document: bytes) -> None:
    ((kind, data),) = read(message_event(document))
    assert (kind, json.loads(data)) == ("message", json.loads(document))


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3), max_size=4))
def test_events_one_after_the_other_are_told_apart(documents: list[dict[str, str]]) -> None:
    stream = b"".join(comment(b"x") + message_event(json.dumps(document, indent=1).encode()) for document in documents)
    assert [json.loads(data) for _, data in read(stream)] == documents


def test_a_comment_is_no_event() -> None:
    assert read(comment(b"waiting")) == []
    assert comment(b"waiting") == b": waiting\n\n"
