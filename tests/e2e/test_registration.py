"""Client registration in the documented order, and which credentials are sent to which authorization server."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.hostile import assert_refused
from fakes.http_exchange import ABSENT, FakeResponse, RecordedRequest
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import link_in, running_proxy
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.cli.demo_servers.local_server import serve

PUBLIC = "https://proxy.example"
DOCUMENT = f"{PUBLIC}/oauth/client-metadata.json"
SECRET = "s3cret/+ %:é with space"


def secret_file(folder: Path) -> str:
    (folder / "client-secret").write_text(SECRET)
    return "file:client-secret"


# by hand


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "chosen"])
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post", "none"])
async def test_a_client_of_the_configuration_authenticates_by_its_method(
    servers: Servers, tmp_path: Path, method: str, configured: bool
) -> None:
    oauth = {"client_id": "by hand:1"}
    if method != "none":
        oauth["client_secret"] = secret_file(tmp_path)
    if configured:
        oauth["client_auth"] = method
    supported = {"token_endpoint_auth_methods_supported": [method]}
    async with proxy_setup(servers, tmp_path, oauth=oauth, issuer={"metadata_changes": supported}) as setup:
        redirect_uri = f"{setup.proxy.origin}/oauth/callback"
        secret = None if method == "none" else SECRET
        setup.issuer.add_client(client_id="by hand:1", auth=method, secret=secret, redirect_uris=(redirect_uri,))
        await setup.connect()
        setup.issuer.end_access_tokens()
        assert (await setup.ask("renewed")).text == "renewed"
        assert setup.issuer.registrations == 0
        for request in setup.issuer.seen("token"):
            # RFC 6749 §2.3.1: form-encoded first, so that the colon in the id stays unambiguous.
            pair = f"{quote('by hand:1', safe='')}:{quote(SECRET, safe='')}".encode()
            basic = f"Basic {base64.b64encode(pair).decode()}" if method == "client_secret_basic" else None
            assert request.header("authorization") == basic
            assert request.form.get("client_secret") == (SECRET if method == "client_secret_post" else None)
            assert ("client_id" in request.form) == (method != "client_secret_basic")


async def test_the_first_refusal_is_reported_if_client_id_with_basic_is_refused_too(
    servers: Servers, tmp_path: Path
) -> None:
    """Some servers take ``client_id`` in the form for a second way of authenticating (RFC 6749 §2.3)."""

    def refuse(received: RecordedRequest) -> FakeResponse:
        twice = "client_id" in received.form
        error = ("invalid_request", "two ways") if twice else ("invalid_client", "no such client")
        return FakeResponse.json({"error": error[0], "error_description": error[1]}, 401)

    oauth = {"client_id": "by-hand", "client_secret": secret_file(tmp_path), "client_auth": "client_secret_basic"}
    async with proxy_setup(servers, tmp_path, oauth=oauth, issuer={"answers": {"token": refuse}}) as setup:
        setup.issuer.add_client(
            client_id="by-hand", secret=SECRET, redirect_uris=(f"{setup.proxy.origin}/oauth/callback",)
        )
        page = await consent(await setup.link())
        assert page.status_code == 502
        assert "no such client" in page.text
        assert ["client_id" in request.form for request in setup.issuer.seen("token")] == [False, True]


async def test_a_configured_client_takes_precedence_over_a_metadata_document(servers: Servers, tmp_path: Path) -> None:
    options = {"client_id": "by-hand", "client_metadata_url": "https://elsewhere.example/client.json"}
    async with proxy_setup(servers, tmp_path, oauth=options, issuer={"client_documents": True}) as setup:
        setup.issuer.add_client(
            client_id="by-hand", auth="none", redirect_uris=(f"{setup.proxy.origin}/oauth/callback",)
        )
        await setup.connect()
        assert setup.issuer.seen("authorize")[0].form["client_id"] == "by-hand"
        assert setup.issuer.registrations == 0


# dynamic registration


async def test_without_https_a_native_client_registers_once(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"client_documents": True}) as setup:
        await setup.connect()
        setup.issuer.end_grants()
        assert (await consent(await setup.link())).status_code == 200
        (request,) = setup.issuer.seen("register")
        assert request.message["application_type"] == "native"
        assert request.message["redirect_uris"] == [f"{setup.proxy.origin}/oauth/callback"]
        assert set(request.message["grant_types"]) == {"authorization_code", "refresh_token"}
        assert request.message["response_types"] == ["code"]
        assert request.message["client_name"]


async def test_each_server_has_a_client_of_its_own(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    config = {name: (await servers.mcp_server(issuer)).url for name in ("one", "two")}
    async with running_proxy(tmp_path, dict(config), authorization={"wait": "0s"}) as proxy:
        for name in config:
            async with proxy.client(name) as client:
                await consent(link_in((await client.call("echo")).message))
    assert issuer.registrations == 2
    assert len({request.form["client_id"] for request in issuer.seen("token")}) == 2


async def test_another_method_in_the_configuration_is_registered_and_used(servers: Servers, tmp_path: Path) -> None:
    methods = ["none", "client_secret_basic", "client_secret_post"]
    issuer = await servers.authorization_server(
        auto_consent=True, metadata_changes={"token_endpoint_auth_methods_supported": methods}
    )
    upstream = await servers.mcp_server(issuer)
    for method in methods:
        issuer.end_grants()
        config = {"url": upstream.url, "oauth": {"client_auth": method}}
        async with (
            running_proxy(tmp_path, {"notes": config}, authorization={"wait": "0s"}) as proxy,
            proxy.client("notes") as client,
        ):
            assert (await consent(link_in((await client.call("echo")).message))).status_code == 200
        assert issuer.seen("register")[-1].message["token_endpoint_auth_method"] == method
        request = issuer.seen("token", grant_type="authorization_code")[-1]
        assert (request.header("authorization") is not None) == (method == "client_secret_basic")
        assert ("client_secret" in request.form) == (method == "client_secret_post")
    assert issuer.registrations == 3


async def test_a_method_of_the_configuration_that_the_server_does_not_list_is_refused(
    servers: Servers, tmp_path: Path
) -> None:
    listed = {"metadata_changes": {"token_endpoint_auth_methods_supported": ["client_secret_post"]}}
    async with proxy_setup(servers, tmp_path, oauth={"client_auth": "client_secret_basic"}, issuer=listed) as setup:
        assert_refused(await setup.ask(), "servers.notes.oauth.client_auth", "client_secret_post", setup.issuer.issuer)
        assert setup.issuer.registrations == 0


@pytest.mark.parametrize("options", [{"registration": False}, {"metadata_changes": {"registration_endpoint": ABSENT}}])
async def test_without_registration_the_error_names_the_keys(
    servers: Servers, tmp_path: Path, options: dict[str, Any]
) -> None:
    async with proxy_setup(servers, tmp_path, issuer=options) as setup:
        reply = await setup.ask()
        assert reply.status == 200
        text = reply.error["message"]
        assert "servers.notes.oauth.client_id" in text
        assert setup.issuer.issuer in text
        assert f"{setup.proxy.origin}/oauth/callback" in text
        assert "/connect/" not in str(reply.message)
        assert setup.issuer.registrations == 0


@pytest.mark.parametrize("everywhere", [False, True], ids=["404 elsewhere", "401 everywhere"])
@pytest.mark.parametrize(
    ("challenges", "words"),
    [
        (['Basic realm="x"'], ["asks for Basic, "]),
        (["Digest nonce=x", "Basic"], ["asks for Digest, Basic, "]),
        ([], []),
    ],
)
async def test_a_server_without_any_oauth_is_reported_as_such(
    servers: Servers, tmp_path: Path, challenges: list[str], words: list[str], everywhere: bool
) -> None:
    upstream = await servers.mcp_server(challenges={401: challenges})
    answer = FakeResponse.html(status=401 if everywhere else 404)
    upstream.intercept = lambda received: answer if received.path != upstream.path else None
    config = {"notes": upstream.url}
    async with running_proxy(tmp_path, dict(config)) as proxy, proxy.client("notes") as client:
        reply = await client.call("echo")
        keys = [f"servers.notes.oauth.{key}" for key in ("issuer", "metadata", "client_id")]
        assert_refused(reply, "No OAuth metadata was found", f"{upstream.origin}/register", *words, *keys)
        assert ("asks for" in reply.error["message"]) == bool(words)
        assert proxy.links == []


# the first issuer


async def moved(servers: Servers, upstream: FakeMcpServer) -> FakeAuthorizationServer:
    """The server now names another authorization server."""
    other = await servers.authorization_server(auto_consent=True)
    upstream.authorization_servers[:] = [other]
    return other


async def test_a_configured_client_is_sent_only_to_its_first_issuer(servers: Servers, tmp_path: Path) -> None:  # T11
    oauth = {"client_id": "by-hand", "client_secret": secret_file(tmp_path)}
    async with proxy_setup(servers, tmp_path, oauth=oauth) as setup:
        callback = f"{setup.proxy.origin}/oauth/callback"
        setup.issuer.add_client(client_id="by-hand", secret=SECRET, redirect_uris=(callback,))
        await setup.connect()
        other = await moved(servers, setup.upstream)
        replies = [await setup.ask()]
        setup.issuer.end_grants()
        replies.append(await setup.ask())
        for reply in replies:
            assert reply.status == 200
            assert other.issuer in reply.error["message"]
            assert setup.issuer.issuer in reply.error["message"]
            assert "servers.notes.oauth.issuer" in reply.error["message"]
        assert {request.endpoint for request in other.requests} <= {"metadata"}
        assert SECRET not in repr(other.requests)


async def test_a_new_issuer_sees_nothing_of_the_old_one(servers: Servers, tmp_path: Path) -> None:  # T11
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        other = await moved(servers, setup.upstream)
        page = await consent(await setup.link())
        assert page.status_code == 200
        assert (await setup.ask("in")).text == "in"
        sent = repr([(request.headers, request.body, request.query_string) for request in other.requests])
        assert not [secret for secret in setup.issuer.secrets() if secret in sent]
        assert other.registrations == 1


async def test_a_pinned_issuer_is_the_only_one(servers: Servers, tmp_path: Path) -> None:
    pinned = await servers.authorization_server(auto_consent=True)
    async with proxy_setup(servers, tmp_path, oauth={"issuer": pinned.issuer}) as setup:
        reply = await setup.ask()
        assert pinned.issuer in reply.error["message"]
        assert "servers.notes.oauth.issuer" in reply.error["message"]
        assert setup.issuer.requests == []
        setup.upstream.authorization_servers.append(pinned)
        setup.skip_pause()
        await setup.connect()
        assert setup.issuer.requests == []


# discovery done by hand, and servers that know nothing of it


async def test_static_metadata_skips_discovery(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True, serves_metadata=False)
    upstream = await servers.mcp_server(issuer)
    upstream.metadata_answer = lambda received: None
    oauth = {
        "metadata": {
            "issuer": issuer.issuer,
            "authorization_endpoint": f"{issuer.issuer}/authorize",
            "token_endpoint": f"{issuer.issuer}/token",
            "registration_endpoint": f"{issuer.issuer}/register",
        }
    }
    async with (
        running_proxy(
            tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}}, authorization={"wait": "0s"}
        ) as proxy,
        proxy.client("notes") as client,
    ):
        await consent(link_in((await client.call("echo")).message))
        assert (await client.call("echo", text="in")).text == "in"
    assert (issuer.discoveries, upstream.metadata_requests) == (0, [])


class OneOrigin:
    """A server of 2025-03-26: its origin is its own authorization server."""

    def __init__(self, origin: str, **options: Any) -> None:
        self.issuer = FakeAuthorizationServer(origin, auto_consent=True, **options)
        self.upstream = FakeMcpServer(origin, [self.issuer], metadata_at=set(), challenge_names_metadata=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self.issuer if self.issuer.owns(scope["path"]) else self.upstream
        await app(scope, receive, send)


@asynccontextmanager
async def one_origin(**options: Any) -> AsyncIterator[OneOrigin]:
    made: list[OneOrigin] = []

    def make(origin: str) -> ASGIApp:
        made.append(OneOrigin(origin, **options))
        return made[0]

    async with serve(make) as local:
        made[0].issuer.local = made[0].upstream.local = local
        yield made[0]


@pytest.mark.parametrize(
    "options", [{}, {"serves_metadata": False, "iss": None}], ids=["metadata", "default endpoints"]
)
async def test_without_resource_metadata_the_origin_is_the_authorization_server(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    async with (
        one_origin(**options) as setup,
        running_proxy(tmp_path, {"notes": setup.upstream.url}, authorization={"wait": "0s"}) as proxy,
        proxy.client("notes", version="2025-03-26") as client,
    ):
        page = await consent(link_in((await client.call("echo")).message))
        assert page.status_code == 200, page.text
        assert (await client.call("echo", text="in")).text == "in"
        setup.issuer.end_access_tokens()
        assert (await client.call("echo", text="renewed")).text == "renewed"
        assert setup.issuer.seen("authorize")[0].form["code_challenge_method"] == "S256"


# what is asked for


@pytest.mark.parametrize(
    ("resource", "sent"), [("omit", None), ("https://exact.example/api", "https://exact.example/api"), ("auto", "")]
)
async def test_the_resource_is_sent_with_every_request(
    servers: Servers, tmp_path: Path, resource: str, sent: str | None
) -> None:  # T49
    options = {"checks_audience": False}
    async with proxy_setup(servers, tmp_path, oauth={"resource": resource}, upstream=options) as setup:
        await setup.connect()
        setup.issuer.end_access_tokens()
        assert (await setup.ask("renewed")).text == "renewed"
        requests = [*setup.issuer.seen("authorize"), *setup.issuer.seen("token")]
        assert len(requests) == 3
        expected = setup.upstream.url if sent == "" else sent
        assert {request.form.get("resource") for request in requests} == {expected}


async def test_offline_access_is_requested_with_consent_if_it_is_listed(servers: Servers, tmp_path: Path) -> None:
    options = {"scopes": ("read", "offline_access"), "refresh_needs_offline_access": True}
    async with proxy_setup(servers, tmp_path, issuer=options, upstream={"scopes": ("read",)}) as setup:
        await setup.connect()
        asked = setup.issuer.seen("authorize")[0].form
        assert asked["scope"].split() == ["read", "offline_access"]
        assert asked["prompt"] == "consent"
        setup.issuer.end_access_tokens()
        assert (await setup.ask("renewed")).text == "renewed"


async def test_offline_access_is_not_requested_if_it_is_not_listed(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"scopes": ("read",)}, upstream={"scopes": ("read",)}) as setup:
        await setup.connect()
        asked = setup.issuer.seen("authorize")[0].form
        assert asked["scope"] == "read"
        assert "prompt" not in asked


async def test_configured_parameters_replace_ours(servers: Servers, tmp_path: Path) -> None:
    oauth = {"authorization_params": {"prompt": "login", "access_type": "offline", "audience": "a b&c"}}
    options = {"scopes": ("read", "offline_access")}
    async with proxy_setup(servers, tmp_path, oauth=oauth, issuer=options, upstream={"scopes": ("read",)}) as setup:
        await setup.connect()
        asked = setup.issuer.seen("authorize")[0].query
        assert asked["prompt"] == ["login"]
        assert asked["access_type"] == ["offline"]
        assert asked["audience"] == ["a b&c"]
        assert all(len(values) == 1 for values in asked.values())


async def test_configured_scopes_take_precedence_over_those_of_the_challenge(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(
        servers, tmp_path, oauth={"scopes": ["mine"]}, upstream={"challenge_scopes": ("theirs",)}
    ) as setup:
        await setup.connect()
        assert setup.issuer.seen("authorize")[0].form["scope"] == "mine"


async def test_without_a_challenged_scope_those_of_the_resource_are_requested(servers: Servers, tmp_path: Path) -> None:
    options = {"metadata_changes": {"scopes_supported": ["a", "b"]}}
    async with proxy_setup(servers, tmp_path, upstream=options) as setup:
        await setup.connect()
        assert setup.issuer.seen("authorize")[0].form["scope"] == "a b"
