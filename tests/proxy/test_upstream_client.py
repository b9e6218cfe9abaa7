"""Requests to an upstream: the redirects that are followed, and those that a token is not sent along."""

import json
import re

import pytest

from fakes.forwarding import ScriptedBroker, access_token, forwarding
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer, Script, answers, ok
from mcp_auth_proxy.errors import (
    UpstreamError,
    UpstreamPoolTimeout,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mcp_auth_proxy.proxy.upstream_client import MAX_REDIRECTS, failure_kind, is_redirect

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()


def redirect(location: str | None, status: int = 307) -> bytes:
    field = "" if location is None else f"Location: {location}\r\n"
    return f"HTTP/1.1 {status} Moved\r\n{field}Content-Length: 0\r\n\r\n".encode()


def scripted(responses: list[bytes]) -> Script:
    """Return a script that answers with what ``responses`` has by the time of the connection."""

    async def script(peer: Peer) -> None:
        await answers(*responses)(peer)

    return script


async def post(upstream: RawServer, *, warm: bool = False) -> RawResponse:
    """Send one call by way of the proxy; if ``warm``, on the fast path."""
    broker = ScriptedBroker(access_token(1))
    async with forwarding(broker, upstream.url) as proxy, RawClient.to(proxy.origin) as client:
        if warm:
            client.post(CALL)
            assert (await client.answer()).status == 200
        client.post(CALL)
        return await client.answer()


def targets(upstream: RawServer) -> list[bytes]:
    return [request.split(b" ", 2)[1] for request in upstream.requests]


@pytest.mark.parametrize("warm", [False, True], ids=["in a task", "on the fast path"])
@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/mcp/", b"/mcp/"),
        ("other?a=1", b"/other?a=1"),
        ("?b", b"/mcp?b"),
        ("//HOST/x", b"/x"),
        ("http://HOST/y", b"/y"),
    ],
)
async def test_a_redirect_within_the_origin_is_followed_with_body_and_token(
    location: str, target: bytes, status: int, warm: bool
) -> None:
    responses: list[bytes] = [ok()] if warm else []
    async with RawServer(scripted(responses)) as upstream:
        responses += [redirect(location.replace("HOST", f"127.0.0.1:{upstream.port}"), status), ok(b"{}")]
        answer = await post(upstream, warm=warm)
    assert (answer.status, answer.body) == (200, b"{}")
    assert targets(upstream)[-2:] == [b"/mcp", target]
    for request in upstream.requests:
        assert request.startswith(b"POST ")
        assert request.endswith(CALL)
        assert b"authorization: Bearer token-1\r\n" in request


@pytest.mark.parametrize("warm", [False, True], ids=["in a task", "on the fast path"])
@pytest.mark.parametrize(
    ("location", "status", "text"),
    [
        ("https://127.0.0.1:PORT/mcp", 307, "servers.notes.url"),
        ("http://127.0.0.1:1/mcp", 308, "servers.notes.url"),
        ("http://localhost:PORT/mcp", 307, "servers.notes.url"),
        ("//evil.example/mcp", 307, "a redirect to evil.example:80"),
        # RFC 9110 §15.4: the method may change to GET.
        ("/other", 301, "a token is not sent there"),
        ("/other", 302, "a token is not sent there"),
        ("/other", 303, "a token is not sent there"),
        ("ftp://127.0.0.1/", 307, "without a usable Location"),
        ("http://user:hunter2@127.0.0.1:PORT/", 307, "without a usable Location"),
        ("http://[", 307, "without a usable Location"),
        ("/\xe4", 307, "without a usable Location"),
        ("/a b", 307, "without a usable Location"),
        ("/a#b", 307, "without a usable Location"),
    ],
)
async def test_no_other_redirect_is_followed(location: str, status: int, text: str, warm: bool) -> None:
    responses: list[bytes] = [ok()] if warm else []
    async with RawServer(scripted(responses)) as upstream:
        head = redirect(None, status).replace(b"\r\n\r\n", b"\r\nLocation: %s\r\n\r\n")
        responses.append(head % location.replace("PORT", str(upstream.port)).encode("latin-1"))
        answer = await post(upstream, warm=warm)
    message = json.loads(answer.body)["error"]["message"]
    assert (answer.status, len(upstream.requests)) == (502, 2 if warm else 1)
    assert text in message
    assert f"answers {status}" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("location", [None, ""])
async def test_a_redirect_without_a_location_is_not_taken_for_one_to_the_same_place(location: str | None) -> None:
    async with RawServer(answers(redirect(location), ok())) as upstream:
        answer = await post(upstream)
    assert (answer.status, len(upstream.requests)) == (502, 1)
    assert "without a usable Location" in answer.body.decode()


@pytest.mark.parametrize("count", [MAX_REDIRECTS, MAX_REDIRECTS + 1])
async def test_a_few_redirects_are_followed_and_no_more(count: int) -> None:
    responses = [redirect(f"/{number}") for number in range(count)]
    async with RawServer(answers(*responses, ok())) as upstream:
        answer = await post(upstream)
    if count == MAX_REDIRECTS:
        assert (answer.status, len(upstream.requests)) == (200, count + 1)
    else:
        assert (answer.status, len(upstream.requests)) == (502, count)
        assert re.search(r"redirects more than \d+ times", answer.body.decode())


@pytest.mark.parametrize(
    ("status", "redirects"),
    [(200, False), (300, True), (301, True), (303, True), (304, False), (307, True), (399, True), (401, False)],
)
def test_every_3xx_but_304_sends_the_request_elsewhere(status: int, redirects: bool) -> None:
    assert is_redirect(status) is redirects


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UpstreamUnreachable(), "unreachable"),
        (UpstreamTimeout(), "timeout"),
        (UpstreamPoolTimeout(), "pool"),
        (UpstreamProtocolError(), "protocol"),
        (UpstreamError(), "protocol"),
    ],
)
def test_each_failure_has_its_kind_in_the_metrics(error: UpstreamError, kind: str) -> None:
    assert failure_kind(error) == kind


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
async def test_only_methods_that_usually_have_a_body_say_that_theirs_is_empty(method: str) -> None:
    async with (
        RawServer(answers(ok(b"{}"))) as upstream,
        forwarding(ScriptedBroker(), upstream.url) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.send(f"{method} /notes/mcp HTTP/1.1\nHost: HOST\n\n")
        assert (await client.answer()).status == 200
    assert (b"content-length: 0\r\n" in upstream.requests[0]) is (method == "POST")
