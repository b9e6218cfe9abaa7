"""Web pages of other origins: those in ``inbound.allowed_origins`` use the MCP endpoints, and no other page does."""

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.chromium import EVIL, chromium, website
from fakes.fixtures import Servers
from fakes.proxy import RunningProxy, running_proxy, until, write_config
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer
from fakes.unattended import connected
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load

PAGE = "http://localhost:6274"
INBOUND = {"allowed_origins": [PAGE]}
CALL = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "echo"}}).encode()
NOWHERE = "http://127.0.0.1:1/mcp"


async def ask(proxy: RunningProxy, request: str, body: bytes = b"", origin: str = PAGE) -> RawResponse:
    """Send a request as a page of another site does; ``request`` is its method, path and further fields, in lines."""
    start, *fields = request.split("\n")
    lines = [f"{start} HTTP/1.1", "Host: HOST", f"Origin: {origin}", "Sec-Fetch-Site: cross-site", *fields]
    async with RawClient.to(proxy.origin) as client:
        client.send("\n".join([*lines, f"Content-Length: {len(body)}", "", ""]))
        client.send(body)
        return await client.answer()


def cors_of(answer: RawResponse) -> list[tuple[str, str]]:
    return [(name, value) for name, value in answer.headers if name.startswith("access-control-") or name == "vary"]


READABLE = [
    ("vary", "Origin"),
    ("access-control-allow-origin", PAGE),
    ("access-control-expose-headers", "Mcp-Session-Id, WWW-Authenticate, Retry-After"),
]


@pytest.mark.parametrize("path", ["/notes/mcp", "/mcp", "/unknown/mcp"])
async def test_a_preflight_is_answered_without_the_server(servers: Servers, tmp_path: Path, path: str) -> None:
    async with connected(servers, tmp_path, inbound=INBOUND) as setup:
        fields = "Access-Control-Request-Method: POST\nAccess-Control-Request-Headers: content-type,X-Mine, mcp-param-a"
        answer = await ask(setup.proxy, f"OPTIONS {path}\n{fields}")
        found = dict(cors_of(answer))
        assert (answer.status, answer.body, cors_of(answer)[-len(READABLE) :]) == (204, b"", READABLE)
        assert found["access-control-allow-methods"] == "GET, POST, DELETE"
        allowed = found["access-control-allow-headers"].split(", ")
        assert {"accept", "authorization", "content-type", "last-event-id", "mcp-method", "mcp-name"} < set(allowed)
        assert {"mcp-protocol-version", "mcp-session-id", "traceparent", "x-mine", "mcp-param-a"} < set(allowed)
        assert len(allowed) == len(set(allowed))
        assert 0 < int(found["access-control-max-age"]) <= 7200
        assert not {"access-control-allow-credentials", "access-control-allow-private-network"} & set(found)
        answer = await ask(setup.proxy, f"OPTIONS {path}\nAccess-Control-Request-Private-Network: true")
        assert dict(cors_of(answer))["access-control-allow-private-network"] == "true"
        assert setup.upstream.requests == []


async def test_nothing_that_a_page_asks_for_becomes_another_field(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path, inbound=INBOUND) as setup:
        asked = "Access-Control-Request-Headers: *, a b, x:y, , good"
        allowed = dict(cors_of(await ask(setup.proxy, f"OPTIONS /notes/mcp\n{asked}")))["access-control-allow-headers"]
        assert allowed.endswith("x-api-key, good")


async def test_the_servers_own_word_about_pages_does_not_reach_them(servers: Servers, tmp_path: Path) -> None:
    own = (
        ("access-control-allow-origin", "*"),
        ("access-control-allow-credentials", "true"),
        ("access-control-expose-headers", "x-more"),
        ("vary", "accept-encoding"),
        ("x-more", "1"),
    )
    options = {"response_headers": own}
    async with connected(servers, tmp_path, inbound=INBOUND, options=options) as setup:
        for _ in range(2):  # the second request has a connection and a token ready
            answer = await ask(setup.proxy, "POST /notes/mcp\nContent-Type: application/json", CALL)
            assert answer.status == 200
            assert [field for field in cors_of(answer) if field != ("vary", "accept-encoding")] == READABLE
            assert ("x-more", "1") in answer.headers
        assert setup.upstream.calls("tools/call")[-1].header("origin") is None
        # What is no page's request is as before.
        plain = await setup.client.post("tools/call", {"name": "echo"})
        assert plain.headers["access-control-allow-origin"] == "*"


async def test_every_answer_of_the_proxy_to_an_allowed_page_can_be_read(tmp_path: Path) -> None:
    async def challenge(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    async with RawServer(challenge) as refusing:
        config = {"notes": NOWHERE, "refusing": refusing.url}
        async with running_proxy(tmp_path, config, inbound=INBOUND, limits={"body": "1kB"}) as proxy:
            for request, body, status in (
                ("POST /notes/mcp", CALL, 502),
                ("POST /refusing/mcp", CALL, 403),
                ("POST /notes/mcp", CALL + b" " * 1000, 413),
                ("POST /unknown/mcp", CALL, 404),
                ("POST /notes%2fmcp", CALL, 403),
                ("POST /no%2ftes/mcp", CALL, 400),
                ("DELETE /notes/mcp", b"", 502),
                ("GET /notes/mcp", b"", 502),
            ):
                answer = await ask(proxy, request, body)
                readable = READABLE if request.endswith("/mcp") else []
                assert (answer.status, cors_of(answer)) == (status, readable), request
            proxy.application.forwarder.ended = True
            assert cors_of(await ask(proxy, "POST /notes/mcp", CALL)) == READABLE


@pytest.mark.parametrize(
    "origin", ["http://localhost:6275", "https://localhost:6274", "http://LOCALHOST:6274", f"{PAGE}/", "null"]
)
@pytest.mark.parametrize("method", ["OPTIONS", "POST", "GET", "DELETE"])
async def test_any_other_origin_is_refused_by_an_error_that_names_the_key(
    tmp_path: Path, origin: str, method: str
) -> None:  # T41
    async with running_proxy(tmp_path, {"notes": NOWHERE}, inbound=INBOUND) as proxy:
        answer = await ask(proxy, f"{method} /notes/mcp", origin=origin)
        assert (answer.status, cors_of(answer)) == (403, [("vary", "Origin")])
        assert b"inbound.allowed_origins" in answer.body
        twice = await ask(proxy, f"{method} /notes/mcp\nOrigin: {PAGE}")
        assert (twice.status, cors_of(twice)) == (403, [("vary", "Origin")])


async def test_what_a_cache_may_keep_says_that_it_depends_on_the_origin(servers: Servers, tmp_path: Path) -> None:
    kept = {"response_headers": (("cache-control", "max-age=60"), ("access-control-allow-origin", "*"))}
    async with (
        connected(servers, tmp_path, inbound=INBOUND, options=kept) as setup,
        RawClient.to(setup.proxy.origin) as client,
    ):
        client.send("GET /notes/mcp HTTP/1.1\nHost: HOST\n\n")
        assert cors_of(await client.answer()) == [("vary", "Origin")]


@pytest.mark.parametrize("path", ["/", "/api/v1/servers", "/connect/notes", "/oauth/callback", "/healthz", "/x/y"])
async def test_only_the_endpoints_are_open_to_an_allowed_page(tmp_path: Path, path: str) -> None:  # T41
    async with running_proxy(tmp_path, {"notes": NOWHERE}, inbound=INBOUND) as proxy:
        for method in ("GET", "OPTIONS", "POST"):
            answer = await ask(proxy, f"{method} {path}")
            assert (answer.status, cors_of(answer)) == (403, [])
            assert b"allowed_origins" not in answer.body


async def test_an_allowed_page_under_a_foreign_host_is_refused(tmp_path: Path) -> None:  # T41
    async with (
        running_proxy(tmp_path, {"notes": NOWHERE}, inbound=INBOUND) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.send(f"POST /notes/mcp HTTP/1.1\nHost: evil.example\nOrigin: {PAGE}\nContent-Length: 0\n\n")
        assert (await client.answer()).status == 421


async def test_a_reload_adds_and_removes_origins(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {"notes": NOWHERE}) as proxy:
        for origins, status in (([], 403), ([PAGE], 204), ([], 403)):
            sections: Any = {"inbound": {"allowed_origins": origins}}
            change = compare(proxy.application.settings, load(write_config(tmp_path, {"notes": NOWHERE}, **sections)))
            proxy.application.apply(change)
            answer = await ask(proxy, "OPTIONS /notes/mcp")
            # Without the key, nothing depends on the origin of a page.
            assert (answer.status, bool(cors_of(answer))) == (status, bool(origins))


SESSION = """async ([url, call]) => {
    const accept = 'application/json, text/event-stream';
    const headers = {'content-type': 'application/json', accept, 'mcp-protocol-version': '2025-11-25'};
    const post = message => fetch(url, {method: 'POST', headers, body: JSON.stringify({jsonrpc: '2.0', ...message})});
    const params = {protocolVersion: '2025-11-25', capabilities: {}, clientInfo: {name: 'page', version: '1'}};
    const started = await post({id: 1, method: 'initialize', params});
    const heard = {server: (await started.json()).result.serverInfo.name};
    headers['mcp-session-id'] = heard.session = started.headers.get('mcp-session-id');
    await post({method: 'notifications/initialized'});
    heard.result = await (await fetch(url, {method: 'POST', headers, body: call})).json();
    const stream = await fetch(url, {headers: {...headers, accept: 'text/event-stream'}});
    window.first = stream.body.getReader().read().then(part => new TextDecoder().decode(part.value));
    heard.type = stream.headers.get('content-type');
    return heard;
}"""
"""What a client in a page does: a session, a call, and the stream of the session."""

ECHO = '{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"echo","arguments":{"text":"hello"}}}'


@pytest.mark.chromium
async def test_a_page_in_a_browser_uses_a_server_if_its_origin_is_allowed(
    servers: Servers, tmp_path: Path
) -> None:  # T41
    async with website("<p>a client</p>") as port, chromium() as browser:
        inbound = {"allowed_origins": [f"http://localhost:{port}"]}
        async with connected(servers, tmp_path, inbound=inbound, options={"sessions_on": True}) as setup:
            page = await browser.new_page()
            url = f"{setup.proxy.origin}/notes/mcp"
            await page.goto(f"http://localhost:{port}/")
            heard = await page.evaluate(SESSION, [url, ECHO])
            assert heard["session"] in setup.upstream.sessions
            assert (heard["result"]["result"]["content"][0]["text"], heard["type"]) == ("hello", "text/event-stream")
            await until(lambda: setup.upstream.push({"jsonrpc": "2.0", "method": "notifications/news"}), "a stream")
            assert "notifications/news" in await page.evaluate("first")
            assert await page.evaluate(
                "async ([url, id]) => (await fetch(url, {method: 'DELETE', headers: {'mcp-session-id': id}})).status",
                [url, heard["session"]],
            ) in (200, 204)
            before = len(setup.upstream.requests)
            for foreign in (f"http://127.0.0.1:{port}/", f"http://{EVIL}:{port}/"):
                await page.goto(foreign)
                with pytest.raises(Exception, match="Failed to fetch"):
                    await page.evaluate(SESSION, [url, ECHO])
            assert len(setup.upstream.requests) == before
