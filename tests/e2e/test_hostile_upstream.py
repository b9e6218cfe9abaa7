"""An upstream that misbehaves: broken framing, resets, silence, cookies, and connections closed at bad moments."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import Channel, FakeResponse
from fakes.proxy import RunningProxy, running_proxy
from fakes.raw_client import RawClient
from fakes.raw_server import Peer, RawServer, ok
from fakes.unattended import connected

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SMUGGLED = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled"

BROKEN = {
    "both content-length and chunked": CHUNKED.replace(b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"),
    "differing lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 10\r\n\r\n{}" + SMUGGLED,
    "a length that is none": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\n{}",
    "a list of lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\n{}",
    "another coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in 1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded field": b"HTTP/1.1 200 OK\r\nx-a: 1\r\n folded\r\ncontent-length: 2\r\n\r\n{}",
    "bare line feeds": b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}",
    "bare carriage return": b"HTTP/1.1 200 OK\r\nx-a: 1\rx-b: 2\r\ncontent-length: 2\r\n\r\n{}",
    "space before the colon": b"HTTP/1.1 200 OK\r\ncontent-length : 2\r\n\r\n{}",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nx-a: 1\x002\r\ncontent-length: 2\r\n\r\n{}",
    "control in a value": b"HTTP/1.1 200 OK\r\nx-a: 1\x0b2\r\ncontent-length: 2\r\n\r\n{}",
    "bad name": b"HTTP/1.1 200 OK\r\nx a: 1\r\ncontent-length: 2\r\n\r\n{}",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "odd status": b"HTTP/1.1 999 What\r\ncontent-length: 2\r\n\r\n{}",
    "no status": b"HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\n{}",
    "HTTP/2 preface": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "bytes before the head": b"\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "nothing at all": b"",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-le",
    "a huge field": b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * 70_000 + b"\r\ncontent-length: 2\r\n\r\n{}",
    "5,000 fields": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 5000 + b"content-length: 2\r\n\r\n{}",
    "endless interim responses": b"HTTP/1.1 102 Processing\r\n\r\n" * 4000,
}


@contextlib.asynccontextmanager
async def open_proxy(folder: Path, upstream: RawServer) -> AsyncIterator[tuple[RunningProxy, httpx2.AsyncClient]]:
    """The proxy in front of a server that requires no token."""
    async with (
        running_proxy(folder, {"notes": {"url": upstream.url, "upstream_timeout": "5s"}}) as proxy,
        httpx2.AsyncClient(base_url=proxy.origin, trust_env=False, timeout=10) as http,
    ):
        yield proxy, http


async def test_responses_that_break_http_are_502_and_never_mixed_with_others(tmp_path: Path) -> None:  # T37
    said = {"now": b""}

    async def script(peer: Peer) -> None:
        broken = b""
        while not broken:
            await peer.request()
            broken = said["now"]
            await peer.send(broken or ok())

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (_, http):
        for name, response in BROKEN.items():
            said["now"] = response or b" "
            before = len(upstream.requests)
            refused = await http.post("/notes/mcp", content=CALL)
            assert (refused.status_code, refused.json()["id"]) == (502, 9), name
            assert "notes" in refused.json()["error"]["message"]
            assert len(upstream.requests) == before + 1, name
            said["now"] = b""
            assert (await http.post("/notes/mcp", content=CALL)).content == b"hi", name


GOOD = {
    "interim responses": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + ok(b"[1]"),
        b"[1]",
    ),
    "body until close": (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nold", b"old"),
    "chunk extensions and trailers": (CHUNKED + b"3;a=b\r\nabc\r\n0\r\nset-cookie: a=b\r\n\r\n", b"abc"),
    "more than the length": (ok(b"ab") + SMUGGLED, b"ab"),
    "more than the last chunk": (CHUNKED + b"1\r\na\r\n0\r\n\r\n" + SMUGGLED, b"a"),
    "204 with a length": (b"HTTP/1.1 204 No Content\r\ncontent-length: 8\r\n\r\nsmuggled", b""),
    "no reason phrase": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nab", b"ab"),
}


async def test_unusual_but_valid_responses_pass(tmp_path: Path) -> None:
    said = {"now": b""}

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(said["now"])

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (_, http):
        for name, (response, body) in GOOD.items():
            said["now"] = response
            for _ in range(2):
                answer = await http.post("/notes/mcp", content=CALL)
                assert (answer.content, answer.status_code // 100) == (body, 2), name
                assert "set-cookie" not in answer.headers


async def test_no_command_to_a_web_server_in_front_reaches_the_client(tmp_path: Path) -> None:  # T88
    commands = (
        b"X-Accel-Redirect: /secret\r\nx_accel_redirect: /secret\r\nX-Accel-Limit-Rate: 1\r\nX-Sendfile: /secret\r\n"
        b"X_Sendfile: /secret\r\nX-Reproxy-URL: http://10.0.0.1/secret\r\nX-Lighttpd-Send-File: /secret\r\n"
        b"X-Accel-Buffering: yes\r\nX-Accel-Buffering: no\r\n"
    )
    interim = b"HTTP/1.1 103 Early Hints\r\n%s\r\n" % commands
    events = CHUNKED.replace(b"\r\n\r\n", b"\r\n%s\r\n" % commands)
    last = b"0\r\n%s\r\n" % commands
    responses = {
        "JSON": (interim + b"HTTP/1.1 200 OK\r\n%scontent-length: 2\r\n\r\n{}" % commands, b""),
        "events": (interim + events + b"3\r\n: a\r\n" + last, b""),
        "events in parts": (interim + events + b"3\r\n: a\r\n", last),
        "an error": (b"HTTP/1.1 404 Not Found\r\n%scontent-length: 2\r\n\r\n{}" % commands, b""),
    }
    said = {"now": (b"", b"")}
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            first, then = said["now"]
            await peer.send(first)
            await release.wait()
            await peer.send(then)

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (proxy, _):
        for name, response in responses.items():
            said["now"] = response
            release.clear()
            async with RawClient.to(proxy.origin) as raw:
                raw.post(CALL, "Connection: close")
                status, headers = await raw.head()
                release.set()
                rest = await raw.rest()
            assert status in (200, 404), name
            commanded = [field for field in headers if field[0].replace("_", "-").startswith("x-")]
            assert commanded == [("x-accel-buffering", "no")], name
            assert b"secret" not in rest, name


async def test_responses_that_break_off_do_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Peer) -> None:  # T86
        await peer.request()
        await peer.send(CHUNKED + b"5\r\nhello\r\n")

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (proxy, _):
        for body in (CALL, CALL + b" " * 100_000):  # on the fast path, and in a handler
            for _ in range(20):
                async with RawClient.to(proxy.origin) as raw:
                    raw.post(body)
                    assert not (await raw.answer()).ended
    (line,) = [record.getMessage() for record in caplog.records if "broke off" in record.getMessage()]
    assert "server notes" in line


@pytest.mark.parametrize(
    "framing", [CHUNKED + b"5\r\nhello\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhello"]
)
@pytest.mark.parametrize("then", ["reset", "close", "garbage"])
async def test_a_response_that_breaks_off_is_incomplete_for_the_client_and_not_requested_again(
    tmp_path: Path, framing: bytes, then: str
) -> None:
    async def script(peer: Peer) -> None:  # F4
        await peer.request()
        await peer.send(framing)
        await release.wait()
        if then == "garbage" and b"chunked" in framing:
            await peer.send(b"zz\r\n")
        elif then == "reset":
            peer.reset()

    release = asyncio.Event()
    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (proxy, _):
        async with RawClient.to(proxy.origin) as raw:
            raw.post(CALL)
            assert (await raw.head())[0] == 200
            await raw.reader.readuntil(b"hello")
            release.set()
            assert await raw.rest() in (b"", b"\r\n")
        assert len(upstream.requests) == 1


async def test_events_reset_midway_reach_the_client_first(servers: Servers, tmp_path: Path) -> None:
    channel = Channel()
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:  # F4
        await setup.client.post("ping")
        setup.upstream.answers["tools/call:pay"] = FakeResponse.events(channel, reset=True)
        raw.post(CALL)
        channel.event({"n": 1})
        await raw.head()
        channel.close()
        rest = await raw.rest()
    assert b'{"n": 1}' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert len(setup.upstream.calls("tools/call:pay")) == 1


@pytest.mark.parametrize("reused", [False, True])
async def test_a_post_that_was_read_and_then_dropped_is_sent_once(tmp_path: Path, reused: bool) -> None:
    async def script(peer: Peer) -> None:  # F5
        while b"pay" not in await peer.request():
            await peer.send(ok())

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (_, http):
        if reused:
            await http.post("/notes/mcp", content=b"{}")
        answer = await http.post("/notes/mcp", content=CALL)
        assert (answer.status_code, answer.json()["id"]) == (502, 9)
        assert "closed" in answer.json()["error"]["message"]
    assert len([request for request in upstream.requests if b"pay" in request]) == 1
    assert len(upstream.peers) == 1


async def test_connections_closed_while_idle_never_fail_a_request(tmp_path: Path) -> None:  # F14
    async def script(peer: Peer) -> None:
        for _ in range(2):  # then it closes without having announced it
            await peer.request()
            await peer.send(ok())

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (_, http):
        for _ in range(60):
            assert (await http.post("/notes/mcp", content=CALL)).status_code == 200
    assert len(upstream.requests) == 60


async def test_connections_reset_while_idle_never_fail_a_request(servers: Servers, tmp_path: Path) -> None:  # F14
    async with connected(servers, tmp_path) as setup:
        for _ in range(10):
            replies = await asyncio.gather(*(setup.client.call("echo", text=str(n)) for n in range(8)))
            assert [reply.text for reply in replies] == [str(n) for n in range(8)]
            await setup.upstream.local.drop_connections()


async def test_unsolicited_bytes_are_not_the_response_to_the_next_request(tmp_path: Path) -> None:  # T37
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(ok(b"[%d]" % len(upstream.requests)))
            await peer.send(SMUGGLED)

    async with RawServer(script) as upstream, open_proxy(tmp_path, upstream) as (_, http):
        bodies = [(await http.post("/notes/mcp", content=CALL)).content for _ in range(5)]
    assert bodies == [b"[%d]" % number for number in range(1, 6)]


async def test_a_head_that_trickles_is_ended_by_the_time_out(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        for byte in b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20:
            await peer.send(bytes([byte]))
            await asyncio.sleep(0.05)

    server = {"upstream_timeout": "400ms"}
    async with (
        RawServer(script) as upstream,
        running_proxy(tmp_path, {"notes": {"url": upstream.url, **server}}) as proxy,
        httpx2.AsyncClient(trust_env=False) as http,
        asyncio.timeout(5),
    ):
        assert (await http.post(f"{proxy.origin}/notes/mcp", content=CALL)).status_code == 504


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_only_event_streams_may_be_silent_forever(servers: Servers, tmp_path: Path, kind: str) -> None:
    channel = Channel()
    answer = FakeResponse(headers=(("content-type", kind),), stream=channel)
    async with connected(servers, tmp_path, server={"upstream_timeout": "400ms"}) as setup:
        await setup.client.post("ping")
        setup.upstream.answers["tools/call:pay"] = answer
        async with RawClient.to(setup.proxy.origin) as raw:
            raw.post(CALL)
            await raw.head()
            if kind == "application/json":
                assert not (await raw.rest(3)).endswith(b"0\r\n\r\n")
            else:
                with pytest.raises(TimeoutError):
                    await raw.rest(1)
                channel.close()
                assert await raw.reader.readexactly(5) == b"0\r\n\r\n"


async def test_cookies_challenges_and_policies_of_the_upstream_are_dropped(servers: Servers, tmp_path: Path) -> None:
    secret = (
        ("set-cookie", "session=first; Path=/"),
        ("set-cookie", "b=2"),
        ("www-authenticate", 'Bearer realm="x"'),
        ("proxy-authenticate", "Basic"),
        ("strict-transport-security", "max-age=1"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("keep-alive", "timeout=9"),
    )
    kept = (("mcp-session-id", "s"), ("x-other", "1"), ("retry-after", "3"), ("traceresponse", "t"))
    async with connected(servers, tmp_path, options={"response_headers": (*secret, *kept)}) as setup:  # T34
        for answer in (None, FakeResponse.json({}, 403), FakeResponse.json({}, 429)):
            if answer is not None:
                setup.upstream.answers["ping"] = answer
            reply = await setup.client.post("ping")
            assert not set(reply.headers) & {name for name, _ in secret}
        setup.upstream.answers.clear()
        reply = await setup.client.post("ping")
        assert set(kept) <= set(reply.headers.items())
        async with setup.proxy.client("notes") as other:
            await other.post("ping")
    assert [request for request in setup.upstream.requests if request.header("cookie")] == []


async def test_no_store_is_added_if_the_upstream_has_no_cache_control(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:  # T38
        assert (await setup.client.post("ping")).headers.get_list("cache-control") == ["no-store"]
        setup.upstream.response_headers = (("cache-control", "private, max-age=5"),)
        assert (await setup.client.post("ping")).headers.get_list("cache-control") == ["private, max-age=5"]
        await setup.upstream.local.down()
        assert (await setup.client.post("ping")).headers["cache-control"] == "no-store"
