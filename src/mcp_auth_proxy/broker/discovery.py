"""Discovery: from a server to its authorization server, one document after another."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mcp_auth_proxy.config.settings import IdpSettings, ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, ConfigHint, DocumentRefused
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import discovery
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher, Response

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class MetadataLookup:
    """One address that was asked for a document. ``found`` is None where it is not there, or ``error`` says why."""

    document: str
    url: str
    response: Response | None = None
    found: ResourceMetadata | ServerMetadata | None = None
    error: AuthorizationError | None = None


Observer = Callable[[MetadataLookup], None]
"""Told of each look once it is over."""


def ignore_lookup(look: MetadataLookup) -> None:
    """Nobody watches: a running proxy tells of what went wrong, not of each step."""


class Discoverer:
    """Reads the documents, and knows which addresses they may lead to. Raises AuthorizationError throughout."""

    def __init__(self, *, fetcher: Fetcher, allow_private: tuple[str, ...], observe: Observer = ignore_lookup) -> None:
        self._fetcher = fetcher
        self.allow_private = allow_private
        self._observe = observe

    def policy(self, url: str) -> AddressPolicy:
        """Return the addresses that documents may lead to where they start from a configured URL."""
        return AddressPolicy.for_upstream(url, self.allow_private)

    async def discover(
        self, server: ServerSettings, challenge: BearerChallenge | None
    ) -> tuple[ResourceMetadata | None, ServerMetadata]:
        """Return the metadata of the resource, None where it has none, and of its authorization server."""
        oauth = server.oauth
        if oauth.metadata is not None:
            with self._look(discovery.SERVER_METADATA, "") as look:
                look.found = metadata = discovery.configured_server_metadata(oauth.metadata, issuer=oauth.issuer)
            return None, metadata
        policy = self.policy(server.url)
        resource = await self.resource_metadata(server, challenge)
        if resource is not None:
            issuer = _issuer(server, resource)
            metadata = await self._server_metadata(issuer, policy)
        elif oauth.issuer is not None:
            metadata = await self._server_metadata(oauth.issuer, policy)
        else:
            metadata = await self._legacy_metadata(server, policy)
        if oauth.grant is GrantType.AUTHORIZATION_CODE:
            discovery.require_authorization_endpoint(metadata)
            discovery.require_pkce(metadata, allow_missing=oauth.allow_missing_pkce, server=server.name)
        return resource, metadata

    async def identity_provider(self, idp: IdpSettings) -> tuple[str, tuple[str, ...] | None]:
        """Return the token endpoint of an identity provider, and the ways of authenticating that it says it knows."""
        if idp.token_endpoint is not None:
            return idp.token_endpoint, None
        if idp.issuer is None:
            raise ValueError("the identity provider has neither issuer nor token endpoint")
        metadata = await self._server_metadata(idp.issuer, self.policy(idp.issuer))
        return metadata.token_endpoint, metadata.token_endpoint_auth_methods_supported

    async def resource_metadata(
        self, server: ServerSettings, challenge: BearerChallenge | None
    ) -> ResourceMetadata | None:
        """RFC 9728 §3 and §5: the URL of the challenge, then the well-known ones. None: the server has none."""
        policy = self.policy(server.url)
        named = self._named(server, challenge)
        for url in discovery.resource_metadata_urls(server.url, named):
            with self._look(discovery.RESOURCE_METADATA, url) as look:
                look.response = response = await self._fetcher.get(url, document=look.document, policy=policy)
                if _is_document(response, required=url == named):
                    look.found = found = discovery.read_resource_metadata(response.body, url=url, server_url=server.url)
                    return found
                if response.status >= 500:
                    raise _answered_badly(look.document, url, response)
        return None

    def _named(self, server: ServerSettings, challenge: BearerChallenge | None) -> str | None:
        """The URL of the challenge. What is no absolute URL counts as absent, as it does for other clients."""
        if challenge is None or challenge.resource_metadata is None or challenge.names_metadata:
            return challenge.resource_metadata if challenge else None
        problem = (
            f"the challenge of server {server.name} names it by {challenge.resource_metadata[:200]!r}, which is no "
            f"absolute URL; well-known addresses are tried"
        )
        passed_over = DocumentRefused(discovery.RESOURCE_METADATA, "", problem, "RFC 9728 §5.1")
        self._observe(MetadataLookup(discovery.RESOURCE_METADATA, "", error=passed_over))
        logger.warning("%s", passed_over)
        return None

    async def _server_metadata(self, issuer: str, policy: AddressPolicy) -> ServerMetadata:
        found = await self._find_server_metadata(issuer, policy, legacy=False)
        if found is None:
            raise DocumentRefused(
                discovery.SERVER_METADATA,
                issuer,
                "none was found at any of its well-known addresses; where the server has none, "
                "give it in the key oauth.metadata",
                "RFC 8414 §3",
                remedy=ConfigHint("oauth.metadata"),
            )
        return found

    async def _legacy_metadata(self, server: ServerSettings, policy: AddressPolicy) -> ServerMetadata:
        """MCP 2025-03-26: without resource metadata the server's origin is its own authorization server."""
        found = await self._find_server_metadata(urls.raw_origin(server.url), policy, legacy=True)
        return found or discovery.legacy_server_metadata(server.url)

    async def _find_server_metadata(self, issuer: str, policy: AddressPolicy, *, legacy: bool) -> ServerMetadata | None:
        failed: AuthorizationServerUnavailable | None = None
        for url in discovery.authorization_server_metadata_urls(issuer):
            with self._look(discovery.SERVER_METADATA, url) as look:
                look.response = response = await self._fetcher.get(url, document=look.document, policy=policy)
                if _is_document(response, required=False):
                    look.found = found = discovery.read_server_metadata(
                        response.body, url=url, issuer=issuer, policy_http_loopback=policy.loopback, legacy=legacy
                    )
                    return found
                if response.status >= 500:
                    look.error = failed = _answered_badly(look.document, url, response)
        if failed is not None:
            raise failed
        return None

    @contextmanager
    def _look(self, document: str, url: str) -> Iterator[MetadataLookup]:
        look = MetadataLookup(document, url)
        try:
            yield look
        except AuthorizationError as error:
            look.error = error
            raise
        finally:
            self._observe(look)


def _issuer(server: ServerSettings, resource: ResourceMetadata) -> str:
    offered = resource.authorization_servers
    pinned = server.oauth.issuer
    if pinned is None:
        return offered[0]
    if pinned in offered:
        return pinned
    raise AuthorizationError(
        f"Server {server.name} names {', '.join(offered)} as its authorization server, but "
        f"servers.{server.name}.oauth.issuer pins {pinned}. If the move is genuine, change that key.",
        remedy=ConfigHint("oauth.issuer", offered[0]),
    )


def _is_document(response: Response, *, required: bool) -> bool:
    """Whether an answer is meant as the document.

    Sites answer 200 with a page of their own at addresses they do not know; where the address was only guessed,
    that is no document. Where the server named it, or says that it is JSON (RFC 8414 §3.2, RFC 9728 §3.2), it is one,
    and the validator says what is wrong with it.
    """
    if response.status != 200:
        return False
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    says_json = kind == "application/json" or kind.endswith("+json")
    return required or says_json or response.body.lstrip()[:1] == b"{"


def _answered_badly(document: str, url: str, response: Response) -> AuthorizationServerUnavailable:
    return AuthorizationServerUnavailable(f"The {document} at {url} can't be read: HTTP {response.status}.")
