"""The answers to an MCP client instead of a 401, checked against the SDK's models in both eras."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import (
    CallToolResult,
    ElicitationRequiredErrorData,
    ElicitRequest,
    ElicitRequestURLParams,
    InputRequiredResult,
    JSONRPCError,
    JSONRPCResponse,
    TextContent,
)
from mcp_types._v2025_11_25 import JSONRPCErrorResponse as ErrorOf2025
from mcp_types._v2025_11_25 import URLElicitationRequiredError
from mcp_types._v2026_07_28 import CallToolResultResponse as ToolAnswerOf2026
from mcp_types._v2026_07_28 import InputRequiredResult as InputRequiredOf2026
from mcp_types._v2026_07_28 import JSONRPCErrorResponse as ErrorOf2026

from mcp_auth_proxy.rpc import answers
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.events import message_event
from mcp_auth_proxy.rpc.messages import INPUT_KEY, INVALID_REQUEST, PARSE_ERROR, RequestBody, needs_inspection

LINK = "http://127.0.0.1:8787/connect/linear?flow=F10w"
MODERN = "2026-07-28"
INPUT_REQUIRED_METHODS = {"tools/call", "prompts/get", "resources/read"}
METHODS = [
    "tools/call",
    "prompts/get",
    "resources/read",
    "tools/list",
    "prompts/list",
    "resources/list",
    "initialize",
    "server/discover",
    "ping",
    "completion/complete",
    "x/own",
]
URLS: dict[str, object] = {"elicitation": {"url": {}}}

Json = dict[str, Any]


def request(
    method: str = "tools/call",
    identifier: object = 7,
    *,
    version: object = None,
    capabilities: object = None,
    **params: object,
) -> Json:
    """A request: of 2026-07-28 with a ``version``, else as clients with sessions send it."""
    if version is not None:
        meta: Json = {"io.modelcontextprotocol/protocolVersion": version}
        if capabilities is not None:
            meta["io.modelcontextprotocol/clientCapabilities"] = capabilities
        params["_meta"] = meta
    elif capabilities is not None:
        params["capabilities"] = capabilities
    return {"jsonrpc": "2.0", "id": identifier, "method": method, "params": params}


def ask(document: object, *, session_elicits: bool = False) -> Any:
    """The answer to a body while a user has to authorize, as a client reads it."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    answer = answers.answer_all(
        RequestBody(body),
        lambda message: answers.authorization_needed(
            message,
            server="linear",
            name="linear@work",
            link=LINK,
            elicitation_id="E1",
            session_elicits=session_elicits,
        ),
        lambda: answers.failure(None, "nothing to answer", code=answers.UPSTREAM_FAILED, server="linear"),
    )
    return strictly(answer)


def strictly(data: bytes) -> Any:
    """Read JSON without Python's extensions: NaN and the infinities are not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)


def link_of(answer: Json) -> object:
    """The link in any form of answer, as a program finds it."""
    if "error" in answer:
        return answer["error"]["data"].get("authorization_url")
    return answer["result"]["_meta"].get(answers.LINK_KEY)


# The table of the contract


@pytest.mark.parametrize("method", METHODS)
def test_a_session_that_shows_urls_is_asked_to_show_ours(method: str) -> None:
    answer = ask(request(method), session_elicits=True)
    URLElicitationRequiredError.model_validate(answer)
    error = JSONRPCError.model_validate(answer).error
    assert error.code == -32042
    (shown,) = ElicitationRequiredErrorData.model_validate(error.data).elicitations
    assert (shown.mode, shown.url, shown.elicitation_id) == ("url", LINK, "E1")
    assert "linear" in shown.message
    assert link_of(answer) == LINK


def test_initialize_itself_may_say_that_urls_can_be_shown() -> None:
    answer = ask(request("initialize", protocolVersion="2025-11-25", capabilities=URLS))
    assert answer["error"]["code"] == -32042


@pytest.mark.parametrize("method", sorted(INPUT_REQUIRED_METHODS))
def test_a_modern_client_that_shows_urls_is_asked_for_input(method: str) -> None:
    answer = ask(request(method, version=MODERN, capabilities=URLS))
    result = InputRequiredResult.model_validate(JSONRPCResponse.model_validate(answer).result)
    InputRequiredOf2026.model_validate(answer["result"])
    assert result.input_requests is not None
    (shown,) = result.input_requests.values()
    assert isinstance(shown, ElicitRequest)
    assert isinstance(shown.params, ElicitRequestURLParams)
    assert shown.params.url == LINK
    assert result.request_state is None, "upstreams answer 400 to a foreign requestState"
    assert link_of(answer) == LINK


@pytest.mark.parametrize("method", sorted(set(METHODS) - INPUT_REQUIRED_METHODS))
@pytest.mark.parametrize("session_elicits", [False, True])
def test_a_modern_client_gets_an_error_if_the_method_allows_no_input(method: str, session_elicits: bool) -> None:
    answer = ask(request(method, version=MODERN, capabilities=URLS), session_elicits=session_elicits)
    ErrorOf2026.model_validate(answer)
    assert answer["error"]["code"] == answers.AUTHORIZATION_REQUIRED
    assert LINK in answer["error"]["message"]
    assert link_of(answer) == LINK


NOT_DECLARED: list[object] = [
    None,
    {},
    {"elicitation": {}},
    {"elicitation": {"form": {}}},
    {"elicitation": {"url": None}},
    {"elicitation": {"url": True}},
    {"elicitation": "url"},
    {"elicitation": ["url"]},
    ["elicitation"],
    "elicitation",
    1,
]


@pytest.mark.parametrize("capabilities", NOT_DECLARED)
@pytest.mark.parametrize("version", [None, MODERN, "2025-11-25"])
def test_any_other_client_gets_a_tool_result_that_the_model_can_read(version: str | None, capabilities: object) -> None:
    answer = ask(request("tools/call", version=version, capabilities=capabilities))
    result = CallToolResult.model_validate(JSONRPCResponse.model_validate(answer).result)
    assert result.is_error
    (content,) = result.content
    assert isinstance(content, TextContent)
    assert LINK in content.text
    assert link_of(answer) == LINK
    if version == MODERN:
        ToolAnswerOf2026.model_validate(answer)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"tools/call"}))
@pytest.mark.parametrize("version", [None, MODERN])
def test_any_other_client_gets_an_error_for_other_methods(version: str | None, method: str) -> None:
    answer = ask(request(method, version=version))
    JSONRPCError.model_validate(answer)
    ErrorOf2025.model_validate(answer)
    assert LINK in answer["error"]["message"]
    assert link_of(answer) == LINK


def test_capabilities_count_only_in_initialize() -> None:
    """A tool may have an argument that looks like a declaration."""
    answer = ask(request("tools/call", capabilities=URLS, arguments={"capabilities": URLS}))
    assert answer["result"]["isError"] is True


@pytest.mark.parametrize("version", ["2026-07-28", "2026-12-01", "2027-01-01"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("session_elicits", [False, True])
def test_the_error_of_2025_never_reaches_a_modern_client(version: str, method: str, session_elicits: bool) -> None:
    for capabilities in (None, URLS):
        answer = ask(request(method, version=version, capabilities=capabilities), session_elicits=session_elicits)
        assert answer.get("error", {}).get("code") != -32042


@pytest.mark.parametrize("version", [MODERN, None])
@pytest.mark.parametrize("method", METHODS)
def test_input_is_asked_for_on_three_methods_only(version: str | None, method: str) -> None:
    answer = ask(request(method, version=version, capabilities=URLS))
    asked = answer.get("result", {}).get("resultType") == "input_required"
    assert asked == (version == MODERN and method in INPUT_REQUIRED_METHODS)


def test_decisions_are_based_on_the_body() -> None:  # T50
    """There is no way to hand headers in: a mirrored Mcp-Method can't matter. The last of two methods counts."""
    body = b'{"jsonrpc":"2.0","id":1,"method":"tools/list","method":"tools/call"}'
    assert ask(body)["result"]["isError"] is True


# Batches


def test_every_request_of_a_batch_is_answered_by_its_own_kind() -> None:
    batch = [
        request("tools/call", 1),
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        request("tools/list", "b"),
        {"jsonrpc": "2.0", "id": 9, "result": {}},
        {"jsonrpc": "2.0", "id": 10, "error": {"code": 1, "message": ""}},
        17,
        None,
        [],
    ]
    first, second = ask(batch)
    assert (first["id"], first["result"]["isError"]) == (1, True)
    assert (second["id"], second["error"]["code"]) == ("b", answers.AUTHORIZATION_REQUIRED)


def test_a_batch_of_one_is_answered_with_a_batch() -> None:
    assert [answer["id"] for answer in ask([request(identifier=3)])] == [3]


NO_REQUESTS = [
    b"",
    b"{",
    b"[]",
    b"17",
    b"null",
    b'"tools/call"',
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b"9" * 5000,
    b'{"jsonrpc":"2.0","method":"notifications/initialized"}',
    b'{"jsonrpc":"2.0","id":1,"result":{}}',
    b'{"jsonrpc":"2.0","id":null,"method":"tools/call"}',
    b'{"jsonrpc":"2.0","id":true,"method":"tools/call"}',
    b'{"jsonrpc":"2.0","id":{},"method":"tools/call"}',
    b'{"jsonrpc":"2.0","id":1,"method":["tools/call"]}',
    # No JSON, though Python reads it (RFC 8259 §6).
    b'{"jsonrpc":"2.0","id":NaN,"method":"tools/call"}',
    b'{"jsonrpc":"2.0","id":-Infinity,"method":"tools/call"}',
    b'{"jsonrpc":"2.0","id":1e999,"method":"tools/call"}',
]


NO_JSON = [b"", b"{", b"\xff\xfe", b"[" * 16_000, b'{"a":' * 16_000, b"9" * 5000, b"NaN", b"{} {}"]
NO_MESSAGE = [b"[]", b"17", b"null", b'"tools/call"', b"[[], 1]"]


def test_a_body_that_is_not_json_rpc_has_an_error() -> None:
    assert {found[0] for body in NO_JSON if (found := RequestBody(body).error)} == {PARSE_ERROR}
    assert {found[0] for body in NO_MESSAGE if (found := RequestBody(body).error)} == {INVALID_REQUEST}
    assert all(RequestBody(body).error for body in [*NO_JSON, *NO_MESSAGE])
    may_be = [b"{}", b"[17, {}]", b'{"jsonrpc":"2.0","id":1,"result":{}}', b"[" + b"{}," * 5000 + b"{}]"]
    assert [RequestBody(body).error for body in may_be] == [None] * 4


@pytest.mark.parametrize("body", NO_REQUESTS, ids=lambda body: body[:50].decode("latin-1"))
def test_a_body_without_a_request_gets_the_fallback(body: bytes) -> None:
    answer = ask(body)
    assert JSONRPCError.model_validate(answer).id is None


@pytest.mark.parametrize(
    "identifier",
    [0, -1, 2**63, 1.5, "", "é", "\u2028", "\x00", "\ud800", "a" * 10_000],
    ids=lambda identifier: ascii(identifier)[:20],
)
def test_the_id_comes_back_as_it_was(identifier: object) -> None:
    answer = ask(request(identifier=identifier))
    assert (answer["id"], type(answer["id"])) == (identifier, type(identifier))


# Whatever comes


texts = st.text('ab "\\/\x00\n\x7fé\u2028\ud800\U0001f511', max_size=8)
"""One character of each kind that encoders treat differently. To draw from all of Unicode costs a second at first."""
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Also what is not JSON but what Python writes and reads: NaN, lone surrogates."""


def perhaps(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return values | json_values


messages = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": perhaps(st.just("2.0")),
        "id": perhaps(st.integers()),
        "method": perhaps(st.sampled_from(METHODS)),
        "params": perhaps(
            st.fixed_dictionaries(
                {},
                optional={
                    "capabilities": perhaps(st.just(URLS)),
                    "inputResponses": perhaps(
                        st.dictionaries(st.sampled_from([INPUT_KEY, "a"]), perhaps(st.just({"action": "x"})))
                    ),
                    "_meta": perhaps(
                        st.fixed_dictionaries(
                            {},
                            optional={
                                "io.modelcontextprotocol/protocolVersion": perhaps(st.just(MODERN)),
                                "io.modelcontextprotocol/clientCapabilities": perhaps(st.just(URLS)),
                            },
                        )
                    ),
                },
            )
        ),
    },
)


def is_well_formed(answer: Json, message: Mapping[str, Any] | None) -> bool:
    return (
        answer["jsonrpc"] == "2.0"
        and set(answer) in ({"jsonrpc", "id", "result"}, {"jsonrpc", "id", "error"})
        and ("id" in answer)
        and (message is None or (answer["id"], type(answer["id"])) == (message["id"], type(message["id"])))
    )


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(body: bytes) -> None:
    answer = ask(body)
    assert all(is_well_formed(one, None) for one in (answer if isinstance(answer, list) else [answer]))


@given(messages, st.booleans())
def test_every_answer_is_json_rpc_with_the_id_of_its_request(message: Json, session_elicits: bool) -> None:
    answer = ask(message, session_elicits=session_elicits)
    assert is_well_formed(answer, message if answer["id"] is not None else None)
    if answer["id"] is not None:
        assert link_of(answer) == LINK


@given(st.lists(messages, max_size=5))
def test_a_batch_gets_an_answer_for_each_of_its_requests_in_order(batch: list[Json]) -> None:
    answer = ask(batch)
    if isinstance(answer, list):
        mine = iter(batch)
        for one in answer:
            assert any(message.get("id") == one["id"] for message in mine)
    else:
        assert answer["id"] is None


@given(st.binary(max_size=200) | messages.map(lambda message: json.dumps(message).encode()))
def test_failures_are_json_rpc_too(body: bytes) -> None:
    answer = strictly(
        answers.answer_all(
            RequestBody(body),
            lambda message: answers.failure(message, "naïve \ud800", code=-32002, server="s"),
            lambda: answers.failure(None, "x", code=-32002, server="s"),
        )
    )
    for one in answer if isinstance(answer, list) else [answer]:
        assert one["error"]["code"] == -32002
        assert "authorization_url" not in one["error"]["data"], "opening a link would not help"


def test_a_failure_has_the_link_only_if_it_is_given() -> None:
    answer = answers.failure(None, "x", code=answers.AUTHORIZATION_REQUIRED, server="s", link=LINK)
    assert answer["error"]["data"]["authorization_url"] == LINK


def test_the_reason_of_a_failure_is_said_once() -> None:
    answer = answers.failure(None, "out of order", code=answers.UPSTREAM_FAILED, server="s")
    assert encode(answer).count(b"out of order") == 1
    assert answer["error"]["message"] == "out of order"


# A retry of what was answered with input_required


def without_our_input(content: bytes) -> tuple[bytes, str]:
    """What goes to the upstream, and the user's action."""
    body = RequestBody(content)
    action = body.consent_action
    return body.content, action


def retry(**responses: object) -> Json:
    return request(version=MODERN, name="t", arguments={"x": 1}, inputResponses=responses)


def spell(document: object, *, escape_slashes: bool = False) -> bytes:
    """Some encoders (PHP's, Foundation's) write a slash as ``\\/``."""
    text = json.dumps(document)
    return (text.replace("/", "\\/") if escape_slashes else text).encode()


@pytest.mark.parametrize("escape_slashes", [False, True])
@pytest.mark.parametrize("action", ["accept", "decline", "cancel"])
def test_our_entry_is_removed_and_the_users_action_returned(action: str, escape_slashes: bool) -> None:
    body = spell(retry(**{INPUT_KEY: {"action": action}}), escape_slashes=escape_slashes)
    assert needs_inspection(body)
    left, action_found = without_our_input(body)
    assert action_found == action
    assert strictly(left) == request(version=MODERN, name="t", arguments={"x": 1})


def test_entries_that_the_upstream_asked_for_stay() -> None:
    theirs = {"action": "accept", "content": {"é": 1.5, "\u2028": None}}
    left, action_found = without_our_input(spell(retry(**{INPUT_KEY: {"action": "accept"}, "q": theirs})))
    assert action_found == "accept"
    assert strictly(left) == retry(q=theirs)


@pytest.mark.parametrize("entry", [None, 1, "accept", {}, {"action": 1}, []])
def test_an_entry_without_an_action_counts_as_accepted(entry: object) -> None:
    left, action_found = without_our_input(spell(retry(**{INPUT_KEY: entry})))
    assert action_found == "accept"
    assert b"inputResponses" not in left


@pytest.mark.parametrize(
    "document",
    [
        retry(q={"action": "accept"}),
        request(arguments={INPUT_KEY: {"action": "decline"}}),
        request(inputResponses=[INPUT_KEY]),
        {"inputResponses": {INPUT_KEY: {"action": "decline"}}},
        [retry(**{INPUT_KEY: {"action": "decline"}})],
        INPUT_KEY,
    ],
)
def test_a_body_without_our_entry_is_left_as_it_is(document: object) -> None:
    body = json.dumps(document, indent=1).encode()
    assert without_our_input(body) == (body, "")


@given(st.binary(max_size=200))
def test_looking_for_a_retry_never_raises(body: bytes) -> None:
    assert without_our_input(body) == (body, "")


@given(messages)
def test_a_body_without_our_entry_is_json_as_before(message: Json) -> None:
    body = json.dumps(message).encode()
    left, action_found = without_our_input(body)
    if action_found:
        assert INPUT_KEY not in strictly(left).get("params", {}).get("inputResponses", {})
    else:
        assert left == body


def test_nesting_up_to_the_limit_of_the_parser_is_handled() -> None:
    """A body that can just be read may be too deep to be written again."""
    for depth in range(800, 1100):
        nested = b'{"params":{"inputResponses":{"%s":{}},"a":%s%s}}' % (
            INPUT_KEY.encode(),
            b"[" * depth,
            b"]" * depth,
        )
        left, action_found = without_our_input(nested)
        assert action_found == "" or strictly_shallow(left)


def strictly_shallow(data: bytes) -> bool:
    return data.startswith(b'{"params":{"a":[')


def test_numbers_that_can_not_be_written_again_leave_the_body_alone() -> None:
    body = b'{"params":{"inputResponses":{"%s":{"action":"accept"}},"x":1e999}}' % INPUT_KEY.encode()
    assert without_our_input(body) == (body, "")


# Events


@given(st.lists(json_values, min_size=1, max_size=4), st.sampled_from([None, 2]))
def test_every_document_is_one_event(documents: list[object], indent: int | None) -> None:
    events = b"".join(message_event(json.dumps(one, indent=indent).encode()) for one in documents)
    assert b"\r" not in events
    read = [event.split(b"data: ", 1)[1] for event in events.removesuffix(b"\n\n").split(b"\n\n")]
    assert [event.count(b"\n") for event in read] == [0] * len(documents)
    assert [repr(json.loads(event)) for event in read] == [repr(one) for one in documents]


def test_a_very_long_batch_is_not_read() -> None:
    # T30: 16 MiB of "{}" held the event loop, and with it every client, for half a minute.
    bodies = [b"[" + b",".join([b'{"id":1,"method":"a"}'] * count) + b"]" for count in (1000, 1001)]
    assert [len(RequestBody(body).messages) for body in bodies] == [1000, 0]
    assert (
        answers.answer_all(RequestBody(bodies[1]), lambda message: {}, lambda: {"one": "answer"}) == b'{"one":"answer"}'
    )
