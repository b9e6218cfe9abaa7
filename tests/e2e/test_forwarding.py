"""What passes between client and upstream, and what does not: status codes, header fields, targets, limits."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import MODERN
from fakes.proxy import running_proxy
from fakes.raw_client import RawClient
from fakes.raw_server import RawServer, answers
from fakes.unattended import connected

PING = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping"}).encode()
JSON_TYPE = {"content-type": "application/json"}
INVALID = {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Bad Request"}}
PASSING = [
    FakeResponse(status=202),
    FakeResponse(status=204),
    FakeResponse.json({"not": "json-rpc"}, 200, x_upstream="1"),
    FakeResponse.json(INVALID, 400),
    FakeResponse.json({"error": "no"}, 403),
    FakeResponse.json(INVALID, 404),
    FakeResponse(status=405, headers=(("allow", "POST"),)),
    FakeResponse(status=406),
    FakeResponse.json(INVALID, 409),
    FakeResponse(status=415),
    FakeResponse.too_many(),
    FakeResponse.html(status=500),
    FakeResponse.html(status=502),
    FakeResponse.html(status=503, retry_after="120"),
    FakeResponse(status=599),
]


@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18", "2025-11-25"])
async def test_a_session_lives_and_ends_through_the_proxy(servers: Servers, tmp_path: Path, version: str) -> None:
    async with connected(servers, tmp_path, version=version, options={"sessions_on": True}) as setup:
        assert (await setup.client.initialize()).status == 200
        assert list(setup.upstream.sessions) == [setup.client.session]
        assert setup.upstream.calls("notifications/initialized")[0].header("mcp-session-id") == setup.client.session
        assert (await setup.client.notify("notifications/cancelled")).status == 202
        assert (await setup.client.call("echo", text="hi")).text == "hi"
        assert setup.upstream.calls("tools/call")[0].header("mcp-protocol-version") == version
        assert (await setup.client.delete()).status == 200
        ended = await setup.client.call("echo", text="late")
    assert (ended.status, ended.error["message"]) == (404, "Session not found")


async def test_stateless_requests_pass_with_their_headers(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path, version=MODERN) as setup:
        assert (await setup.client.post("server/discover")).result["supportedVersions"] == [MODERN]
        assert (await setup.client.call("echo", text="hi")).text == "hi"
        call = setup.upstream.calls("tools/call")[0]
        assert (call.header("mcp-method"), call.header("mcp-name")) == ("tools/call", "echo")
        assert (await setup.client.post("no/such")).status == 404
        setup.upstream.modern = False
        refused = await setup.client.post("tools/list")
    assert (refused.status, refused.error["code"]) == (400, -32000)


async def test_status_headers_and_body_pass_unchanged(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        for answer in PASSING:
            setup.upstream.answers["ping"] = answer
            response = await setup.client.http.post(setup.client.url, content=PING, headers=JSON_TYPE)
            assert (response.status_code, response.content) == (answer.status, answer.body)
            assert set(answer.headers) <= set(response.headers.items())
    assert len(setup.upstream.calls("ping")) == 1 + len(PASSING)  # the first of all without a token


async def test_client_fields_pass_except_those_of_identity_and_connection(servers: Servers, tmp_path: Path) -> None:
    passing = {
        "mcp-session-id": "s-1",
        "mcp-protocol-version": "2025-11-25",
        "mcp-param-region": "eu",
        "last-event-id": "41",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "x-unknown": "as it is",
        "accept": "application/json, text/event-stream",
        "accept-encoding": "gzip",
        "user-agent": "editor/1",
    }
    dropped = {  # T31, T33
        "authorization": "Bearer of-the-client",
        "cookie": "a=b",
        "forwarded": "for=1.2.3.4",
        "x-forwarded-for": "1.2.3.4",
        "x-forwarded-host": "evil",
        "x_forwarded_for": "1.2.3.4",
        "proxy-authorization": "Basic eA==",
        "true-client-ip": "1.2.3.4",  # T88
        "cf-connecting-ip": "1.2.3.4",
        "x-client-ip": "1.2.3.4",
        "x_client_ip": "1.2.3.4",
        "x-remote-user": "root",
        "remote-user": "root",
        "remote_user": "root",
        "x-ssl-client-verify": "SUCCESS",
        "x_ssl_client_s_dn": "CN=root",
        "x-original-url": "/admin",
        "x-rewrite-url": "/admin",
        "x-http-method-override": "DELETE",
        "x_http_method_override": "DELETE",
        "te": "trailers",
        "keep-alive": "timeout=5",
        "x-hop": "mine",
        "connection": "x-hop, keep-alive",
    }
    async with connected(servers, tmp_path) as setup:
        origin = {"origin": setup.proxy.origin}
        await setup.client.http.post(setup.client.url, content=PING, headers=JSON_TYPE | passing | dropped | origin)
        await setup.client.http.post(setup.client.url, content=PING, headers=JSON_TYPE | passing | dropped | origin)
    seen = setup.upstream.calls("ping")[-1]
    assert {name: seen.header(name) for name in passing} == passing
    assert [name for name in (*dropped, "origin") if seen.header(name) and name != "authorization"] == []
    assert seen.all("host") == [setup.upstream.origin.removeprefix("http://")]
    assert setup.upstream.find_token(seen.bearer) is not None
    assert "of-the-client" not in repr([request.headers for request in setup.upstream.requests])


@pytest.mark.parametrize("listed", ["authorization", "Authorization, host, content-length", "mcp-session-id, close"])
async def test_our_fields_arrive_even_if_connection_lists_them(servers: Servers, tmp_path: Path, listed: str) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:  # T32
        raw.post(PING, f"Connection: {listed}", "Authorization: Bearer x", "Mcp-Session-Id: s")
        assert (await raw.answer()).status == 200
    seen = setup.upstream.calls("ping")[-1]
    assert setup.upstream.find_token(seen.bearer) is not None
    assert (seen.body, len(seen.all("host")), len(seen.all("authorization"))) == (PING, 1, 1)
    assert seen.all("mcp-session-id") == ([] if "mcp-session-id" in listed else ["s"])


async def test_the_target_is_the_configured_one_whatever_the_client_asks(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path, query="?tenant=a%20b&x=1") as setup:
        response = await setup.client.http.post(setup.client.url + "?tenant=evil&y=2", content=PING, headers=JSON_TYPE)
    assert response.status_code == 200
    assert {(request.path, request.query_string) for request in setup.upstream.calls()} == {
        ("/mcp", "tenant=a%20b&x=1")
    }


async def test_short_path_serves_a_single_server_only(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        response = await setup.client.http.post(f"{setup.proxy.origin}/mcp", content=PING, headers=JSON_TYPE)
        assert response.json()["result"] == {}
    two = {"alpha": setup.upstream.url, "beta": setup.upstream.url}
    async with running_proxy(tmp_path, two) as proxy, httpx2.AsyncClient(trust_env=False) as http:
        for path in ("/mcp", "/gamma/mcp"):
            response = await http.post(proxy.origin + path, content=PING, headers=JSON_TYPE)
            assert response.status_code == 404
            assert "alpha, beta" in response.json()["error"]["message"]


async def test_an_unreachable_upstream_is_a_502_that_says_so(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        await setup.upstream.local.down()
        for identifier in (7, "seven", None):
            message = {"jsonrpc": "2.0", "method": "ping"} | ({} if identifier is None else {"id": identifier})
            response = await setup.client.http.post(setup.client.url, json=message)
            answer = response.json()
            assert (response.status_code, answer["jsonrpc"], answer["id"]) == (502, "2.0", identifier)
            for word in ("notes", "refused", setup.upstream.origin.removeprefix("http://")):
                assert word in answer["error"]["message"]
        await setup.upstream.local.up()
        assert (await setup.client.call("echo", text="back")).text == "back"


async def test_an_upstream_that_does_not_answer_is_a_504(servers: Servers, tmp_path: Path) -> None:
    options = {"answers": {"tools/call:slow": FakeResponse.hang()}}
    async with connected(servers, tmp_path, server={"upstream_timeout": "300ms"}, options=options) as setup:
        reply = await setup.client.call("slow")
        assert (reply.status, reply.message["id"]) == (504, 1)
        assert "notes" in reply.error["message"]
        slow = setup.upstream.calls("tools/call:slow")
        await asyncio.wait_for(slow[-1].gone.wait(), 5)
        assert (await setup.client.call("echo", text="next")).text == "next"
    assert len([request for request in slow if request.bearer]) == 1


async def test_an_outage_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = "http://127.0.0.1:9/mcp"
    async with running_proxy(tmp_path, {"notes": url}) as proxy, proxy.client("notes") as client:
        assert [(await client.call("x")).status for _ in range(3)] == [502, 502, 502]
    logged = [message for message in caplog.messages if "server notes: " in message]
    assert len(logged) == 1
    assert "connection refused" in logged[0]


async def test_body_limit_counts_announced_and_chunked_bytes(servers: Servers, tmp_path: Path) -> None:
    async def chunks(total: int) -> AsyncIterator[bytes]:
        for _ in range(total // 500):
            yield b" " * 500

    async with connected(servers, tmp_path, limits={"body": 2000}) as setup:  # T30
        for content in (b" " * 2001, chunks(2500)):
            response = await setup.client.http.post(setup.client.url, content=content, headers=JSON_TYPE)
            assert response.status_code == 413
            assert "limits.body" in response.json()["error"]["message"]
        assert setup.upstream.calls() == []
        padded = PING + b" " * (2000 - len(PING))
        assert (await setup.client.http.post(setup.client.url, content=padded, headers=JSON_TYPE)).status_code == 200


@pytest.mark.parametrize("path", ["/notes/mcp", "/unknown/mcp"])
async def test_a_client_that_sends_a_large_body_before_it_reads_can_read_the_refusal(
    servers: Servers, tmp_path: Path, path: str
) -> None:
    def ask(host: str) -> int:
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("POST", path, b" " * 20_000_000, JSON_TYPE)
        return connection.getresponse().status

    async with connected(servers, tmp_path) as setup:  # T30
        host = setup.proxy.origin.removeprefix("http://")
        assert await asyncio.to_thread(ask, host) == (413 if path == "/notes/mcp" else 404)


async def test_an_announced_oversized_body_is_refused_before_it_is_sent(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        raw.send("POST /notes/mcp HTTP/1.1\nHost: HOST\nExpect: 100-continue\nContent-Length: 99999999999\n\n")
        assert (await raw.answer()).status == 413


async def test_chunked_request_bodies_arrive_whole(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        raw.send("POST /notes/mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: chunked\nContent-Type: application/json\n\n")
        for byte in PING:
            raw.send(b"1;ext=x\r\n%c\r\n" % byte)
        raw.send("0\nX-Trailer: ignored\n\n")
        assert (await raw.answer()).status == 200
    seen = setup.upstream.calls("ping")[-1]
    assert (seen.body, seen.header("content-length"), seen.header("x-trailer")) == (PING, str(len(PING)), None)


async def test_other_methods_are_answered_by_the_upstream(servers: Servers, tmp_path: Path) -> None:
    methods = {"PUT": b"{}", "PATCH": b"{}", "OPTIONS": b"", "HEAD": b""}
    answer = FakeResponse(status=405, headers=(("allow", "GET, POST"),), body=b"not here")
    async with connected(servers, tmp_path, options={"answers": dict.fromkeys(methods, answer)}) as setup:
        for method, body in methods.items():
            for _ in range(2):
                response = await setup.client.http.request(method, setup.client.url, content=body)
                assert (response.status_code, response.headers["allow"]) == (405, "GET, POST")
                assert response.content == (b"" if method == "HEAD" else b"not here")
            assert setup.upstream.calls(method)[-1].body == body


async def test_a_redirect_that_may_change_the_request_is_a_502(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:  # T35
        for status in (300, 301, 302, 303, 305):
            setup.upstream.answers["ping"] = FakeResponse.redirect(f"{setup.upstream.origin}/other", status)
            reply = await setup.client.post("ping", id=status)
            assert (reply.status, reply.message["id"]) == (502, status)
            assert "servers.notes.url" in reply.error["message"]
    assert [request for request in setup.upstream.requests if request.path == "/other"] == []


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_on_the_same_origin_is_followed_with_token_and_body(
    servers: Servers, tmp_path: Path, status: int
) -> None:
    async with connected(servers, tmp_path) as setup:
        setup.upstream.answers["ping"] = FakeResponse.redirect("/moved?x=1", status)
        reply = await setup.client.post("ping")
    moved = [request for request in setup.upstream.requests if request.path == "/moved"]
    assert (reply.status, len(moved), moved[0].query_string, moved[0].rpc_method) == (404, 1, "x=1", "ping")
    assert setup.upstream.find_token(moved[0].bearer) is not None


@pytest.mark.parametrize("status", [307, 308])
async def test_a_redirect_to_another_origin_is_never_followed(servers: Servers, tmp_path: Path, status: int) -> None:
    async with RawServer(answers()) as other, connected(servers, tmp_path) as setup:  # T35
        port = setup.upstream.origin.rpartition(":")[2]
        for place in (other.url, other.url.replace("http://", "//"), f"http://localhost:{port}/mcp", "javascript:x"):
            setup.upstream.answers["ping"] = FakeResponse.redirect(place, status)
            assert (await setup.client.post("ping")).status == 502
        setup.upstream.answers["ping"] = FakeResponse.redirect(setup.upstream.url, status)  # forever
        assert (await setup.client.post("ping")).status == 502
    assert other.peers == []
