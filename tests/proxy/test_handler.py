"""One request from its body to its response: challenges, consent, errors and ends."""

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from fakes.forwarding import ScriptedBroker, access_token, forwarding, pending_authorization
from fakes.proxy import until
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    AuthorizationServerUnavailable,
    McpAuthProxyError,
    StoreUnavailable,
)
from mcp_auth_proxy.observability.metrics import ServerMetrics
from mcp_auth_proxy.proxy import consent_wait
from mcp_auth_proxy.proxy.handler import MAX_SENDS

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
CHALLENGE = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nDPoP-Nonce: n1\r\nContent-Length: 0\r\n\r\n"
FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nnope"


def error_of(answer: RawResponse) -> dict[str, object]:
    document = json.loads(answer.body)
    assert document["id"] == 9
    error: dict[str, object] = document["error"]
    return error


async def test_a_challenged_request_is_sent_again_with_its_body_and_the_brokers_token() -> None:
    broker = ScriptedBroker(access_token(1), [access_token(2)])
    async with (
        RawServer(answers(CHALLENGE, ok(b"{}"))) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        answer = await client.answer()
    assert (answer.status, answer.body, answer.ended) == (200, b"{}", True)
    first, second = upstream.requests
    assert b"authorization: Bearer token-1\r\n" in first
    assert b"authorization: Bearer token-2\r\n" in second
    assert first.endswith(CALL)
    assert second.endswith(CALL)
    (challenge,) = broker.challenges
    assert (challenge["status"], challenge["challenge"], challenge["nonce"]) == (401, [b"Bearer"], [b"n1"])
    assert challenge["used"] == access_token(1)


async def test_a_403_that_is_not_a_challenge_is_for_the_client() -> None:
    broker = ScriptedBroker(access_token(1), [None])
    async with (
        RawServer(answers(FORBIDDEN)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        answer = await client.answer()
    assert (answer.status, answer.body) == (403, b"nope")


async def test_retries_are_bounded_if_a_server_refuses_every_token() -> None:
    broker = ScriptedBroker(access_token(0), [access_token(n) for n in range(1, MAX_SENDS + 1)])
    async with (
        RawServer(answers(*[CHALLENGE] * MAX_SENDS)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        answer = await client.answer()
    assert len(upstream.requests) == MAX_SENDS
    assert answer.status == 200
    assert "refuses every token" in str(error_of(answer)["message"])


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (AuthorizationServerUnavailable("It is down.", retry_after=7.2), 503, ["8"]),
        (StoreUnavailable("It is locked."), 503, ["5"]),
        (AuthorizationDenied("The user said no."), 200, []),
    ],
)
async def test_an_error_is_answered_in_json_rpc_with_the_status_of_its_kind(
    error: McpAuthProxyError, status: int, retry_after: list[str]
) -> None:
    async with (
        forwarding(ScriptedBroker(error), "http://127.0.0.1:1/mcp") as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        answer = await client.answer()
    assert (answer.status, answer.all("retry-after")) == (status, retry_after)
    assert str(error) in str(error_of(answer)["message"])


async def test_a_store_that_is_out_of_reach_is_one_line_in_the_log_for_many_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure = StoreUnavailable("It can't be reached.")
    async with forwarding(ScriptedBroker(failure), "http://127.0.0.1:1/mcp") as proxy:
        for _ in range(5):
            async with RawClient.to(proxy.origin) as client:
                client.post(CALL)
                assert (await client.answer()).status == 503
    assert caplog.text.count("It can't be reached.") == 1


async def test_an_upstream_that_cannot_be_reached_is_502_and_one_that_is_silent_504() -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with RawServer(silent) as upstream:
        for url, status in (("http://127.0.0.1:1/mcp", 502), (upstream.url, 504)):
            async with (
                forwarding(ScriptedBroker(), url, timeout=0.1) as proxy,
                RawClient.to(proxy.origin) as client,
            ):
                client.post(CALL)
                answer = await client.answer()
            assert answer.status == status
            assert "notes" in str(error_of(answer)["message"])


async def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    async with (
        forwarding(ScriptedBroker(), "http://127.0.0.1:1/mcp", body_limit=100) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.send("POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: 101\n\n")
        answer = await client.answer()
    assert answer.status == 413
    assert "limits.body" in answer.body.decode()


LARGE = b'{"jsonrpc":"2.0","id":9,"method":"tools/call","params":{"text":"%b"}}' % (b"x" * (1 << 20))


@pytest.mark.parametrize("size", [len(LARGE), 3000, 100], ids=["at-once", "in-parts", "in-small-parts"])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
async def test_the_answer_to_a_body_over_the_limit_has_the_id_of_its_request(size: int, chunked: bool) -> None:
    async with (
        forwarding(ScriptedBroker(), "http://127.0.0.1:1/mcp", body_limit=1 << 20) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(LARGE)}"
        client.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\n{framing}\n\n")
        await client.writer.drain()
        for start in range(0, len(LARGE), size):
            part = LARGE[start : start + size]
            client.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        answer = await client.answer()
    assert answer.status == 413
    assert error_of(answer)["message"] == "The request body is over 1 MiB; limits.body allows more."


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (LARGE, "\nExpect: 100-continue"),  # it waits to be asked for the body
        (b"[%b]" % LARGE, ""),
        (LARGE.replace(b'"id":9,', b""), ""),
        (LARGE.replace(b'"method":"tools/call","params"', b'"result"'), ""),
    ],
    ids=["not-sent", "batch", "notification", "response"],
)
async def test_an_id_that_the_start_of_a_body_does_not_show_is_null(body: bytes, fields: str) -> None:
    async with (
        forwarding(ScriptedBroker(), "http://127.0.0.1:1/mcp", body_limit=1 << 20) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(body)}{fields}\n\n")
        if not fields:
            client.send(body)
        answer = await client.answer()
    document = json.loads(answer.body)
    assert (answer.status, document["id"]) == (413, None)
    assert "over 1 MiB; limits.body" in document["error"]["message"]


# While a user authorizes


async def test_a_held_request_continues_with_the_token_of_the_consent() -> None:
    pending = pending_authorization()
    broker = ScriptedBroker(None, [pending])
    async with (
        RawServer(answers(CHALLENGE, ok(b"{}"))) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        await until(lambda: broker.challenges, "a challenge")
        pending.release(access_token(1))
        answer = await client.answer()
    assert (answer.status, answer.body) == (200, b"{}")
    assert b"authorization: Bearer token-1\r\n" in upstream.requests[1]


async def test_a_request_that_waited_for_long_is_answered_with_the_link() -> None:
    broker = ScriptedBroker()
    async with forwarding(broker, "http://127.0.0.1:1/mcp", wait=0.05) as proxy:
        broker.waiting = pending_authorization()
        async with RawClient.to(proxy.origin) as client:
            client.post(CALL)
            answer = await client.answer()
    result = json.loads(answer.body)["result"]
    assert result["isError"] is True
    assert broker.waiting.link in result["content"][0]["text"]


async def test_comments_keep_a_held_stream_alive_and_the_answer_follows_as_an_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", 0.02)
    broker = ScriptedBroker()
    async with (
        RawServer(answers(ok(b'{"jsonrpc":"2.0","id":9,"result":{}}'))) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        broker.waiting = pending = pending_authorization()
        client.post(CALL, "Accept: application/json, text/event-stream")
        status, headers = await client.head()
        assert (status, dict(headers)["content-type"]) == (200, "text/event-stream")
        assert b": waiting" in await client.reader.readuntil(b"\n\n")
        pending.release(access_token(1))
        assert b'"result":{}' in await client.reader.readuntil(b'"result":{}')
    assert b"accept-encoding: identity\r\n" in upstream.requests[0]


@pytest.mark.parametrize(("body", "code"), [(b"{", -32700), (b"[]", -32600)])
async def test_a_body_that_is_not_json_rpc_is_not_held(body: bytes, code: int) -> None:
    broker = ScriptedBroker()
    async with forwarding(broker, "http://127.0.0.1:1/mcp") as proxy, RawClient.to(proxy.origin) as client:
        broker.waiting = pending_authorization()
        client.post(body)
        answer = await client.answer()
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["code"] == code


# Ends


async def test_a_client_that_goes_away_frees_its_upstream_connection() -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with (
        RawServer(silent) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.get()
        await until(lambda: upstream.requests, "a request")
        client.drop()
        await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)
        await until(lambda: proxy.forwarder.active_requests == 0, "no active request")


async def test_a_removed_server_ends_its_requests_with_an_error_and_its_streams_with_a_final_chunk() -> None:
    async def stream(peer: Peer) -> None:
        if (await peer.request()).startswith(b"GET"):
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.until_gone()

    broker = ScriptedBroker()
    async with (
        RawServer(stream) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as listener,
        RawClient.to(proxy.origin) as caller,
    ):
        listener.get()
        await listener.head()
        broker.waiting = pending_authorization()
        caller.post(CALL)
        await until(lambda: proxy.forwarder.active_requests == 2, "two active requests")
        proxy.forwarder.servers_changed({"other"}, ())
        assert proxy.forwarder.active_requests == 2
        proxy.forwarder.servers_changed({"notes"}, ())
        assert await listener.reader.readexactly(5) == b"0\r\n\r\n"
        answer = await caller.answer()
    assert answer.status == 503
    assert "no longer configured" in str(error_of(answer)["message"])


# What else ends a request


async def test_a_client_that_goes_away_amid_its_body_is_not_served() -> None:
    async with (
        RawServer(answers(ok())) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.send("POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: 100\n\n{")
        await until(lambda: proxy.forwarder.active_requests == 1, "an active request")
        client.drop()
        await until(lambda: proxy.forwarder.active_requests == 0, "no active request")
        assert upstream.requests == []


async def test_a_challenge_that_needs_a_user_is_answered_with_the_link_and_the_request_not_sent_again() -> None:
    pending = pending_authorization()
    broker = ScriptedBroker(access_token(1), [pending])
    async with (
        RawServer(answers(CHALLENGE, ok())) as upstream,
        forwarding(broker, upstream.url, wait=0.0) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        assert pending.link in (await client.answer()).body.decode()
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 99", b"Transfer-Encoding: chunked"])
async def test_a_response_that_breaks_off_reaches_the_client_as_one(
    framing: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n5\r\nhello\r\n" % framing)

    async with (
        RawServer(script) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        answer = await client.answer()
        assert (answer.status, b"hello" in answer.body, answer.ended) == (200, True, False)
        assert await client.rest() == b""
    assert "broke off" in caplog.text


async def test_a_response_without_an_end_is_broken_off_and_an_event_stream_is_not() -> None:
    async def script(peer: Peer) -> None:
        request = await peer.request()
        kind = b"text/event-stream" if request.startswith(b"GET") else b"application/json"
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % kind)
        await peer.until_gone()

    open_streams = ServerMetrics("notes").open_streams
    before = open_streams.value
    async with (
        RawServer(script) as upstream,
        forwarding(ScriptedBroker(), upstream.url, timeout=0.1) as proxy,
        RawClient.to(proxy.origin) as listener,
        RawClient.to(proxy.origin) as caller,
    ):
        listener.get()
        await listener.head()
        assert open_streams.value == before + 1
        caller.post(CALL)
        assert not (await caller.answer()).ended
        assert proxy.forwarder.active_requests == 1
        listener.drop()
        await until(lambda: open_streams.value == before, "no open stream")


async def test_a_pool_in_full_use_is_503_and_soon_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_auth_proxy.net.pool.POOL_TIMEOUT", 0.05)

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with (
        RawServer(silent) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        AsyncExitStack() as stack,
    ):
        for _ in range(4):
            (await stack.enter_async_context(RawClient.to(proxy.origin))).post(CALL)
        await until(lambda: len(upstream.requests) == 4, "four requests")
        client = await stack.enter_async_context(RawClient.to(proxy.origin))
        client.post(CALL)
        answer = await client.answer()
        assert (answer.status, answer.all("retry-after")) == (503, ["1"])
        assert "limits.upstream_connections" in str(error_of(answer)["message"])


async def test_a_fault_of_the_proxy_itself_is_a_500_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fault(self: ScriptedBroker, account: object) -> None:
        raise LookupError("a defect")

    monkeypatch.setattr(ScriptedBroker, "token", fault)
    broker = ScriptedBroker()
    async with forwarding(broker, "http://127.0.0.1:1/mcp") as proxy, RawClient.to(proxy.origin) as client:
        client.post(CALL)
        answer = await client.answer()
        assert (answer.status, answer.all("connection")) == (500, ["close"])
        assert proxy.forwarder.active_requests == 0
    assert "a defect" in caplog.text
    assert "a defect" not in answer.body.decode()
