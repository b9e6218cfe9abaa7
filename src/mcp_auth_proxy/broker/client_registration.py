"""Become a client of an authorization server: configured, by Client ID Metadata Document, or registered."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from mcp_auth_proxy.broker.oauth_clients import method_of
from mcp_auth_proxy.broker.turns import take_turn
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, RegistrationImpossible, excerpt
from mcp_auth_proxy.models import Account, ClientAuth, GrantType, OAuthClient, Registration, RegistrationKind
from mcp_auth_proxy.oauth import client_auth, registration, retry_after
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher
from mcp_auth_proxy.store.registrations import Registrations, registration_lease

logger = logging.getLogger(__name__)

Bind = Callable[[str, str, str], Awaitable[str]]
"""From server, client id and issuer to the issuer that the client id is bound to."""


_CALLBACK = "/oauth/callback"

LONGEST_TURN = 20.0
"""Seconds after which another process may register though one that has begun has not finished."""


def redirect_uri(public_url: str, grant: GrantType) -> str:
    """Return the redirect URI for a grant type; empty if it has no redirect."""
    return f"{public_url}{_CALLBACK}" if grant is GrantType.AUTHORIZATION_CODE else ""


def public_url_of(redirect_uri: str) -> str:
    """Return the ``public_url`` that a redirect URI was made from."""
    return redirect_uri.removesuffix(_CALLBACK)


class ClientRegistrar:
    """Find or register the client identity for an account of a server."""

    def __init__(
        self, *, fetcher: Fetcher, registrations: Registrations, public_url: str, clock: Callable[[], float]
    ) -> None:
        self._fetcher = fetcher
        self._registrations = registrations
        self._public_url = public_url
        self._clock = clock

    async def register(
        self,
        account: Account,
        server: ServerSettings,
        metadata: ServerMetadata,
        policy: AddressPolicy,
        *,
        schemes: tuple[str, ...] = (),
    ) -> Registration:
        """Return a configured client, else a Client ID Metadata Document, else a dynamic registration (RFC 7591).

        A workload that presents its own token needs no client identity. ``schemes`` are the authentication schemes
        other than Bearer that the MCP server asked for. Raises AuthorizationError and StoreError.
        """
        known = await self._known(account, server, metadata, self._registrations.bind_client)
        if known is not None:
            return known
        endpoint = self._registration_endpoint(server, metadata)

        async def look() -> Registration | None:
            return await self._known(account, server, metadata, self._registrations.bind_client)

        return await self._register_once(account, server, metadata, endpoint, policy, look, schemes)

    async def _register_once(
        self,
        account: Account,
        server: ServerSettings,
        metadata: ServerMetadata,
        endpoint: str,
        policy: AddressPolicy,
        look: Callable[[], Awaitable[Registration | None]],
        schemes: tuple[str, ...] = (),
    ) -> Registration:
        """Register in one process at a time: servers keep every client. ``look`` finds what another has registered."""
        uri = redirect_uri(self._public_url, server.oauth.grant)

        async def register() -> Registration:
            # What is stored can't be used any more, and is replaced.
            before = await self._stored(account, server, metadata)
            new = await self._register_dynamically(account, server, metadata, endpoint, policy, schemes)
            return await self._registrations.add(new, replaces=None if before is None else before.client_id)

        return await take_turn(
            self._registrations.leases,
            registration_lease(server.name, metadata.issuer, account.name, uri),
            clock=self._clock,
            longest=LONGEST_TURN,
            look=look,
            work=register,
        )

    def stand_for(
        self, client: OAuthClient, account: Account, server: ServerSettings, metadata: ServerMetadata
    ) -> Registration:
        """Return the registration that stands for a client of the API. It holds no secret: that is read at each use."""
        method = method_of(client, metadata)
        kind = RegistrationKind.OAUTH_CLIENT
        registration = self._registration(account, server, metadata, kind, client.client_id, method)
        return replace(registration, oauth_client=client.id)

    async def register_again(
        self,
        account: Account,
        server: ServerSettings,
        metadata: ServerMetadata,
        policy: AddressPolicy,
        *,
        replaces: str,
    ) -> Registration:
        """Register a new client, in place of the one with the id ``replaces``, unless another process already has.

        Raises AuthorizationError and StoreError.
        """
        endpoint = self._registration_endpoint(server, metadata)

        async def look() -> Registration | None:
            stored = await self._stored(account, server, metadata)
            return None if stored is None or stored.client_id == replaces or self._has_expired(stored) else stored

        return await self._register_once(account, server, metadata, endpoint, policy, look)

    async def preview(self, account: Account, server: ServerSettings, metadata: ServerMetadata) -> Registration:
        """Return what ``register`` would, without registering or storing anything.

        A client that would have to be registered has an empty ``client_id``. Raises AuthorizationError and StoreError.
        """

        async def bound(name: str, client_id: str, issuer: str) -> str:
            return await self._registrations.bound_issuer(name, client_id) or issuer

        known = await self._known(account, server, metadata, bound)
        if known is not None:
            return known
        self._registration_endpoint(server, metadata)
        method = self._method(server, metadata)
        return self._registration(account, server, metadata, RegistrationKind.DYNAMIC, "", method or ClientAuth.NONE)

    async def _known(
        self, account: Account, server: ServerSettings, metadata: ServerMetadata, bind: Bind
    ) -> Registration | None:
        """Return a client that need not be registered; None if there is none."""
        oauth = server.oauth
        if oauth.client_id is not None or oauth.grant.unattended:
            return await self._configured(account, server, metadata, oauth.client_id or "", bind)
        document_url = oauth.client_metadata_url
        if document_url is None and self._public_url.startswith("https://"):
            document_url = f"{self._public_url}/oauth/client-metadata.json"
        # The document declares a public client, which has no secret.
        public = oauth.client_auth in (None, ClientAuth.NONE)
        if document_url is not None and public and metadata.client_id_metadata_document_supported:
            return self._registration(
                account, server, metadata, RegistrationKind.METADATA_DOCUMENT, document_url, ClientAuth.NONE
            )
        stored = await self._stored(account, server, metadata)
        if stored is None or self._has_expired(stored) or oauth.client_auth not in (None, stored.client_auth):
            return None
        return stored

    async def _stored(self, account: Account, server: ServerSettings, metadata: ServerMetadata) -> Registration | None:
        uri = redirect_uri(self._public_url, server.oauth.grant)
        return await self._registrations.find(server.name, metadata.issuer, uri, account=account.name)

    def _registration_endpoint(self, server: ServerSettings, metadata: ServerMetadata) -> str:
        if metadata.registration_endpoint is not None:
            return metadata.registration_endpoint
        uri = redirect_uri(self._public_url, server.oauth.grant)
        raise RegistrationImpossible(
            f"The authorization server {excerpt(metadata.issuer)} does not support dynamic client registration. "
            f"Register a client there by hand {f'with the redirect URI {uri}' if uri else 'for device codes'}, and "
            f"put it in {server.key('oauth.client_id')} (and client_secret)."
        )

    def _method(self, server: ServerSettings, metadata: ServerMetadata) -> ClientAuth | None:
        """Return the client authentication method to register with: as configured, else as the server lists."""
        return registration.method(
            metadata,
            redirect_uri=redirect_uri(self._public_url, server.oauth.grant),
            configured=server.oauth.client_auth,
            server=server.name,
        )

    async def forget(self, client: Registration) -> None:
        """Delete a dynamic registration that its server no longer knows, so that the next plan makes a new one."""
        if client.kind is RegistrationKind.DYNAMIC:
            await self._registrations.delete(client.server, client.issuer, account=client.account)

    async def forget_all(self, account: Account) -> None:
        """Delete all dynamic registrations of an account."""
        await self._registrations.delete(account.server, account=account.name)

    def _has_expired(self, client: Registration) -> bool:
        return client.secret_expires_at is not None and client.secret_expires_at <= self._clock()

    async def _configured(
        self, account: Account, server: ServerSettings, metadata: ServerMetadata, client_id: str, bind: Bind
    ) -> Registration:
        """Return the configured client. Its credentials go only to the issuer that they were first used with."""
        oauth = server.oauth
        if oauth.issuer is None:
            bound = await bind(server.name, client_id, metadata.issuer)
            if bound != metadata.issuer:
                raise AuthorizationError(
                    f"Server {server.name} now names the authorization server {excerpt(metadata.issuer)}, but its "
                    f"configured client was first used with {excerpt(bound)} and is not sent to any other. If the move "
                    f"is genuine, set {server.key('oauth.issuer')} to {excerpt(metadata.issuer)}.",
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
        return self._registration(account, server, metadata, RegistrationKind.CONFIGURED, client_id, method, secret)

    async def _register_dynamically(
        self,
        account: Account,
        server: ServerSettings,
        metadata: ServerMetadata,
        endpoint: str,
        policy: AddressPolicy,
        schemes: tuple[str, ...],
    ) -> Registration:
        method = self._method(server, metadata)
        response = await self._fetcher.post(
            endpoint,
            body=registration.build_request(method, redirect_uri=redirect_uri(self._public_url, server.oauth.grant)),
            content_type="application/json",
            headers=[],
            document="client registration",
            policy=policy,
        )
        with retry_after.attached(response.headers):
            if metadata.is_fallback and registration.is_not_oauth(response.status, response.body):
                raise registration.oauth_not_found(endpoint, response.status, server=server.name, schemes=schemes)
            registered = registration.read_response(
                response.status,
                response.body,
                url=endpoint,
                server=server.name,
                supported=metadata.token_endpoint_auth_methods_supported,
                requested=method,
                configured=server.oauth.client_auth,
            )
        client = replace(
            self._registration(
                account,
                server,
                metadata,
                RegistrationKind.DYNAMIC,
                registered.client_id,
                registered.client_auth,
                registered.client_secret,
            ),
            secret_expires_at=registered.secret_expires_at,
        )
        logger.info("registered with %s for server %s", excerpt(metadata.issuer), server.name)
        return client

    def _registration(
        self,
        account: Account,
        server: ServerSettings,
        metadata: ServerMetadata,
        kind: RegistrationKind,
        client_id: str,
        method: ClientAuth,
        secret: str | None = None,
    ) -> Registration:
        return Registration(
            server=server.name,
            account=account.name,
            issuer=metadata.issuer,
            client_id=client_id,
            client_auth=method,
            kind=kind,
            client_secret=secret,
            redirect_uri=redirect_uri(self._public_url, server.oauth.grant),
            created_at=self._clock(),
        )


def _check_algorithm(server: ServerSettings, metadata: ServerMetadata) -> None:
    """Raise AuthorizationError if the server does not accept the key's algorithm (RFC 8414 §2).

    The server itself would only say ``invalid_client``, without a reason.
    """
    key, supported = server.oauth.private_key, metadata.token_endpoint_auth_signing_alg_values_supported
    if key is not None and supported and key.algorithm not in supported:
        raise AuthorizationError(
            f"The authorization server {excerpt(metadata.issuer)} accepts signatures by "
            f"{excerpt(', '.join(supported))} "
            f"(token_endpoint_auth_signing_alg_values_supported, RFC 8414 §2), but the key signs with "
            f"{key.algorithm}. Set {server.key('oauth.signing_alg')}, or private_key to a key for one of them."
        )
