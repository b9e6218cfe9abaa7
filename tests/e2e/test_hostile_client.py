"""Hostile clients: paths that are not canonical, broken framing, foreign Hosts and Origins, and slow requests."""

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.proxy import RunningProxy, Sections, link_in, proxy_process, running_proxy, until, write_config
from fakes.raw_client import RawClient
from fakes.unattended import connected
from mcp_auth_proxy.config.settings import Address

PING = json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping"}).encode()
LENGTH = f"Content-Length: {len(PING)}\n\n{PING.decode()}"
ROUTES = (
    "/notes/mcp",
    "/mcp",
    "/none/mcp",
    "/",
    "/healthz",
    "/readyz",
    "/connect/notes",
    "/oauth/callback",
    "/nowhere",
)


async def status_of(proxy: RunningProxy, request: str | bytes) -> int:
    """Send one request on a connection of its own."""
    async with RawClient.to(proxy.origin) as raw:
        raw.send(request)
        return (await raw.head())[0]


async def test_paths_that_are_not_canonical_are_400(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:  # T27
        for target in (
            "//evil/mcp",
            "//notes/mcp",
            "/notes//mcp",
            "/notes/../notes/mcp",
            "/./notes/mcp",
            "/notes/mcp/..",
            "/x/%2e%2e/notes/mcp",
            "/x/%2E./notes/mcp",
            "/notes%2Fmcp",
            "/notes%2fmcp",
            "/notes%5Cmcp",
            "/notes\\mcp",
            "/notes/mcp%00",
            "http://evil.example/notes/mcp",
            "http://HOST/notes/mcp",
            "https:/notes/mcp",
            "notes/mcp",
            "*",
            "/notes/mcp#fragment",
        ):
            assert await status_of(setup.proxy, f"POST {target} HTTP/1.1\nHost: HOST\n{LENGTH}") == 400, target
            assert await status_of(setup.proxy, f"GET {target} HTTP/1.1\nHost: HOST\n\n") == 400, target
        assert await status_of(setup.proxy, "CONNECT evil.example:443 HTTP/1.1\nHost: HOST\n\n") == 400
        for target in ("/%6eotes/mcp", "/notes/mcp/", "/NOTES/mcp", "/notes/mcp;x"):
            assert await status_of(setup.proxy, f"POST {target} HTTP/1.1\nHost: HOST\n{LENGTH}") == 404, target
    assert setup.upstream.requests == []


BROKEN: dict[str, str | bytes] = {
    "length and chunked": f"POST /mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: chunked\n{LENGTH}",  # T25
    "two lengths": f"POST /mcp HTTP/1.1\nHost: HOST\nContent-Length: 1\n{LENGTH}",
    "the same length twice": f"POST /mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(PING)}\n{LENGTH}",
    "a list of lengths": "POST /mcp HTTP/1.1\nHost: HOST\nContent-Length: 1, 1\n\nx",
    "a signed length": "POST /mcp HTTP/1.1\nHost: HOST\nContent-Length: +1\n\nx",
    "another coding": "POST /mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: gzip, chunked\n\n0\n\n",
    "chunked twice": "POST /mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked\n\n0\n\n",
    "chunked in 1.0": "POST /mcp HTTP/1.0\nHost: HOST\nTransfer-Encoding: chunked\n\n0\n\n",
    "a bad chunk size": "POST /mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: chunked\n\nzz\nhello\n0\n\n",
    "no Host": f"POST /mcp HTTP/1.1\n{LENGTH}",  # T26
    "no Host in 1.0": f"POST /mcp HTTP/1.0\n{LENGTH}",
    "two Hosts": f"POST /mcp HTTP/1.1\nHost: HOST\nHost: evil.example\n{LENGTH}",
    "the same Host twice": f"POST /mcp HTTP/1.1\nHost: HOST\nHost: HOST\n{LENGTH}",
    "a folded field": f"POST /mcp HTTP/1.1\nHost: HOST\nX-A: 1\n folded\n{LENGTH}",
    "bare line feeds": f"POST /mcp HTTP/1.1\nHost: HOST\n{LENGTH}".replace("HOST", "127.0.0.1").encode(),
    "a bare carriage return": f"POST /mcp HTTP/1.1\nHost: HOST\nX-A: 1\rX-B: 2\n{LENGTH}",
    "space before the colon": f"POST /mcp HTTP/1.1\nHost: HOST\nX-A : 1\n{LENGTH}",
    "NUL in a value": f"POST /mcp HTTP/1.1\nHost: HOST\nX-A: 1\x002\n{LENGTH}",
    "no name": f"POST /mcp HTTP/1.1\nHost: HOST\n: 1\n{LENGTH}",
    "RTSP": f"POST /notes/mcp RTSP/1.0\nHost: HOST\n{LENGTH}",  # T88
    "RTSP with the version of HTTP": f"GET /notes/mcp RTSP/1.1\nHost: HOST\n{LENGTH}",
    "ICE": f"SOURCE /notes/mcp ICE/1.0\nHost: HOST\n{LENGTH}",
    "HTTP/2.0": f"POST /notes/mcp HTTP/2.0\nHost: HOST\n{LENGTH}",
    "another version": f"POST /mcp HTTP/3.0\nHost: HOST\n{LENGTH}",
    "no HTTP": "EHLO example.com\n\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
}


async def test_requests_that_break_http_are_400_and_close_the_connection(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        for name, request in BROKEN.items():
            async with RawClient.to(setup.proxy.origin) as raw:
                raw.send(request)
                assert (await raw.head())[0] in (400, 501), name
                await raw.rest(2)
        assert setup.upstream.requests == []
        assert (await setup.client.post("ping")).status == 200


async def test_heads_over_the_limits_are_431(servers: Servers, tmp_path: Path) -> None:
    start = "POST /notes/mcp HTTP/1.1\nHost: HOST\n"
    async with connected(servers, tmp_path) as setup:  # T28
        for fields in (f"X-A: {'a' * 70_000}\n", "X-A: b\n" * 5000, f"{'x' * 70_000}: a\n"):
            assert await status_of(setup.proxy, start + fields + LENGTH) == 431
        assert await status_of(setup.proxy, start + "X-A: b\n" * 150 + LENGTH) == 200
        long_target = f"GET /notes/mcp?{'a' * 70_000} HTTP/1.1\nHost: HOST\n\n"
        assert await status_of(setup.proxy, long_target) in (400, 414, 431)
        async with RawClient.to(setup.proxy.origin) as raw:  # endless, without ever a line break
            raw.send("GET /notes/mcp HTTP/1.1\nHost: HOST\nX-A: ")
            raw.send(b"a" * 200_000)
            await raw.rest(2)
    assert len(setup.upstream.calls("ping")) == 2


async def test_trailers_are_not_taken_for_header_fields(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        for trailer in (
            *("Host: evil.example", "Origin: http://evil.example", "Connection: authorization", "X-A: b"),
            *("X-Remote-User: root", "X_Original_Url: /admin"),  # T88
        ):
            raw.send("POST /notes/mcp HTTP/1.1\nHost: HOST\nTransfer-Encoding: chunked\n\n")
            raw.send(b"%x\r\n%s\r\n" % (len(PING), PING))
            raw.send(f"0\n{trailer}\nMcp-Session-Id: late\n\n")
            assert (await raw.answer()).status == 200
            seen = setup.upstream.calls("ping")[-1]
            assert [seen.header(name) for name in ("mcp-session-id", "x-remote-user", "x_original_url")] == [None] * 3
            assert setup.upstream.find_token(setup.upstream.bearers[-1]) is not None


async def test_what_follows_a_request_is_never_part_of_another(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup, RawClient.to(setup.proxy.origin) as raw:
        for number in range(5):  # pipelined
            message = json.dumps({"jsonrpc": "2.0", "id": number, "method": "ping"}).encode()
            raw.post(message)
        answers = [json.loads((await raw.answer()).body)["id"] for _ in range(5)]
        assert answers == list(range(5))
        smuggled = b"GET /connect/notes HTTP/1.1\r\nHost: evil\r\n\r\n"
        raw.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(smuggled)}\n\n")
        raw.send(smuggled)
        await raw.answer()
    assert setup.upstream.calls()[-1].body == smuggled


async def test_a_method_that_echoes_the_token_is_refused(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:
        await setup.client.post("ping")
        before = len(setup.upstream.requests)
        assert await status_of(setup.proxy, "TRACE /notes/mcp HTTP/1.1\nHost: HOST\n\n") in (405, 501)
    assert len(setup.upstream.requests) == before


async def test_upgrades_are_not_supported(servers: Servers, tmp_path: Path) -> None:
    upgrade = "Connection: Upgrade, HTTP2-Settings\nUpgrade: {}\nHTTP2-Settings: AAMAAABkAAQ\n"
    async with connected(servers, tmp_path) as setup:
        for protocol in ("websocket", "h2c"):
            fields = upgrade.format(protocol)
            assert await status_of(setup.proxy, f"POST /notes/mcp HTTP/1.1\nHost: HOST\n{fields}{LENGTH}") == 200
    for seen in setup.upstream.calls("ping"):
        assert (seen.header("upgrade"), seen.header("http2-settings"), seen.body) == (None, None, PING)


# Hosts and Origins


async def test_a_foreign_host_is_refused_on_every_route(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:  # T41
        port = setup.proxy.origin.rpartition(":")[2]
        for path in ROUTES:
            for method in ("GET", "POST", "DELETE"):
                for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "127.0.0.1@evil", ""):
                    request = f"{method} {path} HTTP/1.1\nHost: {host}\nContent-Length: 0\n\n"
                    assert await status_of(setup.proxy, request) in (400, 403, 421), (path, method, host)
        assert setup.upstream.requests == []
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "Localhost"):
            assert await status_of(setup.proxy, f"GET /healthz HTTP/1.1\nHost: {host}\n\n") == 200, host


async def test_a_foreign_origin_is_refused_on_every_route(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:  # T41
        port = setup.proxy.origin.rpartition(":")[2]
        evil = ["http://evil.example", "null", f"http://127.0.0.1.evil.example:{port}", "file://", "", "https://evil"]
        two = f"{setup.proxy.origin}\nOrigin: http://evil.example"
        for path in ROUTES:
            for origin in (*evil, two, f"{setup.proxy.origin}, http://evil.example"):
                for method in ("GET", "POST", "OPTIONS"):
                    request = f"{method} {path} HTTP/1.1\nHost: HOST\nOrigin: {origin}\nContent-Length: 0\n\n"
                    assert await status_of(setup.proxy, request) == 403, (path, origin)
        assert setup.upstream.requests == []
        own = f"POST /notes/mcp HTTP/1.1\nHost: HOST\nOrigin: {setup.proxy.origin}\n{LENGTH}"
        assert await status_of(setup.proxy, own) == 200


async def test_cross_origin_writes_to_pages_are_403(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as setup:  # T42
        port = setup.proxy.origin.rpartition(":")[2]
        for path in ("/", "/connect/notes", "/oauth/callback", "/api/v1/servers", "/api/v1/unknown", "/nowhere"):
            for fields in (f"Origin: http://localhost:{int(port) ^ 1}", "Sec-Fetch-Site: cross-site", "Origin: null"):
                request = f"POST {path} HTTP/1.1\nHost: HOST\n{fields}\nContent-Length: 0\n\n"
                assert await status_of(setup.proxy, request) == 403, (path, fields)


async def test_on_other_addresses_hosts_are_listed_and_probes_exempt(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    sections: Sections = {
        "inbound": {"allowed_hosts": ["proxy.team.example"]},
        "public_url": "https://public.example:8000",
    }
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with running_proxy(tmp_path, {"notes": upstream.url}, listen=Address("0.0.0.0", port), **sections) as proxy:
        proxy.origin = f"http://127.0.0.1:{port}"
        for host in ("10.1.2.3:8787", "anything"):
            for path in ("/healthz", "/readyz"):
                assert await status_of(proxy, f"GET {path} HTTP/1.1\nHost: {host}\n\n") == 200
            for path in ("/", "/notes/mcp", "/connect/notes", "/oauth/callback"):
                assert await status_of(proxy, f"GET {path} HTTP/1.1\nHost: {host}\n\n") in (403, 421)
        for host in ("proxy.team.example", "proxy.team.example:8787", "public.example:8000"):
            assert await status_of(proxy, f"POST /notes/mcp HTTP/1.1\nHost: {host}\n{LENGTH}") == 200
        assert await status_of(proxy, "GET /healthz HTTP/1.1\nHost: x\nOrigin: http://evil.example\n\n") in (200, 403)


async def test_decisions_are_based_on_the_body_not_on_mirrored_headers(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with (
        running_proxy(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"}) as proxy,
        proxy.client("notes") as client,
    ):  # T50
        for lie in ("tools/list", "ping", "initialize"):
            reply = await client.post(
                "tools/call", {"name": "echo", "arguments": {}}, headers={"mcp-method": lie, "mcp-name": "other"}
            )
            assert reply.result["isError"] is True
            assert link_in(reply.message)
        listed = await client.post("tools/list", headers={"mcp-method": "tools/call"})
        assert "authorization_url" in listed.error["data"]


# Patience


async def test_clients_that_stall_are_closed_within_ten_seconds(servers: Servers, tmp_path: Path) -> None:
    async def drip(raw: RawClient, text: str) -> None:
        for byte in text * 100:
            raw.send(byte.encode())
            await asyncio.sleep(1)

    head = "POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: 1000\n\n"
    send_timeout = {
        "silence": ("", ""),
        "half a head": ("POST /notes/mcp HTTP/1.1\nHost: HOST\nX-A: ", ""),
        "a head that drips": ("POST /notes/mcp HTTP/1.1\nHost: HOST\nX-A: ", "a"),
        "no body": (head, ""),
        "a body that drips": (head, "a"),
        "chunks that drip": (head.replace("Content-Length: 1000", "Transfer-Encoding: chunked"), "1\r\na\r\n"),
        "line breaks only": ("", "\r\n"),
        "line breaks after a request": (f"POST /notes/mcp HTTP/1.1\nHost: HOST\n{LENGTH}", "\r\n"),
    }

    async def closed_after(origin: str, start: str, then: str) -> float:
        async with RawClient.to(origin) as raw:
            begun = time.monotonic()
            raw.send(start)
            dripping = asyncio.create_task(drip(raw, then))
            try:
                await raw.rest(12)
            finally:
                dripping.cancel()
            return time.monotonic() - begun

    async with connected(servers, tmp_path) as setup:  # T29
        await setup.client.post("ping")
        lives = await asyncio.gather(
            *(closed_after(setup.proxy.origin, *stall) for stall in send_timeout.values()), return_exceptions=True
        )
        assert {name: life for name, life in zip(send_timeout, lives, strict=True) if not 0 < _number(life) < 10} == {}
        assert (await setup.client.call("echo", text="others go on")).text == "others go on"
        await until(lambda: setup.proxy.application.forwarder.active_requests == 0)


def _number(value: float | BaseException) -> float:
    return value if isinstance(value, float) else -1


REFUSED = {
    "another protocol (400)": "OPTIONS /notes/mcp RTSP/1.0\nHost: HOST\n\n",  # T88
    "not exactly one Host (RFC 9112 §3.2) (400)": "GET /mcp HTTP/1.1\nHost: HOST\nHost: HOST\n\n",  # T26
    "not HTTP/1.1 (400)": "POST /mcp HTTP/1.1\nHost: HOST\nContent-Length: 1\nContent-Length: 2\n\n{",  # T25
    "the head is too long (431)": "GET /mcp HTTP/1.1\nHost: HOST\nX-A: " + "a" * 70_000,  # T28
    "The path is not in canonical form (400)": "GET /notes/../mcp HTTP/1.1\nHost: HOST\n\n",  # T27
    "inbound.allowed_origins (403)": "GET /mcp HTTP/1.1\nHost: HOST\nOrigin: http://evil\n\n",  # T41
    "is not a name of this proxy": "GET /mcp HTTP/1.1\nHost: NUMBER.evil.example\n\n",  # T41
}


@pytest.mark.parametrize("reason", REFUSED)
async def test_one_line_a_minute_names_who_sends_what_is_refused(
    servers: Servers, tmp_path: Path, reason: str
) -> None:  # T79
    upstream = await servers.mcp_server(protected=False)
    async with proxy_process(write_config(tmp_path, {"notes": upstream.url})) as proxy:
        for number in range(20):
            async with RawClient.to(proxy.origin) as raw:
                raw.send(REFUSED[reason].replace("NUMBER", str(number)))
                assert (await raw.head())[0] >= 400
        await until(lambda: "refused" in proxy.err, "a log line")
        (line,) = [line for line in proxy.err.splitlines() if "refused" in line]
        assert "client 127.0.0.1 sent a request that is refused: " in line
        assert reason in line
        assert len(line) <= 400
