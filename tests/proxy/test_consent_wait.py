"""A request that waits for its user: for how long, what the client sees meanwhile, and what it gets in the end."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes.forwarding import ForwardingServer, ScriptedBroker, access_token, forwarding, pending_authorization
from fakes.proxy import until
from fakes.raw_client import RawClient, RawResponse
from mcp_auth_proxy.broker import PendingAuthorization
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, StoreUnavailable
from mcp_auth_proxy.observability.metrics import ServerMetrics
from mcp_auth_proxy.proxy import consent_wait
from mcp_auth_proxy.rpc.messages import INPUT_KEY, MAX_BATCH

NOWHERE = "http://127.0.0.1:1/mcp"
BOTH = "Accept: application/json, text/event-stream"


def rpc(method: str = "tools/call", **params: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 9, "method": method, "params": params}).encode()


NOTIFICATION = b'{"jsonrpc":"2.0","method":"notifications/initialized"}'


def retry(action: str) -> bytes:
    return rpc(inputResponses={INPUT_KEY: {"action": action}})


@asynccontextmanager
async def held(
    *, wait: float = 3600.0, pending: PendingAuthorization | None = None
) -> AsyncIterator[tuple[PendingAuthorization, ForwardingServer, RawClient]]:
    """A proxy whose only account waits for its user."""
    broker = ScriptedBroker()
    async with forwarding(broker, NOWHERE, wait=wait) as proxy, RawClient.to(proxy.origin) as client:
        broker.waiting = pending or pending_authorization()
        yield broker.waiting, proxy, client


def error_of(answer: RawResponse) -> dict[str, object]:
    error: dict[str, object] = json.loads(answer.body)["error"]
    return error


# For how long


async def test_a_probe_is_held_for_less_time_than_its_client_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent_wait, "DISCOVER_WAIT", 0.05)
    for body in (rpc("server/discover"), rpc("server/discover", inputResponses={INPUT_KEY: {}})):
        async with held() as (pending, _, client):
            client.post(body)
            assert pending.link in (await client.answer()).body.decode()


async def test_a_retry_is_held_for_a_while_though_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent_wait, "RETRY_WAIT", 0.3)
    loop = asyncio.get_running_loop()
    async with held(wait=0.0) as (pending, _, client):
        for body, seconds in ((rpc(), 0.0), (retry("accept"), 0.3)):
            begun = loop.time()
            client.post(body)
            assert pending.link in (await client.answer()).body.decode()
            assert loop.time() - begun >= seconds - 0.005  # uvloop rounds its clock to milliseconds


async def test_a_retry_is_held_no_less_than_any_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent_wait, "RETRY_WAIT", 0.0)
    async with held(wait=3600) as (pending, proxy, client):
        client.post(retry("accept"))
        await until(lambda: proxy.forwarder.active_requests, "a held request")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), 0.1)
        proxy.forwarder.drain()
        assert pending.link in (await client.answer()).body.decode()


async def test_a_proxy_that_shuts_down_answers_what_it_holds_with_the_link() -> None:
    async with held() as (pending, proxy, client):
        client.post(rpc())
        await until(lambda: proxy.forwarder.active_requests, "a held request")
        proxy.forwarder.drain()
        assert pending.link in (await client.answer()).body.decode()


async def test_requests_that_wait_are_counted_while_they_do() -> None:
    waiting = ServerMetrics("notes").waiting_for_consent
    before = waiting.value
    async with held() as (pending, _, client):
        client.post(rpc())
        await until(lambda: waiting.value == before + 1, "a request that waits")
        pending.fail(AuthorizationDenied("The user said no."))
        await client.answer()
        assert waiting.value == before


# What ends the wait


@pytest.mark.parametrize("action", ["decline", "cancel"])
async def test_a_user_who_does_not_open_the_link_is_not_waited_for(action: str) -> None:
    async with held() as (_, _, client):
        client.post(retry(action))
        answer = await client.answer()
        assert (answer.status, "was declined" in answer.body.decode()) == (200, True)


async def test_a_failed_authorization_fails_every_request_that_waits_for_it() -> None:
    async with held() as (pending, proxy, client), RawClient.to(proxy.origin) as other:
        client.post(rpc())
        other.post(NOTIFICATION)
        await until(lambda: proxy.forwarder.active_requests == 2, "two held requests")
        pending.fail(AuthorizationDenied("The user said no."))
        answers = [await client.answer(), await other.answer()]
        assert [answer.status for answer in answers] == [200, 502]
        assert all("The user said no." in str(error_of(answer)["message"]) for answer in answers)


async def test_a_client_that_leaves_while_it_waits_costs_nothing_more() -> None:
    async with held() as (pending, proxy, client):
        client.post(rpc())
        await until(lambda: proxy.forwarder.active_requests, "a held request")
        client.drop()
        await until(lambda: not proxy.forwarder.active_requests, "no active request")
        assert not pending.done


@pytest.mark.parametrize("error", [StoreUnavailable("It is locked."), AuthorizationError("It was removed.")])
async def test_a_link_that_can_not_be_replaced_is_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: ScriptedBroker, pending: PendingAuthorization) -> PendingAuthorization:
        raise error

    monkeypatch.setattr(ScriptedBroker, "fresh_link", fail)
    async with held(wait=0.0) as (_, _, client):
        client.post(rpc())
        answer = await client.answer()
        assert (str(error) in str(error_of(answer)["message"]), answer.status) == (
            True,
            503 if isinstance(error, StoreUnavailable) else 200,
        )


async def test_the_answer_has_the_newest_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async def replace(self: ScriptedBroker, pending: PendingAuthorization) -> PendingAuthorization:
        return pending.replaced_by(pending.flow, "http://127.0.0.1:8787/connect/notes?flow=F2")

    monkeypatch.setattr(ScriptedBroker, "fresh_link", replace)
    async with held(wait=0.0) as (_, _, client):
        client.post(rpc())
        text = (await client.answer()).body.decode()
        assert ("flow=F2" in text, "flow=F1" in text) == (True, False)


# What the answer is


@pytest.mark.parametrize(
    "body",
    [NOTIFICATION, b'{"jsonrpc":"2.0","id":1,"result":{}}', b"[" + b",".join([rpc("ping")] * (MAX_BATCH + 1)) + b"]"],
    ids=["notification", "response", "huge batch"],
)
async def test_what_has_no_request_to_answer_is_503_with_the_link(body: bytes) -> None:
    async with held(wait=0.0) as (pending, _, client):
        client.post(body)
        answer = await client.answer()
        assert (answer.status, answer.all("retry-after")) == (503, ["5"])
        error = error_of(answer)
        assert isinstance(error["data"], dict)
        assert (error["code"], error["data"]["authorization_url"]) == (-32001, pending.link)


async def test_a_body_in_a_coding_that_only_the_server_knows_is_held_like_any_other() -> None:
    for coding, status in (("gzip", 503), ("identity", 400), ("IDENTITY", 400)):
        async with held(wait=0.0) as (_, _, client):
            client.post(b"\x1f\x8b", f"Content-Encoding: {coding}")
            assert (await client.answer()).status == status


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_request_without_a_body_is_held_too(method: str) -> None:
    async with held(wait=0.0) as (pending, _, client):
        client.send(f"{method} /notes/mcp HTTP/1.1\nHost: HOST\n\n")
        answer = await client.answer()
        assert (answer.status, pending.link in answer.body.decode()) == (503, True)


# What the client sees meanwhile


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (rpc(), ()),
        (rpc(), ("Accept: application/json",)),
        (NOTIFICATION, (BOTH,)),
        # Its session id travels in the head, and comes from the upstream.
        (rpc("initialize"), (BOTH,)),
        (b"[%s,%s]" % (rpc(), rpc("initialize")), (BOTH,)),
    ],
    ids=["no Accept", "JSON only", "notification", "initialize", "batch with initialize"],
)
async def test_a_response_of_which_the_form_is_not_known_yet_does_not_begin(
    body: bytes, fields: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", 0.01)
    async with held(wait=0.1) as (_, _, client):
        client.post(body, *fields)
        answer = await client.answer()
        assert answer.all("content-type") == ["application/json"]
        assert b": waiting" not in answer.body


async def test_a_stream_for_messages_of_the_server_is_kept_alive_and_ends_without_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", 0.01)
    async with held(wait=0.1) as (_, _, client):
        client.get()
        answer = await client.answer()
        assert (answer.status, answer.all("content-type"), answer.ended) == (200, ["text/event-stream"], True)
        lines = set(answer.body.decode().split("\n\n"))
        assert lines == {": waiting for the user to authorize", ""}


async def test_a_stream_that_has_begun_carries_the_link_as_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", 0.01)
    async with held(wait=0.1) as (pending, _, client):
        client.post(rpc(), BOTH)
        answer = await client.answer()
        assert answer.body.startswith(b": waiting")
        event = answer.body.decode().rpartition("data: ")[2]
        assert pending.link in json.loads(event)["result"]["content"][0]["text"]


async def test_the_token_of_the_consent_is_used_though_the_wait_is_over_by_then() -> None:
    pending = pending_authorization()
    async with held(wait=0.0, pending=pending) as (_, _, client):
        pending.release(access_token(1))
        client.post(rpc())
        # Nothing listens upstream: it was sent on, and not answered with the link.
        assert (await client.answer()).status == 502
