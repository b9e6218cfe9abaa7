"""Discovery: find the authorization server of an MCP server, and read the metadata of both."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mcp_auth_proxy.config.settings import IdpSettings, ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    ConfigHint,
    DocumentRefused,
    excerpt,
)
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import discovery, retry_after
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher, Response
from mcp_auth_proxy.observability.peer_log import PeerLog

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class MetadataLookup:
    """One request for a metadata document. ``found`` is None if it is not there; ``error`` says why, if known."""

    document: str
    url: str
    response: Response | None = None
    found: ResourceMetadata | ServerMetadata | None = None
    error: AuthorizationError | None = None


Observer = Callable[[MetadataLookup], None]
"""Called with each lookup when it has ended."""


def ignore_lookup(lookup: MetadataLookup) -> None:
    """Do nothing: a running proxy reports failures only, not each step."""


class Discoverer:
    """Fetch and validate metadata documents. All methods that fetch raise AuthorizationError."""

    def __init__(self, *, fetcher: Fetcher, allow_private: tuple[str, ...], observe: Observer = ignore_lookup) -> None:
        self._fetcher = fetcher
        self.allow_private = allow_private
        self._observe = observe
        self._ignored_log = PeerLog()

    def policy(self, url: str, server: ServerSettings | None = None) -> AddressPolicy:
        """Return which addresses may be fetched in a discovery that starts from a URL, that of ``server`` if given."""
        if server is None or server.allow_private is None:
            return AddressPolicy.for_upstream(url, self.allow_private)
        return AddressPolicy.for_upstream(url, (*self.allow_private, *server.allow_private), trusted=False)

    async def discover(
        self, server: ServerSettings, challenge: BearerChallenge | None
    ) -> tuple[ResourceMetadata | None, ServerMetadata]:
        """Return the metadata of the resource, None if it has none, and the metadata of its authorization server."""
        oauth = server.oauth
        if oauth.metadata is not None:
            with self._lookup(discovery.SERVER_METADATA, "") as lookup:
                lookup.found = metadata = discovery.configured_server_metadata(oauth.metadata, issuer=oauth.issuer)
            return None, metadata
        policy = self.policy(server.url, server)
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
            if oauth.issuer is None:
                # It may load the public suffix list, which takes 50 ms.
                await asyncio.to_thread(discovery.require_own_authorization_endpoint, metadata, server=server.name)
        elif oauth.grant is GrantType.DEVICE_CODE and oauth.issuer is None:
            await asyncio.to_thread(discovery.require_own_device_endpoint, metadata, server=server.name)
        return resource, metadata

    async def server_metadata(self, server: ServerSettings, issuer: str) -> ServerMetadata:
        """Return the metadata of an authorization server that an earlier discovery for this server has found."""
        if server.oauth.metadata is not None:
            return discovery.configured_server_metadata(server.oauth.metadata, issuer=server.oauth.issuer)
        policy = self.policy(server.url, server)
        if issuer != urls.raw_origin(server.url):
            return await self._server_metadata(issuer, policy)
        found = await self._find_server_metadata(issuer, policy, legacy=False)
        return found or discovery.legacy_server_metadata(server.url)

    async def identity_provider(self, server: ServerSettings, idp: IdpSettings) -> tuple[str, tuple[str, ...] | None]:
        """Return the token endpoint of the identity provider of a server, and the client authentication methods that it
        supports."""
        if idp.token_endpoint is not None:
            return idp.token_endpoint, None
        if idp.issuer is None:
            raise ValueError("the identity provider has neither issuer nor token endpoint")
        metadata = await self._server_metadata(idp.issuer, self.policy(idp.issuer, server))
        return metadata.token_endpoint, metadata.token_endpoint_auth_methods_supported

    async def resource_metadata(
        self, server: ServerSettings, challenge: BearerChallenge | None
    ) -> ResourceMetadata | None:
        """Return the metadata of a resource (RFC 9728 §3, §5); None if the server has none.

        The URL in the challenge is tried first, then the well-known URLs.
        """
        policy = self.policy(server.url, server)
        named = self._url_in_challenge(server, challenge)
        for url in discovery.resource_metadata_urls(server.url, named):
            with self._lookup(discovery.RESOURCE_METADATA, url) as lookup:
                lookup.response = response = await self._fetcher.get(url, document=lookup.document, policy=policy)
                if _is_document(response, required=url == named):
                    lookup.found = found = discovery.read_resource_metadata(
                        response.body, url=url, server_url=server.url
                    )
                    return found
                if retry_after.is_temporary(response.status):
                    raise _unavailable(lookup.document, url, response)
        return None

    def _url_in_challenge(self, server: ServerSettings, challenge: BearerChallenge | None) -> str | None:
        """Return the metadata URL in a challenge; a value that is not an absolute URL is ignored."""
        if challenge is None or challenge.resource_metadata is None or challenge.names_metadata:
            return challenge.resource_metadata if challenge else None
        problem = (
            f"the challenge of server {server.name} names it by {excerpt(challenge.resource_metadata)!r}, which is not "
            f"an absolute URL; well-known addresses are tried"
        )
        ignored = DocumentRefused(discovery.RESOURCE_METADATA, "", problem, "RFC 9728 §5.1")
        self._observe(MetadataLookup(discovery.RESOURCE_METADATA, "", error=ignored))
        if self._ignored_log.may_warn(server.name):
            logger.warning("%s", ignored)
        return None

    async def _server_metadata(self, issuer: str, policy: AddressPolicy) -> ServerMetadata:
        found = await self._find_server_metadata(issuer, policy, legacy=False)
        if found is None:
            raise DocumentRefused(
                discovery.SERVER_METADATA,
                issuer,
                "none was found at any of its well-known addresses; if the server has none, "
                "give it in the key oauth.metadata",
                "RFC 8414 §3",
                hint=ConfigHint("oauth.metadata"),
            )
        return found

    async def _legacy_metadata(self, server: ServerSettings, policy: AddressPolicy) -> ServerMetadata:
        """Return the metadata of a server without resource metadata: its own origin is its issuer (MCP 2025-03-26)."""
        found = await self._find_server_metadata(urls.raw_origin(server.url), policy, legacy=True)
        return found or discovery.legacy_server_metadata(server.url)

    async def _find_server_metadata(self, issuer: str, policy: AddressPolicy, *, legacy: bool) -> ServerMetadata | None:
        failed: AuthorizationServerUnavailable | None = None
        for url in discovery.authorization_server_metadata_urls(issuer):
            with self._lookup(discovery.SERVER_METADATA, url) as lookup:
                lookup.response = response = await self._fetcher.get(url, document=lookup.document, policy=policy)
                if _is_document(response, required=False):
                    lookup.found = found = discovery.read_server_metadata(
                        response.body, url=url, issuer=issuer, policy_http_loopback=policy.loopback, legacy=legacy
                    )
                    return found
                if retry_after.is_temporary(response.status):
                    lookup.error = failed = _unavailable(lookup.document, url, response)
        if failed is not None:
            raise failed
        return None

    @contextmanager
    def _lookup(self, document: str, url: str) -> Iterator[MetadataLookup]:
        """Record what happens to one request for a document, and report it to the observer."""
        lookup = MetadataLookup(document, url)
        try:
            yield lookup
        except AuthorizationError as error:
            lookup.error = error
            raise
        finally:
            self._observe(lookup)


def _issuer(server: ServerSettings, resource: ResourceMetadata) -> str:
    offered = resource.authorization_servers
    pinned = server.oauth.issuer
    if pinned is None:
        return offered[0]
    if pinned in offered:
        return pinned
    raise AuthorizationError(
        f"Server {server.name} names {excerpt(', '.join(offered))} as its authorization server, but "
        f"{server.key('oauth.issuer')} pins {pinned}. If the move is genuine, change that key.",
        hint=ConfigHint("oauth.issuer", offered[0]),
    )


def _is_document(response: Response, *, required: bool) -> bool:
    """Return whether a response is meant as the document.

    Many sites answer 200 with a web page at unknown addresses, so a page at a guessed URL is ignored. If the server
    named the URL, or declares JSON (RFC 8414 §3.2, RFC 9728 §3.2), the validator says what is wrong with it.
    """
    if response.status != 200:
        return False
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    declares_json = media_type == "application/json" or media_type.endswith("+json")
    return required or declares_json or response.body.lstrip()[:1] == b"{"


def _unavailable(document: str, url: str, response: Response) -> AuthorizationServerUnavailable:
    text = f"The {document} at {excerpt(url)} can't be read: HTTP {response.status}."
    return retry_after.unavailable(text, response.headers)
