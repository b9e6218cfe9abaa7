"""How often a request's body is parsed: once if the proxy has to know what it says, and never on the fast path."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fakes.forwarding import ScriptedBroker, access_token, forwarding, pending_authorization
from fakes.proxy import until
from fakes.raw_client import RawClient
from fakes.raw_server import RawServer, answers, ok
from mcp_auth_proxy.errors import AuthorizationDenied
from mcp_auth_proxy.rpc.messages import INPUT_KEY

CHALLENGE = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nContent-Length: 0\r\n\r\n"
ANSWER = ok(b'{"jsonrpc":"2.0","id":9,"result":{}}')
BOTH = "Accept: application/json, text/event-stream"


def rpc(method: str, **params: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 9, "method": method, "params": params}).encode()


CALL = rpc("tools/call", name="pay")
INITIALIZE = rpc("initialize", capabilities={"elicitation": {"url": {}}})
RETRY = rpc("tools/call", name="pay", inputResponses={INPUT_KEY: {"action": "accept"}})


@contextmanager
def parsed(body: bytes) -> Iterator[list[bytes]]:
    """Yield a list that gets each text that is parsed until the block ends: the body, or what was made of it."""
    found: list[bytes] = []
    loads: Callable[..., Any] = json.loads

    def count(text: bytes | str, **options: Any) -> Any:
        data = text if isinstance(text, bytes) else text.encode()
        if data == body or b'"method"' in data:
            found.append(data)
        return loads(text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "loads", count)
        yield found


@pytest.mark.parametrize("body", [CALL, b"[%s,%s]" % (CALL, CALL), b"not JSON"], ids=["call", "batch", "not JSON"])
async def test_on_the_fast_path_a_body_is_not_parsed(body: bytes) -> None:
    async with (
        RawServer(answers(ok(), ok())) as upstream,
        forwarding(ScriptedBroker(access_token(1)), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        with parsed(body) as times:
            for _ in range(2):
                client.post(body)
                assert (await client.answer()).status == 200
        assert times == []


@pytest.mark.parametrize("warm", [False, True], ids=["in a task", "on the fast path"])
async def test_a_call_that_meets_a_401_is_not_parsed(warm: bool) -> None:
    broker = ScriptedBroker(access_token(1), [access_token(2)])
    responses = [*([ok()] if warm else []), CHALLENGE, ANSWER]
    async with (
        RawServer(answers(*responses)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        if warm:
            client.post(CALL)
            await client.answer()
        with parsed(CALL) as times:
            client.post(CALL)
            assert json.loads((await client.answer()).body)["id"] == 9
        assert (len(broker.challenges), times) == (1, [])


async def test_a_call_that_fails_after_a_401_is_parsed_once_for_its_id() -> None:
    broker = ScriptedBroker(access_token(1), [AuthorizationDenied("The user said no.")])
    async with (
        RawServer(answers(CHALLENGE)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        with parsed(CALL) as times:
            client.post(CALL)
            answer = await client.answer()
        assert (json.loads(answer.body)["id"], len(times)) == (9, 1)


@pytest.mark.parametrize("fields", [(), (BOTH,)], ids=["plain", "with events"])
async def test_a_held_call_is_parsed_once(fields: tuple[str, ...]) -> None:
    broker = ScriptedBroker()
    async with (
        RawServer(answers(ANSWER)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        broker.waiting = pending = pending_authorization()
        with parsed(CALL) as times:
            client.post(CALL, *fields)
            await until(lambda: times, "the body to be parsed")
            pending.release(access_token(1))
            assert (await client.answer()).status == 200
        assert len(times) == 1


@pytest.mark.parametrize(
    "body", [CALL, b"[%s,%s]" % (CALL, CALL), INITIALIZE, b"{"], ids=["call", "batch", "init", "{"]
)
async def test_a_request_that_is_answered_with_the_link_is_parsed_once(body: bytes) -> None:
    broker = ScriptedBroker()
    async with forwarding(broker, "http://127.0.0.1:1/mcp", wait=0.01) as proxy, RawClient.to(proxy.origin) as client:
        broker.waiting = pending_authorization()
        with parsed(body) as times:
            client.post(body)
            await client.answer()
        assert len(times) == 1


async def test_an_initialize_is_parsed_once_and_its_session_remembered() -> None:
    response = b"HTTP/1.1 200 OK\r\nMcp-Session-Id: s1\r\nContent-Length: 2\r\n\r\n{}"
    broker = ScriptedBroker(access_token(1))
    async with (
        RawServer(answers(response)) as upstream,
        forwarding(broker, upstream.url, wait=0.01) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        with parsed(INITIALIZE) as times:
            client.post(INITIALIZE)
            assert (await client.answer()).status == 200
        assert len(times) == 1
        broker.current, broker.waiting = None, pending_authorization()
        client.post(CALL, "Mcp-Session-Id: s1")
        error = json.loads((await client.answer()).body)["error"]
        assert error["data"]["elicitations"][0]["url"] == broker.waiting.link


async def test_a_retry_after_input_required_is_parsed_once_and_loses_the_proxys_entry() -> None:
    broker = ScriptedBroker(access_token(1), [access_token(2)])
    async with (
        RawServer(answers(CHALLENGE, ANSWER)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        with parsed(RETRY) as times:
            client.post(RETRY)
            assert (await client.answer()).status == 200
        assert len(times) == 1
        forwarded = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in upstream.requests]
        assert forwarded == [json.loads(CALL)] * 2


@pytest.mark.parametrize("held", [False, True], ids=["at once", "held"])
async def test_a_subscription_is_parsed_once(held: bool) -> None:
    body = rpc("subscriptions/listen")
    stream = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    broker = ScriptedBroker(None if held else access_token(1))
    async with (
        RawServer(answers(stream)) as upstream,
        forwarding(broker, upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        pending = pending_authorization()
        broker.waiting = pending if held else None
        with parsed(body) as times:
            client.post(body, BOTH)
            if held:
                await until(lambda: times, "the body to be parsed")
                pending.release(access_token(1))
            assert (await client.answer()).ended
        assert len(times) == 1


async def test_a_large_body_that_is_not_held_is_not_parsed() -> None:
    body = CALL + b" " * 100_000
    async with (
        RawServer(answers(ok())) as upstream,
        forwarding(ScriptedBroker(access_token(1)), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        with parsed(body) as times:
            client.post(body)
            assert (await client.answer()).status == 200
        assert times == []
