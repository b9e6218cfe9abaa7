"""What a body says: parsed when it is asked for, once, and never more than was asked for. More in test_answers.py."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.rpc import messages
from mcp_auth_proxy.rpc.encoding import decode
from mcp_auth_proxy.rpc.messages import INPUT_KEY, MAX_BATCH, MAX_INSPECTED, RequestBody, needs_inspection


def rpc(method: object = "tools/call", **members: object) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, **members}


def body(document: object) -> RequestBody:
    return RequestBody(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("content", "needs"),
    [
        (b'{"method":"initialize"}', True),
        (b'{"method": "initialize" }', True),
        (b'{"method":"notifications/initialized"}', False),
        (b'{"method":"subscriptions/listen"}', True),
        (b'{"method":"subscriptions\\/listen"}', True),
        (b'{"method":"resources/subscribe"}', False),
        (b'{"params":{"name":"initialize it"}}', False),
        # The proxy's own entry must not get to the upstream, however large the body is.
        (b'{"io.mcp-auth-proxy/authorization":{}}' + b" " * MAX_INSPECTED, True),
        (b'{"method":"initialize"}' + b" " * MAX_INSPECTED, False),
        (b'{"method":"initialize"}'.ljust(MAX_INSPECTED), True),
        (b"", False),
    ],
)
def test_a_body_that_may_concern_the_proxy_is_found_by_its_markers(content: bytes, needs: bool) -> None:
    assert needs_inspection(content) is needs


def test_nothing_is_parsed_until_it_is_asked_for_and_then_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counting(data: bytes) -> Any:
        nonlocal count
        count += 1
        return decode(data)

    monkeypatch.setattr(messages, "decode", counting)
    subject = body(rpc("initialize"))
    assert (subject.method_if_parsed, subject.content[:1], count) == (None, b"{", 0)
    assert [message.method for message in subject.requests] == ["initialize"]
    assert (subject.is_batch, subject.error, subject.consent_action) == (False, None, "")
    assert subject.has_method("initialize")
    assert subject.method_if_parsed == "initialize"
    assert count == 1
    broken = RequestBody(b"{")
    assert (broken.error is not None, broken.messages, broken.error is not None, count) == (True, (), True, 2)


def test_what_was_parsed_outlives_the_bytes() -> None:
    subject = body(rpc("ping"))
    assert subject.messages
    subject.release()
    assert (subject.content, subject.method_if_parsed, len(subject.requests)) == (b"", "ping", 1)


def test_the_method_of_a_batch_is_not_that_of_one_message() -> None:
    subject = body([rpc("ping"), rpc("tools/list")])
    assert len(subject.messages) == 2
    assert subject.method_if_parsed is None


def test_a_batch_of_the_largest_size_is_read_and_a_larger_one_not() -> None:
    assert len(body([rpc()] * MAX_BATCH).requests) == MAX_BATCH
    larger = body([rpc()] * (MAX_BATCH + 1))
    assert (larger.requests, larger.is_batch, larger.error) == ([], True, None)


def test_items_that_are_no_messages_are_left_out_of_a_batch() -> None:
    subject = body([1, None, rpc("ping"), "x", []])
    assert [message.method for message in subject.messages] == ["ping"]
    assert subject.error is None


@pytest.mark.parametrize(
    ("identifier", "answered"),
    [
        (1, True),
        ("a", True),
        (0, True),
        (1.5, True),
        ("", True),
        (None, False),
        (True, False),
        ([], False),
        ({}, False),
    ],
)
def test_only_a_request_with_a_usable_id_is_answered(identifier: object, answered: bool) -> None:
    assert bool(body(rpc(id=identifier)).requests) is answered


def test_an_id_that_json_can_not_express_again_is_not_usable() -> None:
    assert RequestBody(b'{"id":1e999,"method":"ping"}').requests == []


@pytest.mark.parametrize("method", [None, 1, ["ping"], {}])
def test_a_message_whose_method_is_no_text_is_no_request(method: object) -> None:
    (message,) = body(rpc(method)).messages
    assert (message.method, message.is_request) == ("", False)


@pytest.mark.parametrize(
    ("version", "modern"),
    [("2026-07-28", True), ("2027-01-01", True), ("2025-11-25", False), ("", False), (20260728, False), (None, False)],
)
def test_a_message_is_of_the_revision_that_it_declares_itself(version: object, modern: bool) -> None:
    meta = {"io.modelcontextprotocol/protocolVersion": version}
    (message,) = body(rpc(params={"_meta": meta})).messages
    assert message.modern is modern


@pytest.mark.parametrize("params", [None, [], "x", {"_meta": []}, {"_meta": {"x": 1}}, {"inputResponses": []}])
def test_odd_parameters_declare_nothing(params: object) -> None:
    subject = body(rpc(params=params))
    (message,) = subject.messages
    assert (message.modern, message.url_elicitation, subject.consent_action) == (False, False, "")


def test_the_entry_of_the_proxy_in_a_batch_is_not_looked_for() -> None:
    document = [rpc(params={"inputResponses": {INPUT_KEY: {"action": "accept"}}})]
    subject = body(document)
    assert subject.consent_action == ""
    assert json.loads(subject.content) == document


# A body of which only the start is known


@pytest.mark.parametrize(
    ("start", "identifier"),
    [
        (b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"text":"xxx', 7),
        (b'\r\n{ "method" : "ping" ,\t"id" : "a\\"b" , "params" : {"id": 1, "x', 'a"b'),
        (b'{"params":{"id":1,"method":"x"},"method":"m","id":2}', 2),
        (b'{"id":-1.5,"method":"m"}', -1.5),
        ('{"method":"m","id":"é","x":"é'.encode()[:-1], "é"),
    ],
)
def test_the_start_of_a_body_shows_the_id_of_its_request(start: bytes, identifier: object) -> None:
    (request,) = RequestBody.of_start(start).requests
    assert request.id == identifier


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"{",
        b"{}",
        b"xxx",
        b'"id"',
        b'[{"id":1,"method":"m"',
        b'{"method":"m","id":12',  # maybe 123
        b'{"method":"m","id":"12',
        b'{"method":"m","id":12x',
        b'{"method":"m","id" 12,',
        b'{"method":"m" "id":12,',
        b'{"method":"m",1:2,"id":12,',
        b'{"id":1,"params":{"id":2,"method":"m"',  # the method is not here
        b'{"id":1,"result":{"method":"m","id":3}',  # a response: its id is one of the server
        b'{"method":"m","id":null,"params":{}',
        b'{"method":"m","id":NaN,"params":{}',
        b'{"method":"m","id":1e999,"params":{}',
        b'{"method":"m","id":"\xff","params":{}',
        b'{"method":"m","params":' + b"[" * 4000,
    ],
)
def test_no_id_is_made_up_from_the_start_of_a_body(start: bytes) -> None:
    assert RequestBody.of_start(start).requests == []


@given(
    st.dictionaries(st.sampled_from(["id", "method", "params", "x"]), st.integers() | st.text() | st.lists(st.text()))
)
def test_a_cut_shows_no_other_request_than_the_whole_body(document: dict[str, Any]) -> None:
    content = json.dumps(document).encode()
    whole = [(message.id, message.method) for message in RequestBody(content).requests]
    for end in range(len(content) + 1):
        shown = [(message.id, message.method) for message in RequestBody.of_start(content[:end]).requests]
        assert shown in ([], whole)
    assert shown == whole
