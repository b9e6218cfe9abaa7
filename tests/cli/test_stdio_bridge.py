"""The bridge of ``stdio``, in lines, before a server that a test controls."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import Channel, FakeResponse, RecordedRequest, sse
from fakes.line_client import INFO, LineClient, bridge_to
from fakes.mcp_client import MODERN
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import until, wait_until_stable


@pytest.fixture
async def upstream(servers: Servers) -> FakeMcpServer:
    return await servers.mcp_server(protected=False, sessions_on=True)


@pytest.fixture
async def client(upstream: FakeMcpServer) -> AsyncIterator[LineClient]:
    async with bridge_to(upstream.url, limit=200_000) as client:
        yield client


def result(id: Any, **members: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "result": members}


def notification(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


# Sessions


async def test_a_session_is_begun_used_and_deleted(upstream: FakeMcpServer) -> None:
    async with bridge_to(upstream.url) as client:
        assert (await client.initialize())["result"]["serverInfo"]["name"] == "fake"
        client.call(text="hi", id=1)
        assert (await client.answer(1))["result"]["content"][0]["text"] == "hi"
        (session,) = upstream.sessions
        await upstream.log.wait_for(lambda received: received.method == "GET")
    assert upstream.sessions == {}
    first, *others = upstream.calls()
    assert (first.header("mcp-session-id"), first.header("mcp-protocol-version")) == (None, None)
    assert {each.header("mcp-session-id") for each in others} == {session}
    assert {each.header("mcp-protocol-version") for each in others} == {"2025-11-25"}
    assert [each.rpc_method or each.method for each in upstream.calls("POST")] == [
        "initialize",
        "notifications/initialized",
        "tools/call",
    ]
    assert upstream.calls()[-1].method == "DELETE"


async def test_what_follows_initialize_does_not_overtake_it(upstream: FakeMcpServer, client: LineClient) -> None:
    gate = asyncio.Event()
    answer = result(0, protocolVersion="2025-06-18", capabilities={}, serverInfo=INFO)
    upstream.script("initialize", FakeResponse(body=json.dumps(answer).encode(), gate=gate))
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": INFO}
    client.send("initialize", params, id=0)
    client.send("notifications/initialized")
    client.send("tools/list", id=1)
    await upstream.log.wait_for(lambda received: received.rpc_method == "initialize")
    gate.set()
    upstream.sessions_on = False
    await client.answer(1)
    assert [each.rpc_method for each in upstream.calls("POST")] == [
        "initialize",
        "notifications/initialized",
        "tools/list",
    ]
    assert upstream.calls("tools/list")[0].header("mcp-protocol-version") == "2025-06-18"


async def test_messages_of_the_server_arrive_by_its_stream_and_are_answered(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    await client.initialize()
    await until(lambda: upstream.push({"jsonrpc": "2.0", "id": 7, "method": "ping"}), "an open stream")
    await until(lambda: client.notifications("ping"))
    client.raw(json.dumps(result(7)).encode())
    received = await upstream.log.wait_for(lambda received: "result" in received.message)
    assert received.message == result(7)
    assert received.header("mcp-session-id") in upstream.sessions


async def test_a_session_that_the_server_ends_is_begun_again_unseen(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    await client.initialize("2025-06-18")
    await upstream.log.wait_for(lambda received: received.method == "GET")
    upstream.end_sessions()
    for number in range(3):
        client.call(text=str(number), id=number)
    for number in range(3):
        assert (await client.answer(number))["result"]["content"][0]["text"] == str(number)
    first, second = upstream.calls("initialize")
    assert first.body == second.body
    assert len(upstream.calls("notifications/initialized")) == 2
    assert len(upstream.sessions) == 1
    assert [each.get("id") for each in client.received].count("init") == 1
    # The stream of the new session is listened to.
    await until(lambda: upstream.push(notification("notifications/tools/list_changed")), "an open stream")
    await until(lambda: client.notifications("notifications/tools/list_changed"))


async def test_a_request_that_is_not_found_twice_is_answered_with_the_error(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    await client.initialize()
    gone = FakeResponse.json({"jsonrpc": "2.0", "id": 1, "error": {"code": -32600, "message": "gone"}}, 404)
    upstream.answers["tools/call"] = gone
    client.call(id=1)
    assert (await client.answer(1))["error"]["message"] == "gone"
    assert len(upstream.calls("tools/call")) == 2


async def test_a_session_that_can_not_be_begun_again_is_an_error(upstream: FakeMcpServer, client: LineClient) -> None:
    await client.initialize()
    upstream.end_sessions()
    upstream.answers["initialize"] = FakeResponse.json(
        {"jsonrpc": "2.0", "id": "init", "error": {"code": -32002, "message": "not today"}}
    )
    client.call(id=1)
    assert "not today" in (await client.answer(1))["error"]["message"]


# Streams


def stream_of(*chunks: bytes) -> FakeResponse:
    channel = Channel()
    for chunk in chunks:
        channel.put(chunk)
    channel.close()
    return FakeResponse.events(channel)


async def test_progress_and_requests_in_a_stream_come_before_the_answer(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    await client.initialize()
    params = {"name": "count", "arguments": {"to": 2}, "_meta": {"progressToken": "p"}}
    client.send("tools/call", params, id=1)
    await client.answer(1)
    assert [each["params"]["progress"] for each in client.notifications("notifications/progress")] == [1, 2]
    assert client.received[-1]["id"] == 1


async def test_a_stream_that_breaks_is_continued_behind_its_last_event(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    await client.initialize()
    await upstream.log.wait_for(lambda received: received.method == "GET")
    begun = b"retry: 10\n" + sse(notification("notifications/progress", progressToken=1, progress=1), "e1")
    upstream.script("tools/call", stream_of(begun))
    upstream.script("GET", FakeResponse(status=503), stream_of(b"id: e2\ndata:\n\n"), stream_of(sse(result(1, done=1))))
    client.call(id=1)
    assert (await client.answer(1))["result"] == {"done": 1}
    assert [each.header("last-event-id") for each in upstream.calls("GET")[1:]] == ["e1", "e1", "e2"]
    assert len(upstream.calls("tools/call")) == 1


async def test_a_call_whose_connection_breaks_is_not_sent_again(upstream: FakeMcpServer, client: LineClient) -> None:
    await client.initialize()
    upstream.script("tools/call", FakeResponse.drop())
    client.call(id=1)
    assert (await client.answer(1))["error"]["code"] == -32002
    assert len(upstream.calls("tools/call")) == 1


async def test_a_list_whose_connection_breaks_is_sent_again(upstream: FakeMcpServer, client: LineClient) -> None:
    await client.initialize()
    upstream.script("tools/list", FakeResponse.drop())
    client.send("tools/list", id=1)
    assert "result" in await client.answer(1)
    assert len(upstream.calls("tools/list")) == 2


async def test_the_stream_of_the_server_is_opened_again(upstream: FakeMcpServer, client: LineClient) -> None:
    upstream.script("GET", stream_of(b"retry: 10\n" + sse(notification("notifications/message"), "m1")))
    await client.initialize()
    second = await upstream.log.wait_for(lambda received: received.method == "GET", count=2)
    assert second.header("last-event-id") == "m1"
    assert len(client.notifications("notifications/message")) == 1


async def test_a_slow_call_does_not_hold_up_others(upstream: FakeMcpServer, client: LineClient) -> None:
    await client.initialize()
    gate = asyncio.Event()
    upstream.script("tools/call:slow", FakeResponse(body=json.dumps(result(1)).encode(), gate=gate))
    client.call("slow", id=1)
    client.call(id=2)
    await client.answer(2)
    assert not client.answers(1)
    gate.set()
    await client.answer(1)


# Cancellation


async def test_a_cancelled_call_of_a_session_is_announced_and_closed(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    await client.initialize()
    upstream.script("tools/call", FakeResponse.hang())
    client.call(id=1)
    held = await upstream.log.wait_for(lambda received: received.tool == "echo")
    client.send("notifications/cancelled", {"requestId": 1, "reason": "changed my mind"})
    async with asyncio.timeout(5):
        await held.gone.wait()
    (told,) = upstream.calls("notifications/cancelled")
    assert told.message["params"] == {"requestId": 1, "reason": "changed my mind"}
    client.call(id=2)
    await client.answer(2)
    assert not client.answers(1)


async def test_a_cancelled_request_of_2026_07_28_is_closed_and_nothing_else(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    upstream.script("tools/call", FakeResponse.hang())
    client.call(id=1, modern=True)
    held = await upstream.log.wait_for(lambda received: received.tool == "echo")
    client.send("notifications/cancelled", {"requestId": 1})
    async with asyncio.timeout(5):
        await held.gone.wait()
    client.send("notifications/cancelled", {"requestId": "unknown"}, modern=True)
    client.call(id=2, modern=True)
    await client.answer(2)
    assert upstream.calls("notifications/cancelled") == []
    assert not client.answers(1)


# 2026-07-28

TOOL = {
    "name": "sql",
    "inputSchema": {
        "type": "object",
        "properties": {"region": {"type": "string", "x-mcp-header": "Region"}, "query": {"type": "string"}},
    },
}
BROKEN = {"name": "broken", "inputSchema": {"properties": {"a": {"type": "number", "x-mcp-header": "A"}}}}


def listing(*tools: object) -> Any:
    def answer(received: RecordedRequest) -> FakeResponse:
        listed = {"resultType": "complete", "tools": tools, "ttlMs": 0, "cacheScope": "private"}
        return FakeResponse.json(result(received.message["id"], **listed))

    return answer


async def test_requests_of_2026_07_28_have_their_header_fields_and_no_session(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    upstream.answers["tools/list"] = listing(TOOL, BROKEN)
    client.send("tools/list", id=1, modern=True)
    listed = (await client.answer(1))["result"]["tools"]
    assert listed == [TOOL], "a client must not use a tool whose marks are wrong"
    client.call("sql", id=2, modern=True, region="Zürich", query="q")
    await client.answer(2)
    (call,) = upstream.calls("tools/call")
    fields = {name: call.header(name) for name in ("mcp-method", "mcp-name", "mcp-param-region", "mcp-session-id")}
    assert fields == {
        "mcp-method": "tools/call",
        "mcp-name": "sql",
        "mcp-param-region": "=?base64?WsO8cmljaA==?=",
        "mcp-session-id": None,
    }
    assert call.header("mcp-protocol-version") == MODERN
    assert call.header("mcp-param-query") is None


async def test_a_call_whose_fields_are_refused_is_sent_again_once_the_tools_are_known(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    def strict(received: RecordedRequest) -> FakeResponse | None:
        if received.header("mcp-param-region") is not None:
            return None
        error = {"code": -32020, "message": "Header mismatch"}
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "error": error}, 400)

    upstream.answers["tools/call"] = strict
    client.call("sql", id=1, modern=True, region="eu")
    assert (await client.answer(1))["error"]["code"] == -32020, "the server's list has no such tool"
    upstream.answers["tools/list"] = listing(TOOL)
    client.call("sql", id=2, modern=True, region="eu")
    assert "result" in await client.answer(2)
    assert not client.answers("mcp-auth-proxy")


async def test_an_unknown_method_is_no_lost_session(upstream: FakeMcpServer, client: LineClient) -> None:
    client.send("resources/list", id="x", modern=True)
    assert (await client.answer("x"))["error"]["code"] == -32601
    assert upstream.calls("initialize") == []


async def test_a_subscription_lives_until_the_server_ends_it(upstream: FakeMcpServer, client: LineClient) -> None:
    stream = Channel()
    upstream.script("subscriptions/listen", FakeResponse.events(stream))
    client.send("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, id="s", modern=True)
    stream.event(notification("notifications/subscriptions/acknowledged", notifications={}))
    stream.event(notification("notifications/tools/list_changed"))
    await until(lambda: client.notifications("notifications/tools/list_changed"))
    stream.close()
    await until(lambda: client.notifications("notifications/cancelled"))
    assert client.notifications("notifications/cancelled")[0]["params"]["requestId"] == "s"


async def test_a_subscription_that_breaks_is_made_again_unseen(upstream: FakeMcpServer, client: LineClient) -> None:
    acknowledged = sse(notification("notifications/subscriptions/acknowledged", notifications={}))

    async def broken() -> AsyncIterator[bytes]:
        yield acknowledged

    again = Channel()
    again.put(acknowledged)
    again.event(notification("notifications/tools/list_changed"))
    upstream.script("subscriptions/listen", FakeResponse.events(broken, reset=True), FakeResponse.events(again))
    client.send("subscriptions/listen", {"notifications": {"toolsListChanged": True}}, id="s", modern=True)
    await until(lambda: client.notifications("notifications/tools/list_changed"))
    assert len(client.notifications("notifications/subscriptions/acknowledged")) == 1


# Lines


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", -32700),
        (b"\xff\xfe{\x00}\x00", -32700),
        (b"NaN", -32700),
        (b"[" * 100_000, -32700),
        (b"42", -32600),
        (b"{}", -32600),
        (b"[]", -32600),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":7}', -32600),
    ],
)
async def test_a_malformed_line_is_answered_and_the_next_one_works(
    upstream: FakeMcpServer, client: LineClient, line: bytes, code: int
) -> None:
    client.raw(line)
    client.raw(b"")
    assert (await client.answer(None))["error"]["code"] == code
    client.send("ping", id=1)
    await client.answer(1)
    assert len(upstream.calls()) == 1


async def test_a_line_over_the_limit_is_refused_by_its_id(upstream: FakeMcpServer, client: LineClient) -> None:
    large = json.dumps({"jsonrpc": "2.0", "id": "big", "method": "tools/call", "params": {"x": "y" * 300_000}})
    await asyncio.to_thread(client.raw, large.encode())
    assert "limits.body" in (await client.answer("big"))["error"]["message"]
    client.send("ping", id=1)
    await client.answer(1)
    assert len(upstream.calls()) == 1


async def test_a_batch_is_sent_as_one_and_each_request_answered(upstream: FakeMcpServer, client: LineClient) -> None:
    batch = [
        {"jsonrpc": "2.0", "id": 1, "method": "ping"},
        notification("notifications/progress"),
        {"jsonrpc": "2.0", "id": 2, "method": "ping"},
        {"jsonrpc": "2.0", "id": 3, "method": "ping"},
    ]
    upstream.intercept = lambda received: (
        FakeResponse.json([result(1), result(2)]) if received.body.startswith(b"[") else None
    )
    client.raw(json.dumps(batch).encode())
    assert "error" in await client.answer(3)
    assert client.received[0] == [result(1), result(2)]


async def test_answers_are_one_line_each_whatever_the_server_writes(
    upstream: FakeMcpServer, client: LineClient
) -> None:
    pretty = json.dumps(result(1, text="a\nb"), indent=2).replace("\n", "\r\n").encode()
    upstream.script("ping", FakeResponse(body=pretty), FakeResponse.html(), FakeResponse.html(status=502))
    for number in (1, 2, 3):
        client.send("ping", id=number)
        await client.answer(number)
    assert client.answers(1) == [result(1, text="a\nb")]
    assert client.answers(2)[0]["error"]["code"] == -32002
    assert "502" in client.answers(3)[0]["error"]["message"]


@pytest.mark.parametrize("status", [202, 204, 401, 403, 404, 500])
async def test_an_http_answer_without_a_message_is_an_error(
    upstream: FakeMcpServer, client: LineClient, status: int
) -> None:
    upstream.script("ping", FakeResponse(status=status))
    client.send("ping", id=1)
    assert "error" in await client.answer(1)


async def test_an_error_without_an_id_is_given_that_of_the_request(upstream: FakeMcpServer, client: LineClient) -> None:
    error = {"code": -32004, "message": "There is no server here.", "data": {"servers": []}}
    upstream.script("ping", FakeResponse.json({"jsonrpc": "2.0", "id": None, "error": error}, 404))
    client.send("ping", id=1)
    assert (await client.answer(1))["error"] == error


async def test_the_end_of_the_input_waits_for_answers(upstream: FakeMcpServer) -> None:
    gate = asyncio.Event()
    upstream.script("ping", FakeResponse(body=json.dumps(result(1)).encode(), gate=gate))
    async with bridge_to(upstream.url) as client:
        client.send("subscriptions/listen", {"notifications": {}}, id="s", modern=True)
        client.send("ping", id=1)
        client.close()
        await upstream.log.wait_for(lambda received: received.rpc_method == "ping")
        gate.set()
        async with asyncio.timeout(5):
            await client.ended.wait()
    assert client.answers(1) == [result(1)]


async def test_a_server_that_sends_faster_than_the_client_reads_is_not_read_further(upstream: FakeMcpServer) -> None:
    """The lines wait in a pipe and in sockets, and not in the bridge."""
    produced = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal produced
        while True:
            produced += 1
            yield sse(notification("notifications/message", data="x" * 60_000))

    upstream.answers["tools/call"] = FakeResponse.events(endless)
    may_read = asyncio.Event()
    async with bridge_to(upstream.url, may_read=may_read) as client:
        client.call(id=1, modern=True)
        before = await wait_until_stable(lambda: produced)
        assert 0 < before < 1000
        may_read.set()
        await until(lambda: len(client.received) > before)
        client.send("notifications/cancelled", {"requestId": 1})
