"""Asking an upstream, without a token, what it is."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import UpstreamUnreachable
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.proxy import probe as probes
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.probe import MAX_BODY, MODERN, PROTOCOL_VERSION, ask, probe
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient

CHALLENGE = (
    b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer scope=a\r\nWWW-Authenticate: Basic\r\n"
    b"Content-Length: 0\r\n\r\n"
)
SESSION = b"HTTP/1.1 200 OK\r\nMcp-Session-Id: s1\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def upstream_client() -> AsyncIterator[UpstreamClient]:
    http = HttpClient(Dialer(environ={}), connections_per_origin=4)
    try:
        yield UpstreamClient(http)
    finally:
        await http.aclose()


def route(url: str) -> Route:
    return routes.build({"notes": ServerSettings(name="notes", url=url, upstream_timeout=5.0)})[b"/notes/mcp"]


def parts(request: bytes) -> tuple[str, dict[str, str], bytes]:
    """Return method, fields and body of a request."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first.split()[0], dict(line.split(": ", 1) for line in lines), body


async def test_the_challenge_of_a_server_is_returned_and_no_session_ended() -> None:
    async with RawServer(answers(CHALLENGE)) as upstream, upstream_client() as client:
        assert await probe(client, route(upstream.url)) == (401, [b"Bearer scope=a", b"Basic"])
    ((method, fields, body),) = map(parts, upstream.requests)
    assert (method, json.loads(body)["method"]) == ("POST", "initialize")
    assert "authorization" not in fields
    assert "mcp-protocol-version" not in fields


async def test_a_session_that_the_question_began_is_ended() -> None:
    async with RawServer(answers(SESSION, ok())) as upstream, upstream_client() as client:
        assert await probe(client, route(upstream.url)) == (200, [])
    method, fields, body = parts(upstream.requests[1])
    assert (method, body) == ("DELETE", b"")
    assert (fields["mcp-session-id"], fields["mcp-protocol-version"]) == ("s1", PROTOCOL_VERSION)


async def test_a_session_that_cannot_be_ended_is_left_to_expire() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(SESSION)
        await peer.request()
        peer.reset()

    async with RawServer(script) as upstream, upstream_client() as client:
        assert await probe(client, route(upstream.url)) == (200, [])
        assert len(upstream.requests) >= 2


@pytest.mark.parametrize(
    ("method", "modern", "session", "expected"),
    [
        ("initialize", False, b"", {}),
        ("tools/list", False, b"s1", {"mcp-protocol-version": PROTOCOL_VERSION, "mcp-session-id": "s1"}),
        ("server/discover", True, b"", {"mcp-protocol-version": MODERN, "mcp-method": "server/discover"}),
    ],
)
async def test_each_revision_is_asked_in_its_own_form(
    method: str, modern: bool, session: bytes, expected: dict[str, str]
) -> None:
    async with RawServer(answers(ok(b"[1]"))) as upstream, upstream_client() as client:
        answer = await ask(client, route(upstream.url), method, session=session, modern=modern)
    assert (answer.method, answer.status, answer.body, answer.challenge) == (method, 200, b"[1]", [])
    _, fields, body = parts(upstream.requests[0])
    assert {name: value for name, value in fields.items() if name.startswith("mcp-")} == {
        **expected,
        "mcp-auth-proxy-hops": "1",
    }
    params = json.loads(body)["params"]
    assert ("_meta" in params, "protocolVersion" in params) == (modern, method == "initialize")


async def test_no_more_of_a_body_is_read_than_shows_what_it_is() -> None:
    async with RawServer(answers(ok(b"x" * (1 << 25)))) as upstream, upstream_client() as client:
        answer = await ask(client, route(upstream.url), "ping")
        await asyncio.wait_for(upstream.peers[0].gone.wait(), 5)
    assert answer.body == b"x" * MAX_BODY


@pytest.mark.parametrize("breaks", [False, True], ids=["stays open", "breaks off"])
async def test_a_stream_without_an_end_is_read_for_a_moment(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "BODY_SECONDS", 0.1)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n: hi\n\n")
        if not breaks:
            await peer.until_gone()

    async with RawServer(script) as upstream, upstream_client() as client:
        answer = await ask(client, route(upstream.url), "ping")
    assert (answer.status, answer.body) == (200, b": hi\n\n")


async def test_a_server_that_cannot_be_reached_is_an_error() -> None:
    async with upstream_client() as client:
        with pytest.raises(UpstreamUnreachable):
            await probe(client, route("http://127.0.0.1:1/mcp"))
