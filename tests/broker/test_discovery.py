"""Discovery of the authorization server: which documents are fetched, and what follows from them."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from broker.broker_setup import server
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_server import WELL_KNOWN, FakeMcpServer
from mcp_auth_proxy.broker.discovery import Discoverer, MetadataLookup
from mcp_auth_proxy.config.settings import IdpSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, ConfigHint, DocumentRefused
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.fetch import Fetcher


class Watched(Discoverer):
    """A discoverer whose lookups are recorded."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.lookups: list[MetadataLookup] = []
        super().__init__(fetcher=fetcher, allow_private=(), observe=self.lookups.append)


@pytest.fixture
async def discoverer() -> AsyncIterator[Watched]:
    fetcher = Fetcher()
    yield Watched(fetcher)
    await fetcher.aclose()


def naming(url: str) -> BearerChallenge:
    return BearerChallenge(resource_metadata=url)


def asked(upstream: FakeMcpServer) -> list[str]:
    """The paths at which an MCP server was asked for its metadata, in order."""
    return [request.path for request in upstream.metadata_requests]


# Resource metadata


async def test_the_url_in_the_challenge_is_asked_first_and_alone(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    upstream.metadata_at = {"root"}
    resource, metadata = await discoverer.discover(server(upstream.url), naming(f"{upstream.origin}{WELL_KNOWN}"))
    assert resource is not None
    assert (resource.resource, metadata.issuer) == (upstream.url, issuer.issuer)
    assert asked(upstream) == [WELL_KNOWN]


async def test_without_a_challenge_the_well_known_urls_are_tried_in_order(
    discoverer: Watched, upstream: FakeMcpServer
) -> None:
    upstream.metadata_at = {"root"}
    assert await discoverer.resource_metadata(server(upstream.url), None) is not None
    assert asked(upstream) == [f"{WELL_KNOWN}/mcp", WELL_KNOWN]


async def test_a_web_page_at_a_guessed_url_is_ignored(discoverer: Watched, upstream: FakeMcpServer) -> None:
    upstream.metadata_answer = FakeResponse.html("<html>Welcome</html>", 200)
    assert await discoverer.resource_metadata(server(upstream.url), None) is None
    assert [lookup.error for lookup in discoverer.lookups] == [None, None]


async def test_a_web_page_at_the_url_in_the_challenge_is_refused(discoverer: Watched, upstream: FakeMcpServer) -> None:
    upstream.metadata_answer = FakeResponse.html("<html>Welcome</html>", 200)
    url = f"{upstream.origin}{WELL_KNOWN}"
    with pytest.raises(DocumentRefused) as refused:
        await discoverer.resource_metadata(server(upstream.url), naming(url))
    assert refused.value.url == url
    (lookup,) = discoverer.lookups
    assert (lookup.url, lookup.error, lookup.found) == (url, refused.value, None)
    assert lookup.response is not None


async def test_broken_json_at_a_guessed_url_is_refused(discoverer: Watched, upstream: FakeMcpServer) -> None:
    upstream.metadata_answer = FakeResponse(headers=(("content-type", "application/json"),), body=b"{")
    with pytest.raises(DocumentRefused):
        await discoverer.resource_metadata(server(upstream.url), None)


async def test_a_server_that_fails_is_not_a_server_without_metadata(
    discoverer: Watched, upstream: FakeMcpServer
) -> None:
    upstream.metadata_answer = FakeResponse.html(status=503)
    with pytest.raises(AuthorizationServerUnavailable, match="HTTP 503"):
        await discoverer.discover(server(upstream.url), None)


async def test_a_relative_url_in_the_challenge_is_ignored(discoverer: Watched, upstream: FakeMcpServer) -> None:
    assert await discoverer.resource_metadata(server(upstream.url), naming("/elsewhere")) is not None
    ignored, found = discoverer.lookups
    assert "not an absolute URL" in str(ignored.error)
    assert found.url == f"{upstream.origin}{WELL_KNOWN}/mcp"


async def test_metadata_of_another_server_is_refused(discoverer: Watched, upstream: FakeMcpServer) -> None:
    upstream.metadata_changes = {"resource": "https://other.example/mcp"}
    with pytest.raises(DocumentRefused, match=r"https://other\.example/mcp"):
        await discoverer.discover(server(upstream.url), None)


# The authorization server


async def test_the_first_listed_issuer_is_used_unless_another_is_pinned(
    discoverer: Watched, servers: Servers, issuer: FakeAuthorizationServer
) -> None:
    other = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, other)
    _, metadata = await discoverer.discover(server(upstream.url), None)
    assert metadata.issuer == issuer.issuer
    _, metadata = await discoverer.discover(server(upstream.url, issuer=other.issuer), None)
    assert metadata.issuer == other.issuer


async def test_an_issuer_that_is_pinned_but_not_listed_is_an_error_with_a_hint(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    with pytest.raises(AuthorizationError, match=r"servers\.notes\.oauth\.issuer pins https://as\.example") as refused:
        await discoverer.discover(server(upstream.url, issuer="https://as.example"), None)
    assert refused.value.hint == ConfigHint("oauth.issuer", issuer.issuer)
    assert issuer.discoveries == 0


async def test_a_pinned_issuer_does_without_resource_metadata(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    upstream.metadata_at = set()
    resource, metadata = await discoverer.discover(server(upstream.url, issuer=issuer.issuer), None)
    assert (resource, metadata.issuer) == (None, issuer.issuer)


async def test_an_authorization_server_without_metadata_is_an_error_with_a_hint(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    issuer.serves_metadata = False
    with pytest.raises(DocumentRefused, match="RFC 8414 §3") as refused:
        await discoverer.discover(server(upstream.url), None)
    assert refused.value.hint == ConfigHint("oauth.metadata")


def failing(status: int, path: str) -> Callable[[RecordedRequest], FakeResponse | None]:
    return lambda received: FakeResponse.html(status=status) if received.path.startswith(path) else None


async def test_a_well_known_url_that_fails_does_not_hide_the_other(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    issuer.answers["metadata"] = failing(500, "/.well-known/oauth-authorization-server")
    _, metadata = await discoverer.discover(server(upstream.url), None)
    assert metadata.issuer == issuer.issuer
    issuer.answers["metadata"] = FakeResponse.html(status=500)
    with pytest.raises(AuthorizationServerUnavailable, match="HTTP 500"):
        await discoverer.discover(server(upstream.url), None)


async def test_metadata_of_another_issuer_is_refused(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    issuer.metadata_changes = {"issuer": "https://evil.example"}
    with pytest.raises(DocumentRefused, match="RFC 8414 §3"):
        await discoverer.discover(server(upstream.url), None)


async def test_without_any_metadata_the_server_itself_has_the_default_endpoints(
    discoverer: Watched, upstream: FakeMcpServer
) -> None:
    upstream.metadata_at = set()
    resource, metadata = await discoverer.discover(server(upstream.url), None)
    assert resource is None
    assert metadata.is_fallback
    assert (metadata.issuer, metadata.token_endpoint) == (upstream.origin, f"{upstream.origin}/token")


async def test_with_configured_metadata_nothing_is_fetched(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    document = {
        "issuer": "https://as.example",
        "authorization_endpoint": "https://as.example/authorize",
        "token_endpoint": "https://as.example/token",
    }
    resource, metadata = await discoverer.discover(server(upstream.url, metadata=document), None)
    assert (resource, metadata.token_endpoint) == (None, "https://as.example/token")
    assert (asked(upstream), issuer.requests) == ([], [])


@pytest.mark.parametrize(
    ("oauth", "refused"),
    [
        ({}, True),
        ({"allow_missing_pkce": True}, False),
        ({"grant": GrantType.CLIENT_CREDENTIALS}, False),
        ({"grant": GrantType.DEVICE_CODE}, False),
    ],
    ids=str,
)
async def test_pkce_is_required_for_grants_with_a_redirect(
    discoverer: Watched,
    upstream: FakeMcpServer,
    issuer: FakeAuthorizationServer,
    oauth: dict[str, Any],
    refused: bool,
) -> None:
    issuer.metadata_changes = {"code_challenge_methods_supported": ["plain"]}
    if refused:
        with pytest.raises(AuthorizationError, match=r"allow_missing_pkce"):
            await discoverer.discover(server(upstream.url, **oauth), None)
    else:
        await discoverer.discover(server(upstream.url, **oauth), None)


# Identity providers, and what may be watched


async def test_metadata_of_an_identity_provider_is_fetched_only_if_its_endpoint_is_not_configured(
    discoverer: Watched, issuer: FakeAuthorizationServer
) -> None:
    mine = server("https://mcp.example/mcp")
    configured = IdpSettings(client_id="c", token_endpoint="https://idp.example/token")
    assert await discoverer.identity_provider(mine, configured) == ("https://idp.example/token", None)
    assert issuer.requests == []
    idp = IdpSettings(client_id="c", issuer=issuer.issuer)
    url, methods = await discoverer.identity_provider(mine, idp)
    assert url == f"{issuer.issuer}/token"
    assert methods


async def test_the_identity_provider_of_a_server_made_at_run_time_may_not_be_private(  # T69
    discoverer: Watched, issuer: FakeAuthorizationServer
) -> None:
    made = replace(server("https://mcp.example/mcp"), allow_private=())
    with pytest.raises(AuthorizationError):
        await discoverer.identity_provider(made, IdpSettings(client_id="c", issuer=issuer.issuer))
    assert issuer.requests == []


async def test_every_lookup_is_reported_with_what_was_found(
    discoverer: Watched, upstream: FakeMcpServer, issuer: FakeAuthorizationServer
) -> None:
    upstream.metadata_at = {"root"}
    resource, metadata = await discoverer.discover(server(upstream.url), None)
    assert [(lookup.url, lookup.found) for lookup in discoverer.lookups] == [
        (f"{upstream.origin}{WELL_KNOWN}/mcp", None),
        (f"{upstream.origin}{WELL_KNOWN}", resource),
        (f"{issuer.issuer}/.well-known/oauth-authorization-server", metadata),
    ]
