"""Which client of the API stands for us at a server's authorization server, and with which secret now."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import ClientNotActive
from mcp_auth_proxy.models import ClientAuth, OAuthClient, OAuthClientStatus, Registration
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import client_auth, discovery
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.store.oauth_clients import OAuthClients

REVOKED = "client_revoked: the OAuth client that it was made with was revoked"
"""Why the grants of a revoked client have ended."""

CHANGED = "client_changed: the OAuth client that it was made with has another client_id or token_url now"
"""Why the grants of a client end that stands for another one now."""


class ClientDirectory:
    """Find clients of the API. Every method raises StoreError."""

    def __init__(self, clients: OAuthClients) -> None:
        self._clients = clients

    async def named_for(self, server: ServerSettings) -> OAuthClient | None:
        """Return the client that names a server; None if there is none, or if the configuration names one itself.

        Raises ClientNotActive if it can't be used for new authorizations.
        """
        return await self._find(server, lambda client: server.server_id in client.server_ids)

    async def at_endpoint(self, server: ServerSettings, token_endpoint: str) -> OAuthClient | None:
        """Return the client of a server's project that names no server and has this very token endpoint, or None.

        Raises ClientNotActive if it can't be used for new authorizations.
        """
        return await self._find(server, lambda client: not client.server_ids and client.token_url == token_endpoint)

    async def _find(self, server: ServerSettings, is_for: Callable[[OAuthClient], bool]) -> OAuthClient | None:
        if server.oauth.client_id is not None or server.oauth.grant.unattended:
            return None
        found = [client for client in await self._clients.of_project(server.project) if is_for(client)]
        active = next((client for client in found if client.status is OAuthClientStatus.ACTIVE), None)
        if active is None and found:
            raise ClientNotActive(server.name, found[0].provider_name, found[0].status)
        return active

    async def with_secret(self, registration: Registration, url: str) -> Registration:
        """Return a registration with the secret that its client has now, for a request to ``url``; any other as it is.

        Raises ClientNotActive if the client was revoked, deleted, is another one now, or has its token endpoint at
        another origin: its grants end in a moment, and its new secret is not for the old place.
        """
        if registration.oauth_client is None:
            return registration
        client = await self._clients.get(registration.oauth_client)
        if client is None or client.status is OAuthClientStatus.REVOKED or not _is_at(client, registration, url):
            provider = client.provider_name if client else registration.client_id
            raise ClientNotActive(registration.server, provider, OAuthClientStatus.REVOKED)
        return replace(registration, client_secret=client.client_secret)


WithSecret = Callable[[Registration, str], Awaitable[Registration]]
"""Returns a registration with the secret that it has now, for a request to a URL."""


def _is_at(client: OAuthClient, registration: Registration, url: str) -> bool:
    """Return whether a client is still the one of a registration, and its secret is for the origin of a URL."""
    if client.client_id != registration.client_id:
        return False
    return urls.parse(client.token_url).origin == urls.parse(url).origin


async def unchanged(registration: Registration, url: str) -> Registration:
    """Return a registration as it is: where there is no API there are none of its clients."""
    return registration


def metadata_of(client: OAuthClient) -> dict[str, object]:
    """Return what replaces discovery for a server that a client names (RFC 8414 §2)."""
    issuer, document = client.metadata.get("issuer"), client.metadata.get("discovery_url")
    if not isinstance(issuer, str) and isinstance(document, str):
        issuer = discovery.issuer_of_document(document)
    return {
        "authorization_endpoint": client.authorization_url,
        "token_endpoint": client.token_url,
        **({"issuer": issuer} if isinstance(issuer, str) else {}),
    }


def endpoints_of(client: OAuthClient, metadata: ServerMetadata) -> ServerMetadata:
    """Return metadata that named the token endpoint of a client, with the client's own place for users.

    Any server can name that endpoint. Its users must see where the client leads them (T78), and its other endpoints
    must not be sent the client's secret (T68): only those at the token endpoint's origin, which knows it already.
    """
    return replace(
        metadata,
        authorization_endpoint=client.authorization_url,
        revocation_endpoint=revocation_endpoint(metadata),
        device_authorization_endpoint=_beside_tokens(metadata, metadata.device_authorization_endpoint),
    )


def revocation_endpoint(metadata: ServerMetadata) -> str | None:
    """Return the revocation endpoint if it may be sent the secret of a client of the API."""
    return _beside_tokens(metadata, metadata.revocation_endpoint)


def _beside_tokens(metadata: ServerMetadata, endpoint: str | None) -> str | None:
    own = urls.parse(metadata.token_endpoint).origin
    return endpoint if endpoint is not None and urls.parse(endpoint).origin == own else None


def method_of(client: OAuthClient, metadata: ServerMetadata) -> ClientAuth:
    """Return how a client authenticates: as its metadata says, else as the authorization server supports."""
    configured = client.metadata.get("token_auth_method")
    return client_auth.choose(
        metadata.token_endpoint_auth_methods_supported,
        configured=ClientAuth(configured) if isinstance(configured, str) else None,
        has_secret=client.client_secret is not None,
    )
