"""The fakes enforce what they claim: otherwise the tests that use them would prove nothing."""

import asyncio
import contextlib
import gzip
import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import RealMcpServer, Servers
from fakes.headless import Browser, consent, decline
from fakes.http_exchange import ABSENT, Channel, FakeResponse
from fakes.mcp_client import MODERN, PlainClient
from fakes.mcp_server import FakeMcpServer, big
from mcp_auth_proxy.cli.demo_servers.ledger import s256

REDIRECT = "http://127.0.0.1:1/oauth/callback"
RESOURCE = "http://127.0.0.1:2/mcp"
VERIFIER = "v" * 64


@dataclass
class OAuthClient:
    """A registered public client that does one step at a time."""

    server: FakeAuthorizationServer
    http: httpx2.AsyncClient
    client_id: str

    def link(self, **changes: str) -> str:
        params = {
            "response_type": "code",
            "client_id": self.client_id,
            "redirect_uri": REDIRECT,
            "code_challenge": s256(VERIFIER),
            "code_challenge_method": "S256",
            "state": secrets.token_hex(8),
            "resource": RESOURCE,
            "scope": "a b",
        }
        return f"{self.server.issuer}/authorize?{urlencode(params | changes)}"

    async def code(self, **changes: str) -> str:
        async with Browser() as browser:
            callback = await browser.stop_before(self.link(**changes))
        return parse_qs(urlsplit(callback).query)["code"][0]

    async def redeem(self, code: str, **changes: str) -> httpx2.Response:
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": REDIRECT, "code_verifier": VERIFIER}
        return await self.token(**form | {"resource": RESOURCE} | changes)

    async def refresh(self, refresh_token: str, **changes: str) -> httpx2.Response:
        return await self.token(**{"grant_type": "refresh_token", "refresh_token": refresh_token} | changes)

    async def token(self, **form: str) -> httpx2.Response:
        return await self.http.post(f"{self.server.issuer}/token", data={"client_id": self.client_id} | form)


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(trust_env=False, timeout=5) as client:
        yield client


@pytest.fixture
async def oauth(authorization_server: FakeAuthorizationServer, http: httpx2.AsyncClient) -> OAuthClient:
    registered = await http.post(
        f"{authorization_server.issuer}/register",
        json={"redirect_uris": [REDIRECT], "token_endpoint_auth_method": "none", "application_type": "native"},
    )
    assert registered.status_code == 201
    return OAuthClient(authorization_server, http, registered.json()["client_id"])


def error(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]


def text_of(result: CallToolResult) -> str:
    """Return the text of a tool's result, which is its only content."""
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


def test_demo_servers_import_no_mcp_until_a_server_is_made() -> None:
    code = "import sys, mcp_auth_proxy.cli.demo_servers.mcp_server; sys.exit('mcp' in sys.modules)"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=30, check=False).returncode == 0


async def test_metadata_is_served_at_every_well_known_place_of_each_tenant(
    servers: Servers, http: httpx2.AsyncClient
) -> None:
    for server in await servers.tenants("/a", "/b"):
        for path in server.metadata_paths():
            document = (await http.get(f"{server.local.origin}{path}")).json()
            assert document["issuer"] == server.issuer
            assert document["token_endpoint"] == f"{server.issuer}/token"
        assert server.discoveries == 3


async def test_registration_refuses_a_redirect_uri_that_does_not_suit_the_application_type(
    authorization_server: FakeAuthorizationServer, http: httpx2.AsyncClient
) -> None:
    asked = {"redirect_uris": [REDIRECT], "application_type": "web"}
    assert error(await http.post(f"{authorization_server.issuer}/register", json=asked)) == (
        400,
        "invalid_redirect_uri",
    )
    assert error(await http.post(f"{authorization_server.issuer}/register", content=b"[")) == (
        400,
        "invalid_client_metadata",
    )


async def test_code_is_redeemed_once_and_a_second_use_ends_its_grant(oauth: OAuthClient) -> None:
    code = await oauth.code()
    tokens = (await oauth.redeem(code)).json()
    assert tokens["scope"] == "a b"
    assert error(await oauth.redeem(code)) == (400, "invalid_grant")
    assert error(await oauth.refresh(tokens["refresh_token"])) == (400, "invalid_grant")
    assert oauth.server.ledger.token(tokens["access_token"]) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code_verifier": "w" * 64}, "invalid_grant"),
        ({"redirect_uri": "http://127.0.0.1:1/other"}, "invalid_grant"),
        ({"resource": "http://127.0.0.1:3/mcp"}, "invalid_target"),
        ({"client_id": "someone-else"}, "invalid_client"),
        ({"client_secret": "guessed"}, "invalid_client"),
    ],
)
async def test_code_is_refused_if_a_parameter_differs_from_the_authorization_request(
    oauth: OAuthClient, changes: dict[str, str], expected: str
) -> None:
    response = await oauth.redeem(await oauth.code(), **changes)
    assert response.json()["error"] == expected


async def test_refresh_rotates_and_an_old_token_ends_the_grant(oauth: OAuthClient) -> None:
    first = (await oauth.redeem(await oauth.code())).json()
    second = (await oauth.refresh(first["refresh_token"], resource=RESOURCE)).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert error(await oauth.refresh(first["refresh_token"])) == (400, "invalid_grant")
    assert error(await oauth.refresh(second["refresh_token"])) == (400, "invalid_grant")
    assert oauth.server.ledger.token(second["access_token"]) is None
    assert oauth.server.refreshes == 3
    assert oauth.server.ledger.reused == 1


async def test_an_old_refresh_token_may_come_again_for_a_while_or_end_nothing(oauth: OAuthClient) -> None:
    oauth.server.configure(reuse_detection=False, reuse_seconds=3600)
    first = (await oauth.redeem(await oauth.code())).json()
    second = (await oauth.refresh(first["refresh_token"])).json()
    assert (await oauth.refresh(first["refresh_token"])).status_code == 200
    oauth.server.configure(reuse_seconds=0)
    assert error(await oauth.refresh(first["refresh_token"])) == (400, "invalid_grant")
    assert (await oauth.refresh(second["refresh_token"])).status_code == 200


async def test_refresh_may_not_widen_scope_or_change_resource(oauth: OAuthClient) -> None:
    tokens = (await oauth.redeem(await oauth.code())).json()
    assert error(await oauth.refresh(tokens["refresh_token"], scope="a c")) == (400, "invalid_scope")
    assert error(await oauth.refresh(tokens["refresh_token"], resource="http://127.0.0.1:3/x")) == (
        400,
        "invalid_target",
    )
    assert (await oauth.refresh(tokens["refresh_token"], scope="a")).json()["scope"] == "a"


async def test_tokens_expire_and_can_be_revoked_alone_or_all_at_once(oauth: OAuthClient) -> None:
    ledger = oauth.server.ledger
    tokens = (await oauth.redeem(await oauth.code())).json()
    now = ledger.clock()
    ledger.clock = lambda: now + 61
    assert ledger.token(tokens["access_token"]) is None
    ledger.clock = lambda: now
    assert oauth.server.end_access_tokens() == 1
    assert ledger.token(tokens["access_token"]) is None
    tokens = (await oauth.refresh(tokens["refresh_token"])).json()
    form = {"client_id": oauth.client_id, "token": tokens["refresh_token"]}
    assert (await oauth.http.post(f"{oauth.server.issuer}/revoke", data=form)).status_code == 200
    assert error(await oauth.refresh(tokens["refresh_token"])) == (400, "invalid_grant")


async def test_basic_secret_is_form_decoded_and_client_credentials_need_one(
    authorization_server: FakeAuthorizationServer, http: httpx2.AsyncClient
) -> None:
    authorization_server.add_client(client_id="a:b", secret="p q%+")
    form = {"grant_type": "client_credentials", "scope": "x", "resource": RESOURCE}
    url = f"{authorization_server.issuer}/token"
    good = await http.post(url, data=form, auth=("a%3Ab", "p+q%25%2B"))
    assert good.json()["scope"] == "x"
    assert "refresh_token" not in good.json()
    refused = await http.post(url, data=form, auth=("a%3Ab", "wrong"))
    assert error(refused) == (401, "invalid_client")
    assert refused.headers["www-authenticate"].startswith("Basic")
    authorization_server.add_client(client_id="public", auth="none")
    assert error(await http.post(url, data=form | {"client_id": "public"})) == (400, "unauthorized_client")


async def test_consent_page_decides_and_the_answer_names_the_issuer(oauth: OAuthClient, servers: Servers) -> None:
    async with Browser() as browser:
        allowed = parse_qs(urlsplit(await browser.stop_before(oauth.link(state="s1"))).query)
    assert allowed["iss"] == [oauth.server.issuer]
    assert allowed["state"] == ["s1"]
    landing = await servers.mcp_server(
        path="/oauth/callback", protected=False, answers={"GET": FakeResponse.html("done")}
    )
    oauth.server.ledger.clients["there"] = oauth.server.add_client(
        client_id="there", auth="none", redirect_uris=(landing.url,)
    )
    assert (await consent(oauth.link(client_id="there", redirect_uri=landing.url))).text == "done"
    declined = await decline(oauth.link(client_id="there", redirect_uri=landing.url))
    assert declined.url.params["error"] == "access_denied"
    assert declined.url.params["iss"] == oauth.server.issuer


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": ""}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"resource": "not-absolute"}, "invalid_target"),
        ({"scope": "unheard-of"}, "invalid_scope"),
    ],
)
async def test_authorization_errors_go_to_the_redirect_uri(
    oauth: OAuthClient, changes: dict[str, str], expected: str
) -> None:
    oauth.server.rules.scopes = ("a", "b")
    response = await oauth.http.get(oauth.link(**changes))
    params = parse_qs(urlsplit(response.headers["location"]).query)
    assert params["error"] == [expected]
    assert params["iss"] == [oauth.server.issuer]


async def test_nothing_is_redirected_to_an_unregistered_uri(oauth: OAuthClient) -> None:
    response = await oauth.http.get(oauth.link(redirect_uri="http://127.0.0.1:1/evil"))
    assert response.status_code == 400
    assert "location" not in response.headers


async def test_options_change_documents_and_answers(oauth: OAuthClient) -> None:
    server = oauth.server
    server.configure(
        metadata_changes={"issuer": "https://other", "revocation_endpoint": ABSENT},
        token_changes={"expires_in": -5},
        auto_consent=True,
        iss=None,
        rotate=False,
    )
    url = f"{server.issuer}{server.metadata_paths()[0]}"
    document = (await oauth.http.get(url)).json()
    assert document["issuer"] == "https://other"
    assert "revocation_endpoint" not in document
    location = (await oauth.http.get(oauth.link())).headers["location"]
    query = parse_qs(urlsplit(location).query)
    assert "iss" not in query
    tokens = (await oauth.redeem(query["code"][0])).json()
    assert tokens["expires_in"] == -5
    assert "refresh_token" not in (await oauth.refresh(tokens["refresh_token"])).json()
    server.answers["metadata"] = FakeResponse.gzipped({"issuer": "zipped"})
    assert (await oauth.http.get(url)).json() == {"issuer": "zipped"}
    server.outage = FakeResponse.too_many()
    assert (await oauth.http.get(url)).headers["retry-after"] == "7"
    assert {query["code"][0], tokens["access_token"], tokens["refresh_token"]} <= server.secrets()


async def test_server_goes_down_and_comes_up_on_its_port(oauth: OAuthClient) -> None:
    url = f"{oauth.server.issuer}{oauth.server.metadata_paths()[0]}"
    assert (await oauth.http.get(url)).status_code == 200
    for _ in range(3):
        await oauth.server.local.down()
        with pytest.raises(httpx2.ConnectError):
            await oauth.http.get(url)
        await oauth.server.local.up()
        assert (await oauth.http.get(url)).status_code == 200


async def test_lost_response_is_processed_but_not_seen(oauth: OAuthClient) -> None:
    tokens = (await oauth.redeem(await oauth.code())).json()
    oauth.server.lost_responses = {"token"}
    with pytest.raises(httpx2.TransportError):
        await oauth.refresh(tokens["refresh_token"])
    oauth.server.lost_responses.clear()
    assert error(await oauth.refresh(tokens["refresh_token"])) == (400, "invalid_grant")


async def test_gate_holds_a_request_until_it_is_opened(oauth: OAuthClient) -> None:
    gate = oauth.server.gates["metadata"] = asyncio.Event()
    asking = asyncio.create_task(oauth.http.get(f"{oauth.server.issuer}{oauth.server.metadata_paths()[0]}"))
    await oauth.server.log.wait_for(lambda received: received.endpoint == "metadata")
    assert not asking.done()
    gate.set()
    assert (await asking).status_code == 200


async def test_fake_mcp_server_challenges_and_accepts_a_token_for_itself_only(
    mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer, http: httpx2.AsyncClient
) -> None:
    mcp_server.step_up = {"tools/call:write": ("w",)}
    async with PlainClient(mcp_server.url) as client:
        refused = await client.call("echo", text="hi")
        assert refused.status == 401
        metadata_url = refused.headers["www-authenticate"].split('resource_metadata="')[1].rstrip('"')
        document = (await http.get(metadata_url)).json()
        assert document == {"resource": mcp_server.url, "authorization_servers": [authorization_server.issuer]}
        client.http.headers["authorization"] = f"Bearer {authorization_server.issue(resource=RESOURCE)}"
        assert (await client.call("echo", text="hi")).status == 401
        client.http.headers["authorization"] = f"Bearer {authorization_server.issue(resource=mcp_server.url)}"
        assert (await client.call("echo", text="hi")).text == "hi"
        stepped = await client.call("write")
        assert stepped.status == 403
        assert 'error="insufficient_scope", scope="w"' in stepped.headers["www-authenticate"]
        assert [received.tool for received in mcp_server.calls("tools/call")] == ["echo", "echo", "echo", "write"]


async def test_fake_mcp_server_has_sessions_and_pushes_events(servers: Servers) -> None:
    server = await servers.mcp_server(protected=False, sessions_on=True, answer_as="sse")
    async with PlainClient(server.url) as client:
        assert (await client.post("ping")).status == 400
        await client.initialize()
        assert client.session in server.sessions
        assert (await client.notify("notifications/cancelled")).status == 202
        assert (await client.post("ping")).result == {}
        async with client.stream() as (response, events):
            assert response.status_code == 200
            assert server.push({"jsonrpc": "2.0", "method": "notifications/message"}) == 1
            assert (await anext(events))["method"] == "notifications/message"
        assert (await client.delete()).status == 200
        assert (await client.post("ping")).status == 404


async def test_events_arrive_one_by_one_and_a_disconnect_is_noticed(servers: Servers) -> None:
    channel = Channel()
    server = await servers.mcp_server(protected=False, answers={"tools/call": FakeResponse.events(channel)})
    async with PlainClient(server.url) as client:
        async with client.stream("tools/call", {"name": "slow"}) as (_, events):
            for number in range(3):
                channel.event({"number": number})
                assert await anext(events) == {"number": number}
        async with asyncio.timeout(5):
            await server.calls()[0].gone.wait()


async def test_streams_break_and_requests_are_dropped_on_request(servers: Servers) -> None:
    channel = Channel()
    server = await servers.mcp_server(protected=False, answers={"tools/call": FakeResponse.events(channel, reset=True)})
    server.script("ping", FakeResponse.drop(), FakeResponse.json({"id": 1, "result": {}}, 500))
    async with PlainClient(server.url) as client:
        async with client.stream("tools/call", {"name": "slow"}) as (_, events):
            channel.event({"number": 1})
            assert await anext(events) == {"number": 1}
            channel.close()
            with pytest.raises(httpx2.TransportError):
                await anext(events)
        with pytest.raises(httpx2.TransportError):
            await client.post("ping")
        assert (await client.post("ping")).status == 500
        assert (await client.post("ping")).status == 200


async def test_hanging_request_ends_with_its_client(servers: Servers) -> None:
    server = await servers.mcp_server(protected=False, answers={"ping": FakeResponse.hang()})
    async with PlainClient(server.url) as client:
        asking = asyncio.create_task(client.post("ping"))
        received = await server.log.wait_for()
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        async with asyncio.timeout(5):
            await received.gone.wait()


async def test_big_and_compressed_bodies_are_exact(servers: Servers) -> None:
    zipped = FakeResponse.gzipped({"jsonrpc": "2.0", "id": 1, "result": {}})
    server = await servers.mcp_server(protected=False, answers={"big": big(5_000_001), "zipped": zipped})
    async with PlainClient(server.url) as client:
        assert len((await client.post("big")).body) == 5_000_001
        async with client.stream("zipped") as (response, _):
            raw = b"".join([chunk async for chunk in response.aiter_raw()])
        assert raw == zipped.body
        assert json.loads(gzip.decompress(raw))["result"] == {}


@pytest.mark.parametrize("mode", ["legacy", "auto", MODERN])
async def test_sdk_client_uses_the_protected_real_server_in_both_eras(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, mode: str
) -> None:
    token = authorization_server.issue(resource=real_mcp_server.url, client_id="tester", scopes=("notes:write",))
    steps: list[float] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        steps.append(progress)

    headers = {"authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=10, trust_env=False) as http,
        Client(streamable_http_client(real_mcp_server.url, http_client=http), mode=mode) as client,
    ):
        tools = {tool.name for tool in (await client.list_tools()).tools}
        assert tools == {"echo", "add", "whoami", "count", "large", "write_note"}
        assert text_of(await client.call_tool("add", {"a": 1, "b": 2})) == "3"
        assert text_of(await client.call_tool("whoami", {})) == "tester with notes:write"
        assert text_of(await client.call_tool("write_note", {"text": "n"})) == "1 notes"
        large = await client.call_tool("large", {"size": 300_000})
        assert len(text_of(large)) == 300_000
        await client.call_tool("count", {"to": 3, "seconds": 0}, progress_callback=on_progress)
        assert steps == [1, 2, 3]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_sdk_client_understands_the_fake_server(servers: Servers, mode: str) -> None:
    server = await servers.mcp_server(protected=False, sessions_on=True)
    async with Client(server.url, mode=mode) as client:
        assert text_of(await client.call_tool("echo", {"text": "hi"})) == "hi"
        assert {tool.name for tool in (await client.list_tools()).tools} == {"echo", "count", "whoami"}
    assert bool(server.calls("initialize")) == (mode == "legacy")


async def test_real_server_challenges_by_rfc_9728_and_steps_up(
    real_mcp_server: RealMcpServer, authorization_server: FakeAuthorizationServer, http: httpx2.AsyncClient
) -> None:
    async with PlainClient(real_mcp_server.url, version=MODERN) as client:
        refused = await client.call("echo", text="hi")
        assert refused.status == 401
        assert f'resource_metadata="{real_mcp_server.protection.metadata_url}"' in refused.headers["www-authenticate"]
        document = (await http.get(real_mcp_server.protection.metadata_url)).json()
        assert document["resource"] == real_mcp_server.url
        client.http.headers["authorization"] = f"Bearer {authorization_server.issue(resource=RESOURCE)}"
        assert 'error="invalid_token"' in (await client.call("echo", text="hi")).headers["www-authenticate"]
        token = authorization_server.issue(resource=real_mcp_server.url)
        client.http.headers["authorization"] = f"Bearer {token}"
        assert (await client.call("echo", text="hi")).text == "hi"
        stepped = await client.call("write_note", text="n")
        assert stepped.status == 403
        assert 'error="insufficient_scope", scope="notes:write"' in stepped.headers["www-authenticate"]
    assert real_mcp_server.steps == ["challenge", "resource-metadata", "challenge", "retry", "challenge"]
