"""Becoming a client of an authorization server: configured, by Client ID Metadata Document, or registered."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, RegistrationImpossible
from mcp_auth_proxy.models import ClientAuth, GrantType, Registration, RegistrationKind
from mcp_auth_proxy.oauth import client_auth, registration
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher
from mcp_auth_proxy.store.registrations import Registrations

logger = logging.getLogger(__name__)

Bind = Callable[[str, str, str], Awaitable[str]]
"""Server, client and issuer to the issuer that the client belongs to."""


class Clients:
    """Finds or makes the client identity for a server."""

    def __init__(
        self, *, fetcher: Fetcher, registrations: Registrations, public_url: str, clock: Callable[[], float]
    ) -> None:
        self._fetcher = fetcher
        self._registrations = registrations
        self._public_url = public_url
        self._clock = clock

    def redirect_uri(self, grant: GrantType) -> str:
        """Return the redirect URI of a grant; empty where it has no redirect."""
        return f"{self._public_url}/oauth/callback" if grant is GrantType.AUTHORIZATION_CODE else ""

    async def register(
        self,
        server: ServerSettings,
        metadata: ServerMetadata,
        policy: AddressPolicy,
        *,
        schemes: tuple[str, ...] = (),
    ) -> Registration:
        """Pre-registered client, then Client ID Metadata Document, then dynamic registration (RFC 7591).

        A workload that presents its own token needs no client identity at all. ``schemes`` are what the server asks
        for besides a token. Raises AuthorizationError.
        """
        known = await self._known(server, metadata, self._registrations.bind_client)
        if known is not None:
            return known
        return await self._register_dynamically(server, metadata, self._endpoint(server, metadata), policy, schemes)

    async def preview(self, server: ServerSettings, metadata: ServerMetadata) -> Registration:
        """Return what ``register`` would, but register nothing and write nothing. Raises AuthorizationError.

        A client that is still to be registered has an empty ``client_id``.
        """

        async def bound(name: str, client_id: str, issuer: str) -> str:
            return await self._registrations.bound_issuer(name, client_id) or issuer

        known = await self._known(server, metadata, bound)
        if known is not None:
            return known
        self._endpoint(server, metadata)
        method = self._method(server, metadata)
        return self._registration(server, metadata, RegistrationKind.DYNAMIC, "", method or ClientAuth.NONE)

    async def _known(self, server: ServerSettings, metadata: ServerMetadata, bind: Bind) -> Registration | None:
        """The client that need not be registered; None where there is none."""
        oauth = server.oauth
        if oauth.client_id is not None or oauth.grant.unattended:
            return await self._configured(server, metadata, oauth.client_id or "", bind)
        document_url = oauth.client_metadata_url
        if document_url is None and self._public_url.startswith("https://"):
            document_url = f"{self._public_url}/oauth/client-metadata.json"
        # The document promises to use no secret.
        public = oauth.client_auth in (None, ClientAuth.NONE)
        if document_url is not None and public and metadata.client_id_metadata_document_supported:
            return self._registration(
                server, metadata, RegistrationKind.METADATA_DOCUMENT, document_url, ClientAuth.NONE
            )
        stored = await self._registrations.find(server.name, metadata.issuer, self.redirect_uri(oauth.grant))
        if stored is None or self._lapsed(stored) or oauth.client_auth not in (None, stored.client_auth):
            return None
        return stored

    def _endpoint(self, server: ServerSettings, metadata: ServerMetadata) -> str:
        if metadata.registration_endpoint is not None:
            return metadata.registration_endpoint
        where = self.redirect_uri(server.oauth.grant)
        raise RegistrationImpossible(
            f"The authorization server {metadata.issuer} registers no clients by itself. Register one there by hand "
            f"{f'with the redirect URI {where}' if where else 'for device codes'}, and put it in "
            f"servers.{server.name}.oauth.client_id (and client_secret)."
        )

    def _method(self, server: ServerSettings, metadata: ServerMetadata) -> ClientAuth | None:
        """What a registration asks for, as configured or as the server lists it."""
        return registration.method(
            metadata,
            redirect_uri=self.redirect_uri(server.oauth.grant),
            configured=server.oauth.client_auth,
            server=server.name,
        )

    async def forget(self, client: Registration) -> None:
        """Drop a dynamic registration that its server no longer knows, so that the next plan makes a new one."""
        if client.kind is RegistrationKind.DYNAMIC:
            await self._registrations.delete(client.server, client.issuer)

    async def forget_all(self, server: ServerSettings) -> None:
        """Drop every dynamic registration that was made for a server."""
        await self._registrations.delete(server.name)

    def _lapsed(self, client: Registration) -> bool:
        return client.secret_expires_at is not None and client.secret_expires_at <= self._clock()

    async def _configured(
        self, server: ServerSettings, metadata: ServerMetadata, client_id: str, bind: Bind
    ) -> Registration:
        """Credentials of the configuration go to the issuer that they were first used with, and to no other."""
        oauth = server.oauth
        if oauth.issuer is None:
            bound = await bind(server.name, client_id, metadata.issuer)
            if bound != metadata.issuer:
                raise AuthorizationError(
                    f"Server {server.name} now names the authorization server {metadata.issuer}, but its configured "
                    f"client has been used with {bound} and is sent to no other. If the move is genuine, set "
                    f"servers.{server.name}.oauth.issuer to {metadata.issuer}.",
                    hint=ConfigHint("oauth.issuer", metadata.issuer),
                )
        secret = oauth.client_secret.value if oauth.client_secret else None
        method = client_auth.choose(
            metadata.token_endpoint_auth_methods_supported,
            configured=oauth.client_auth,
            has_secret=secret is not None,
            has_key=oauth.private_key is not None,
        )
        if method is ClientAuth.PRIVATE_KEY_JWT:
            _check_algorithm(server, metadata)
        return self._registration(server, metadata, RegistrationKind.CONFIGURED, client_id, method, secret)

    async def _register_dynamically(
        self,
        server: ServerSettings,
        metadata: ServerMetadata,
        endpoint: str,
        policy: AddressPolicy,
        schemes: tuple[str, ...],
    ) -> Registration:
        asked = self._method(server, metadata)
        response = await self._fetcher.post(
            endpoint,
            body=registration.build_request(asked, redirect_uri=self.redirect_uri(server.oauth.grant)),
            content_type="application/json",
            headers=[],
            document="client registration",
            policy=policy,
        )
        if metadata.is_fallback and registration.is_not_oauth(response.status, response.body):
            raise registration.oauth_not_found(endpoint, response.status, server=server.name, schemes=schemes)
        answer = registration.read_response(
            response.status,
            response.body,
            url=endpoint,
            server=server.name,
            supported=metadata.token_endpoint_auth_methods_supported,
            requested=asked,
            configured=server.oauth.client_auth,
        )
        client = replace(
            self._registration(
                server, metadata, RegistrationKind.DYNAMIC, answer.client_id, answer.client_auth, answer.client_secret
            ),
            secret_expires_at=answer.secret_expires_at,
        )
        await self._registrations.save(client)
        logger.info("registered with %s for server %s", metadata.issuer, server.name)
        return client

    def _registration(
        self,
        server: ServerSettings,
        metadata: ServerMetadata,
        kind: RegistrationKind,
        client_id: str,
        method: ClientAuth,
        secret: str | None = None,
    ) -> Registration:
        return Registration(
            server=server.name,
            issuer=metadata.issuer,
            client_id=client_id,
            client_auth=method,
            kind=kind,
            client_secret=secret,
            redirect_uri=self.redirect_uri(server.oauth.grant),
            created_at=self._clock(),
        )


def _check_algorithm(server: ServerSettings, metadata: ServerMetadata) -> None:
    """RFC 8414 §2: better said here than as an ``invalid_client`` that gives no reason."""
    key, known = server.oauth.private_key, metadata.token_endpoint_auth_signing_alg_values_supported
    if key is not None and known and key.algorithm not in known:
        raise AuthorizationError(
            f"The authorization server {metadata.issuer} takes signatures by {', '.join(known)} "
            f"(token_endpoint_auth_signing_alg_values_supported, RFC 8414 §2), and the key signs with "
            f"{key.algorithm}. Set servers.{server.name}.oauth.signing_alg, or private_key to a key that can."
        )
