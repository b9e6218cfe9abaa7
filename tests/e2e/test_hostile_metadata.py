"""Hostile servers and authorization servers: each document is refused by name and rule, and no secret is sent."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser, consent
from fakes.hostile import assert_refused, honeypot
from fakes.http_exchange import ABSENT, FakeResponse, RecordedRequest
from fakes.mcp_client import McpResponse
from fakes.mcp_server import CHUNK, WELL_KNOWN
from fakes.proxy import RunningProxy, link_in, proxy_process, running_proxy, until, write_config
from fakes.proxy_setup import ProxySetup, proxy_setup
from mcp_auth_proxy.broker import planning

RESOURCE, SERVER = "protected resource metadata", "authorization server metadata"
PRIVATE = [
    "169.254.169.254",
    "[64:ff9b::a9fe:a9fe]",
    "192.0.0.192",
    "100.64.0.1",
    "10.0.0.1",
    "[fd00::1]",
    "168.63.129.16",
    "0xa83f8110",
    "[fd00:ec2::254]",
    "[::ffff:100.100.100.200]",
]


async def refused_quickly(setup: ProxySetup, *words: str) -> None:
    async with asyncio.timeout(5):
        assert_refused(await setup.ask(), *words)
    assert setup.proxy.links == []
    setup.skip_pause()


def challenge_naming(url: str) -> dict[int, list[str]]:
    return {401: [f'Bearer resource_metadata="{url}"']}


# where documents may lead


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_challenge_leads_to_no_private_address(  # T1, T2, T89
    servers: Servers, tmp_path: Path, host: str, scheme: str
) -> None:
    url = f"{scheme}://{host}/latest/meta-data"
    async with proxy_setup(servers, tmp_path, upstream={"challenges": challenge_naming(url)}) as setup:
        rule = "authorization.allow_private" if scheme == "https" else "http"
        await refused_quickly(setup, RESOURCE, url, rule)
        assert setup.issuer.requests == []
        setup.upstream.challenges.clear()
        await setup.connect()


@pytest.mark.parametrize("host", PRIVATE)
async def test_resource_metadata_leads_to_no_private_address(servers: Servers, tmp_path: Path, host: str) -> None:  # T1
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.metadata_changes = {"authorization_servers": [f"https://{host}"]}
        await refused_quickly(setup, SERVER, f"https://{host}", "authorization.allow_private")
        assert setup.issuer.requests == []


async def test_registration_leads_to_no_private_address(servers: Servers, tmp_path: Path) -> None:  # T1
    async with proxy_setup(servers, tmp_path) as setup:
        setup.issuer.metadata_changes = {"registration_endpoint": "https://169.254.169.254/register"}
        await refused_quickly(setup, "client registration", "169.254.169.254", "authorization.allow_private")


async def test_a_code_goes_to_no_private_address(servers: Servers, tmp_path: Path) -> None:  # T1
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        setup.issuer.metadata_changes = {"token_endpoint": "https://169.254.169.254/token"}
        call = asyncio.create_task(setup.ask())
        page = await consent(await setup.proxy.next_link())
        assert page.status_code >= 400
        assert "169.254.169.254" in page.text
        assert_refused(await call, "169.254.169.254", "authorization.allow_private")


SPELLINGS = ["127.0.0.1", "0x7f.1", "2130706433", "0177.0.0.1", "localhost", "[::ffff:127.0.0.1]", "①②⑦.⓪.⓪.①"]


@pytest.mark.parametrize("host", SPELLINGS)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_server_elsewhere_can_not_lead_to_loopback(  # T1, T2
    servers: Servers, tmp_path: Path, host: str, scheme: str
) -> None:
    """0.0.0.0 reaches this machine, but is not a loopback address: to the rules it is a server elsewhere."""
    upstream = await servers.mcp_server()
    upstream.origin = upstream.origin.replace("127.0.0.1", "0.0.0.0")
    config: dict[str, Any] = {"notes": {"url": upstream.url, "allow_http": True}}
    async with honeypot() as setup, running_proxy(tmp_path, config) as proxy, proxy.client("notes") as client:
        url = f"{scheme}://{host}:{setup.port}"
        upstream.metadata_changes = {"authorization_servers": [url]}
        assert_refused(await client.call("echo"))
        if host.isascii():
            upstream.challenges = challenge_naming(f"{url}{WELL_KNOWN}")
            assert_refused(await client.call("echo"))
        assert setup.visits == []
        assert proxy.links == []
    assert upstream.calls("tools/call")


@pytest.mark.parametrize("status", [301, 302, 307])
async def test_no_document_redirects(servers: Servers, tmp_path: Path, status: int) -> None:  # T4
    async with honeypot() as target, proxy_setup(servers, tmp_path) as setup:
        for location in ("http://10.0.0.1/", f"http://127.0.0.1:{target.port}/"):
            before = len(setup.upstream.metadata_requests)
            setup.upstream.metadata_answer = FakeResponse.redirect(location, status)
            await refused_quickly(setup, RESOURCE, str(status))
            assert len(setup.upstream.metadata_requests) == before + 1
        setup.upstream.metadata_answer = None
        setup.issuer.answers["metadata"] = FakeResponse.redirect(f"http://127.0.0.1:{target.port}/", status)
        await refused_quickly(setup, SERVER, str(status))
        assert (setup.issuer.discoveries, target.visits) == (1, [])


@pytest.mark.parametrize("value", [WELL_KNOWN, f"//elsewhere.example{WELL_KNOWN}", "metadata.json", "?x=1", "%"])
async def test_a_relative_resource_metadata_is_ignored_and_logged(
    servers: Servers, tmp_path: Path, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_setup(servers, tmp_path, upstream={"challenges": challenge_naming(value)}) as setup:
        await setup.connect()
        assert setup.issuer.registrations == 1
    logged = [record.getMessage() for record in caplog.records if "RFC 9728 §5.1" in record.getMessage()]
    assert len(logged) == 1
    assert "notes" in logged[0]
    assert value in logged[0]


@pytest.mark.parametrize("url", ["javascript:alert(1)", "file:///etc/passwd", "https://", "ftp://as.example/x"])
async def test_an_absolute_url_that_must_not_be_fetched_stays_refused(
    servers: Servers, tmp_path: Path, url: str
) -> None:
    async with proxy_setup(servers, tmp_path, upstream={"challenges": challenge_naming(url)}) as setup:
        await refused_quickly(setup, RESOURCE, url)
        assert setup.issuer.requests == []


# what documents may say


ENDPOINTS = ["authorization_endpoint", "token_endpoint", "registration_endpoint", "revocation_endpoint"]
BAD_URLS = [
    "javascript:alert(1)",
    "file:///etc/passwd",
    "http://as.example/x",
    "https://user:pw@as.example/x",
    "https://as.example/x#fragment",
    "data:text/html,x",
    "//as.example/x",
    "https://",
    "https://as.example/\nx",
    "https://as.example/`id`",
]


@pytest.mark.parametrize("url", BAD_URLS)
async def test_an_endpoint_that_must_not_be_opened_is_refused(servers: Servers, tmp_path: Path, url: str) -> None:  # T5
    async with proxy_setup(servers, tmp_path) as setup:
        for endpoint in ENDPOINTS:
            setup.issuer.metadata_changes = {endpoint: url}
            await refused_quickly(setup, SERVER, endpoint, setup.issuer.issuer, "RFC 8414")
        assert {request.endpoint for request in setup.issuer.requests} == {"metadata"}


async def test_no_shell_sees_what_a_server_says(servers: Servers, tmp_path: Path) -> None:  # T6
    marker, seen, browser = tmp_path / "pwned", tmp_path / "seen", tmp_path / "browser.sh"
    browser.write_text(f'#!/bin/sh\nfor it in "$@"; do echo "$it" >> {seen}; done\n')
    browser.chmod(0o755)
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    issuer.metadata_changes = {"authorization_endpoint": f"{issuer.issuer}/$(touch$IFS{marker});touch$IFS{marker}&x"}
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s", "open_browser": "always"})
    async with proxy_process(config, env={"BROWSER": str(browser)}) as proxy, proxy.client("notes") as client:
        link = link_in((await client.call("echo")).message)
        await until(seen.exists, "the browser")
        async with Browser() as user:
            assert "$(touch" in (await user.open(link)).headers["location"]
    assert seen.read_text().splitlines() == [link]
    assert not marker.exists()


def other_resources(url: str) -> dict[str, object]:
    return {
        "another origin": "https://other.example/mcp",
        "another port": "http://127.0.0.1:1/mcp",
        "another scheme": url.replace("http:", "https:"),
        "a sibling": f"{url}2",
        "part of a segment": url[:-1],
        "beneath": f"{url}/sub",
        "with a user": url.replace("://", "://user@"),
        "with a fragment": f"{url}#x",
        "no text": 7,
        "absent": ABSENT,
    }


@pytest.mark.parametrize("kind", other_resources(""))
async def test_metadata_of_another_resource_ends_the_authorization(  # T7
    servers: Servers, tmp_path: Path, kind: str
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.metadata_changes = {"resource": other_resources(setup.upstream.url)[kind]}
        await refused_quickly(setup, RESOURCE, "resource", "RFC 9728")
        assert setup.issuer.requests == []


ISSUERS: dict[str, Callable[[str], str]] = {
    "slash": lambda issuer: f"{issuer}/",
    "capitals": lambda issuer: issuer.replace("http", "HTTP"),
    "another port": lambda issuer: f"{issuer}0",
    "default port": lambda issuer: "http://127.0.0.1:80",
    "path": lambda issuer: f"{issuer}/tenant",
    "another host": lambda issuer: issuer.replace("127.0.0.1", "localhost"),
}


@pytest.mark.parametrize("other", ISSUERS.values(), ids=ISSUERS)
async def test_an_issuer_is_compared_by_its_characters(
    servers: Servers, tmp_path: Path, other: Callable[[str], str]
) -> None:  # T8
    async with proxy_setup(servers, tmp_path) as setup:
        setup.issuer.metadata_changes = {"issuer": other(setup.issuer.issuer)}
        await refused_quickly(setup, SERVER, "issuer", "RFC 8414")
        setup.issuer.metadata_changes = {}
        setup.upstream.metadata_changes = {"authorization_servers": [f"{setup.issuer.issuer}/"]}
        await refused_quickly(setup, SERVER, "issuer", "RFC 8414")
        assert setup.issuer.registrations == setup.issuer.authorizations == 0


@pytest.mark.parametrize("methods", [ABSENT, ["plain"], [], ["s256"]], ids=str)
async def test_without_s256_there_is_no_authorization_unless_the_operator_allows_it(  # T10
    servers: Servers, tmp_path: Path, methods: object
) -> None:
    options = {"metadata_changes": {"code_challenge_methods_supported": methods}}
    async with proxy_setup(servers, tmp_path, issuer=options) as setup:
        await refused_quickly(setup, "S256", "servers.notes.oauth.allow_missing_pkce", setup.issuer.issuer)
        assert setup.issuer.authorizations == 0
    async with proxy_setup(servers, tmp_path, issuer=options, oauth={"allow_missing_pkce": True}) as setup:
        await setup.connect()


NOT_DOCUMENTS = {
    "html": b"<html>",
    "a list": b"[]",
    "nothing": b"",
    "cut short": b'{"issuer": "http',
    "not UTF-8": b'{"issuer": "\xff"}',
    "NaN": b'{"issuer": NaN}',
    "deep": b'{"issuer": ' + b"[" * 100_000,
    "other types": b'{"issuer": [], "resource": {}, "authorization_servers": "x", "token_endpoint": 1}',
    "nulls": b'{"issuer": null, "resource": null, "authorization_servers": null}',
}


@pytest.mark.parametrize("body", NOT_DOCUMENTS.values(), ids=NOT_DOCUMENTS)
async def test_a_malformed_document_is_named_with_its_address_and_clause(
    servers: Servers, tmp_path: Path, body: bytes
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.metadata_answer = FakeResponse(body=body)
        await refused_quickly(setup, RESOURCE, f"{setup.upstream.origin}{WELL_KNOWN}", "RFC 9728")
        setup.upstream.metadata_answer = None
        setup.issuer.answers["metadata"] = FakeResponse(body=body)
        await refused_quickly(setup, SERVER, setup.issuer.issuer, "RFC 8414")
        del setup.issuer.answers["metadata"]
        await setup.connect()


NOT_OBJECTS = {
    "a page": b"<html>",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "UTF-16": '{"issuer": "x"}'.encode("utf-16"),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/OAuth+JSON"])
@pytest.mark.parametrize("body", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
async def test_json_that_is_not_an_object_is_reported_with_its_url(
    servers: Servers, tmp_path: Path, body: bytes, kind: str
) -> None:
    answer = FakeResponse(headers=(("content-type", kind),), body=body)
    async with proxy_setup(servers, tmp_path, upstream={"challenges": {401: ["Bearer"]}}) as setup:
        setup.upstream.metadata_answer = answer
        await refused_quickly(setup, f"{RESOURCE} at {setup.upstream.origin}{WELL_KNOWN}", "it is ", "RFC 9728 §3.2")
        setup.upstream.metadata_answer = None
        setup.issuer.answers["metadata"] = answer
        url = f"{setup.issuer.issuer}/.well-known/oauth-authorization-server"
        await refused_quickly(setup, f"{SERVER} at {url} is refused", "it is ", "RFC 8414 §3.2")
        del setup.issuer.answers["metadata"]
        await setup.connect()


async def test_a_page_at_a_guessed_address_is_not_a_document(servers: Servers, tmp_path: Path) -> None:
    def page(received: RecordedRequest) -> FakeResponse | None:
        return FakeResponse.html() if "openid" not in received.path else None

    async with proxy_setup(servers, tmp_path, issuer={"answers": {"metadata": page}}) as setup:
        await setup.connect()


# bombs


async def test_a_compressed_or_endless_document_is_refused(servers: Servers, tmp_path: Path) -> None:  # T24
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * 1024 * 1024:
            sent += len(CHUNK)
            yield CHUNK

    bomb = gzip.compress(json.dumps({"resource": "x" * 10_000_000}).encode())
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.metadata_answer = FakeResponse(headers=(("content-encoding", "gzip"),), body=bomb)
        await refused_quickly(setup, RESOURCE, "compressed")
        setup.upstream.metadata_answer = FakeResponse(stream=endless)
        await refused_quickly(setup, RESOURCE, "longer than")
        assert sent < 20 * 1024 * 1024
        assert setup.upstream.requests[-1].header("accept-encoding") == "identity"


async def test_a_dripping_document_costs_fifteen_seconds_at_most(servers: Servers, tmp_path: Path) -> None:  # T24
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(1)

    upstreams = [
        await servers.mcp_server(metadata_answer=FakeResponse(stream=drip)),
        await servers.mcp_server(await servers.authorization_server(answers={"metadata": FakeResponse(stream=drip)})),
        await servers.mcp_server(await servers.authorization_server(answers={"metadata": FakeResponse.hang()})),
    ]
    config = {f"notes{number}": upstream.url for number, upstream in enumerate(upstreams)}
    async with running_proxy(tmp_path, dict(config)) as proxy, asyncio.timeout(15):
        replies = await asyncio.gather(*(one_call(proxy, name) for name in config))
    for reply in replies:
        assert_refused(reply, "metadata", "10 s")
    assert proxy.links == []


async def test_documents_that_are_slow_one_by_one_are_bounded_together(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # T24
    assert planning.DISCOVERY_DEADLINE == 15
    monkeypatch.setattr(planning, "DISCOVERY_DEADLINE", 1.0)  # less than what one document is given
    issuer = await servers.authorization_server(answers={"metadata": FakeResponse.hang()})
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, asyncio.timeout(8):
        reply = await one_call(proxy, "notes")
    assert reply.status == 503
    assert "Discovery for server notes did not end within 1 s" in reply.error["message"]
    assert reply.headers["retry-after"].isdigit()


async def one_call(proxy: RunningProxy, server: str) -> McpResponse:
    async with proxy.client(server) as client:
        return await client.call("echo")
