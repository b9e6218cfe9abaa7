"""Responses put into an event stream that has begun, and what is done with those that do not fit there."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes.forwarding import ForwardingServer, ScriptedBroker, access_token, forwarding, pending_authorization
from fakes.proxy import until
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer, Script, answers
from mcp_auth_proxy.errors import AuthorizationServerUnavailable
from mcp_auth_proxy.proxy import consent_wait
from mcp_auth_proxy.rpc.encoding import MAX_PARSED

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
ANSWER = b'{"jsonrpc": "2.0",\n "id": 9, "result": {}}'
BOTH = "Accept: application/json, text/event-stream"
EVENT = b"event: message\ndata: {}\n\n"
LIMIT = 100_000


def response(status: int, body: bytes, *fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *fields, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def begun(
    script: Script, monkeypatch: pytest.MonkeyPatch, *, method: str = "POST"
) -> AsyncIterator[tuple[RawServer, ForwardingServer, RawClient]]:
    """A held request whose response has begun as an event stream; its user has just authorized."""
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", 0.01)
    broker = ScriptedBroker()
    async with (
        RawServer(script) as upstream,
        forwarding(broker, upstream.url, body_limit=LIMIT) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        broker.waiting = pending = pending_authorization()
        if method == "GET":
            client.get()
        else:
            client.post(CALL, BOTH, "Accept-Encoding: gzip, br")
        # The head of the stream is on its way with its first comment.
        peeked = await client.reader.readuntil(b": waiting for the user to authorize\n\n\r\n")
        assert b"text/event-stream" in peeked
        pending.release(access_token(1))
        yield upstream, proxy, client


async def rest(client: RawClient) -> RawResponse:
    """Return the rest of the stream without its comments."""
    body, ended = await client._chunks()
    return RawResponse(200, [], body.replace(b": waiting for the user to authorize\n\n", b""), ended)


def event_of(answer: RawResponse) -> dict[str, object]:
    """Return the message of the only event."""
    assert answer.ended
    lines = answer.body.decode().split("\n")
    assert (lines[0], lines[2:]) == ("event: message", ["", ""])
    document: dict[str, object] = json.loads(lines[1].removeprefix("data: "))
    return document


def error_text(answer: RawResponse) -> str:
    document = event_of(answer)
    assert document["id"] == 9
    error = document["error"]
    assert isinstance(error, dict)
    return str(error["message"])


# What fits


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("status", [200, 400, 404])
async def test_a_json_answer_becomes_one_event(status: int, compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body, fields = (gzip.compress(ANSWER), ["Content-Encoding: gzip"]) if compressed else (ANSWER, [])
    script = answers(response(status, body, "Content-Type: application/json", *fields))
    async with begun(script, monkeypatch) as (upstream, _, client):
        assert event_of(await rest(client)) == json.loads(ANSWER)
    (request,) = upstream.requests
    assert b"accept-encoding: identity\r\n" in request
    assert b"gzip" not in request


@pytest.mark.parametrize("compressed", [False, True])
async def test_events_are_passed_on_as_they_are(compressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    body, fields = (gzip.compress(EVENT * 2), ["Content-Encoding: gzip"]) if compressed else (EVENT * 2, [])
    script = answers(response(200, body, "Content-Type: text/event-stream; charset=utf-8", *fields))
    async with begun(script, monkeypatch) as (_, _, client):
        answer = await rest(client)
        assert (answer.body, answer.ended) == (EVENT * 2, True)


@pytest.mark.parametrize("status", [202, 204])
async def test_a_response_without_an_answer_ends_the_stream(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with begun(answers(response(status, b"")), monkeypatch) as (_, _, client):
        answer = await rest(client)
        assert (answer.body, answer.ended) == (b"", True)


@pytest.mark.parametrize("status", [200, 405])
async def test_a_stream_for_messages_of_the_server_that_is_refused_just_ends(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with begun(answers(response(status, b"no")), monkeypatch, method="GET") as (_, _, client):
        answer = await rest(client)
        assert (answer.body, answer.ended) == (b"", True)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("result", ["y" * 3_000_000, [[]] * 500_000, [1.5] * 20_000], ids=["long", "lists", "numbers"])
async def test_a_json_answer_that_is_not_parsed_becomes_one_event(  # T82
    result: object, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.dumps({"jsonrpc": "2.0", "id": 9, "result": result}, indent=0).encode()
    body, fields = (gzip.compress(document), ["Content-Encoding: gzip"]) if compressed else (document, [])
    script = answers(response(200, body, "Content-Type: application/json", *fields))
    async with begun(script, monkeypatch) as (_, proxy, client):
        assert event_of(await rest(client)) == json.loads(document)
        await until(lambda: not proxy.forwarder.memory.used, "memory given back")


# What does not


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"<html>"),
        (200, b"<html>"),
        (400, b'{"jsonrpc":"2.0","id":null,"error":{}}'),
        (500, ANSWER),
        (503, b""),
        (404, b""),
    ],
)
async def test_a_response_that_is_no_answer_is_an_error_with_its_status(
    status: int, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with begun(answers(response(status, body)), monkeypatch) as (_, _, client):
        assert f"answered HTTP {status}" in error_text(await rest(client))


@pytest.mark.parametrize(
    ("body", "fields", "text"),
    [
        (b"x" * (MAX_PARSED + 1), [], "too long"),
        (gzip.compress(b" " * 10_000_000), ["Content-Encoding: gzip"], "too long"),  # T24
        (b"x", ["Content-Encoding: br"], "'br'"),
        (b"plain text", ["Content-Encoding: gzip"], "Content-Encoding"),
    ],
    ids=["long", "bomb", "unknown coding", "not what it says"],
)
async def test_a_response_that_can_not_be_put_there_is_an_error(
    body: bytes, fields: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with begun(answers(response(200, body, *fields)), monkeypatch) as (_, _, client):
        assert text in error_text(await rest(client))


async def test_a_json_answer_that_breaks_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(response(200, ANSWER)[:-1])

    async with begun(script, monkeypatch) as (_, _, client):
        assert "in the middle of the response" in error_text(await rest(client))


@pytest.mark.parametrize("compressed", [False, True])
async def test_events_that_break_off_end_without_a_final_chunk_and_with_nothing_put_into_them(
    compressed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    part = b'event: message\ndata: {"half'

    async def script(peer: Peer) -> None:
        await peer.request()
        fields = ["Content-Type: text/event-stream"]
        if compressed:
            fields.append("Content-Encoding: gzip")
        await peer.send(response(200, b"\0" * 999, *fields)[:-999])
        await peer.send(gzip.compress(part)[:-8] + b"no gzip" if compressed else part)

    async with begun(script, monkeypatch) as (_, proxy, client):
        answer = await rest(client)
        assert (answer.body, answer.ended) == (b"" if compressed else part, False)
        await until(lambda: not proxy.forwarder.active_requests, "no active request")
    assert "broke off" in caplog.text


# Ends from outside


async def test_a_stream_of_the_proxys_own_that_is_ended_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with begun(silent, monkeypatch) as (upstream, proxy, client):
        await until(lambda: upstream.requests, "a request")
        proxy.forwarder.end_all()
        assert "shutting down" in error_text(await rest(client))


async def test_a_stream_of_the_upstreams_events_that_is_ended_gets_nothing_but_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(response(200, b"\0" * 999, "Content-Type: text/event-stream")[:-999] + EVENT)
        await peer.until_gone()

    async with begun(script, monkeypatch) as (_, proxy, client):
        await client.reader.readuntil(EVENT + b"\r\n")
        proxy.forwarder.end_all()
        answer = await rest(client)
        assert (answer.body, answer.ended) == (b"", True)


async def test_a_client_that_does_not_read_does_not_hold_the_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_auth_proxy.proxy.responder.FLUSH_TIMEOUT", 0.1)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await peer.send(b"10000\r\n" + b"x" * 65_536 + b"\r\n")

    async with (
        RawServer(script) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin, buffer=4096) as client,
    ):
        client.post(CALL)
        await client.head()
        (handler,) = proxy.forwarder._handlers
        await until(lambda: not handler._request.may_write, "a client that does not read")
        proxy.forwarder.end_all()
        await until(lambda: not proxy.forwarder.active_requests, "no active request", timeout=5)
        await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)


# Retry-After


@pytest.mark.parametrize(("seconds", "field"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (7.2, "8")])
async def test_seconds_are_rounded_up_to_a_whole_one(seconds: float, field: str) -> None:
    broker = ScriptedBroker(AuthorizationServerUnavailable("It is down.", retry_after=seconds))
    async with forwarding(broker, "http://127.0.0.1:1/mcp") as proxy, RawClient.to(proxy.origin) as client:
        client.post(CALL)
        answer = await client.answer()
        assert (answer.status, answer.all("retry-after")) == (503, [field])
