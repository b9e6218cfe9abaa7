"""From a challenge to a grant: discovery, registration, scopes, then a flow for the user or a token at once."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    DocumentRefused,
    RegistrationImpossible,
)
from mcp_auth_proxy.models import (
    Attempt,
    ClientAuth,
    Endpoints,
    Flow,
    Grant,
    GrantKey,
    GrantType,
    Principal,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.oauth import client_auth, discovery, registration, revocation, scopes, token_endpoint
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher, Response
from mcp_auth_proxy.store.registrations import Registrations

logger = logging.getLogger(__name__)

DISCOVERY_DEADLINE = 15.0
"""Seconds for all documents of one discovery together."""

FLOW_LIFETIME = 600.0
"""Seconds that a link can be used."""

_SECRET_FIELDS = frozenset({"code", "code_verifier", "refresh_token"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that was found out and decided before anybody is asked for consent."""

    server: ServerSettings
    key: GrantKey
    metadata: ServerMetadata
    registration: Registration
    scopes: tuple[str, ...]

    @property
    def endpoints(self) -> Endpoints:
        return Endpoints(
            authorization=self.metadata.authorization_endpoint,
            token=self.metadata.token_endpoint,
            revocation=self.metadata.revocation_endpoint,
        )


class Authorizer:
    """Talks to resource metadata and authorization servers; holds no grants of its own."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        registrations: Registrations,
        public_url: str,
        allow_private: tuple[str, ...],
        clock: Callable[[], float],
    ) -> None:
        self._fetcher = fetcher
        self._registrations = registrations
        self._public_url = public_url
        self._allow_private = allow_private
        self._clock = clock

    @property
    def redirect_uri(self) -> str:
        return f"{self._public_url}/oauth/callback"

    def policy(self, server: ServerSettings) -> AddressPolicy:
        """Return the addresses that the OAuth documents of this server may lead to."""
        return AddressPolicy.for_upstream(server.url, self._allow_private)

    # From a challenge to a plan

    async def plan(
        self, principal: Principal, server: ServerSettings, challenge: BearerChallenge | None, already: tuple[str, ...]
    ) -> Plan:
        """Return what to ask for, and where; ``already`` are scopes that must not be lost in a step-up.

        Raises AuthorizationError, naming the document, its URL and the rule it breaks.
        """
        try:
            async with asyncio.timeout(DISCOVERY_DEADLINE):
                resource, metadata = await self._discover(server, challenge)
                client = await self._register(server, metadata)
        except TimeoutError:
            raise AuthorizationServerUnavailable(
                f"Discovery for server {server.name} did not end within {DISCOVERY_DEADLINE:.0f} s."
            ) from None
        oauth = server.oauth
        chosen = scopes.choose(
            configured=oauth.scopes,
            challenged=challenge.scopes if challenge else None,
            supported_by_resource=resource.scopes_supported if resource else None,
            supported_by_server=metadata.scopes_supported,
            already=already,
            offline_access=oauth.grant is GrantType.AUTHORIZATION_CODE,
        )
        key = GrantKey(
            principal=principal.id,
            server=server.name,
            resource=self._resource(server, resource),
            issuer=metadata.issuer,
        )
        return Plan(server=server, key=key, metadata=metadata, registration=client, scopes=chosen)

    @staticmethod
    def _resource(server: ServerSettings, metadata: ResourceMetadata | None) -> str:
        """RFC 8707 §2: the resource's own spelling where it has one, for it compares strings."""
        match server.oauth.resource:
            case "omit":
                return ""
            case "auto":
                return metadata.resource if metadata else discovery.canonical_resource(server.url)
            case exact:
                return exact

    async def _discover(
        self, server: ServerSettings, challenge: BearerChallenge | None
    ) -> tuple[ResourceMetadata | None, ServerMetadata]:
        oauth = server.oauth
        if oauth.metadata is not None:
            return None, discovery.configured_server_metadata(oauth.metadata, issuer=oauth.issuer)
        policy = self.policy(server)
        resource = await self._resource_metadata(server, challenge, policy)
        if resource is not None:
            issuer = self._issuer(server, resource)
            metadata = await self._server_metadata(issuer, policy)
        elif oauth.issuer is not None:
            metadata = await self._server_metadata(oauth.issuer, policy)
        else:
            metadata = await self._legacy_metadata(server, policy)
        if oauth.grant is GrantType.AUTHORIZATION_CODE:
            discovery.require_pkce(metadata, allow_missing=oauth.allow_missing_pkce, server=server.name)
        return resource, metadata

    @staticmethod
    def _issuer(server: ServerSettings, resource: ResourceMetadata) -> str:
        offered = resource.authorization_servers
        pinned = server.oauth.issuer
        if pinned is None:
            return offered[0]
        if pinned in offered:
            return pinned
        raise AuthorizationError(
            f"Server {server.name} names {', '.join(offered)} as its authorization server, but "
            f"servers.{server.name}.oauth.issuer pins {pinned}. If the move is genuine, change that key."
        )

    async def _resource_metadata(
        self, server: ServerSettings, challenge: BearerChallenge | None, policy: AddressPolicy
    ) -> ResourceMetadata | None:
        """RFC 9728 §3 and §5: the URL of the challenge, then the well-known ones. None: the server has none."""
        named = challenge.resource_metadata if challenge else None
        for url in discovery.resource_metadata_urls(server.url, named):
            response = await self._fetcher.get(url, document="protected resource metadata", policy=policy)
            if _is_document(response, required=url == named):
                return discovery.read_resource_metadata(response.body, url=url, server_url=server.url)
            if response.status >= 500:
                raise _answered_badly("protected resource metadata", url, response)
        return None

    async def _server_metadata(self, issuer: str, policy: AddressPolicy) -> ServerMetadata:
        found = await self._find_server_metadata(issuer, policy, legacy=False)
        if found is None:
            raise DocumentRefused(
                "authorization server metadata",
                issuer,
                "none was found at any of its well-known addresses; where the server has none, "
                "give it in the key oauth.metadata",
                "RFC 8414 §3",
            )
        return found

    async def _legacy_metadata(self, server: ServerSettings, policy: AddressPolicy) -> ServerMetadata:
        """MCP 2025-03-26: without resource metadata the server's origin is its own authorization server."""
        parts = urlsplit(server.url)
        found = await self._find_server_metadata(f"{parts.scheme}://{parts.netloc}", policy, legacy=True)
        return found or discovery.legacy_server_metadata(server.url)

    async def _find_server_metadata(
        self, issuer: str, policy: AddressPolicy, *, legacy: bool
    ) -> ServerMetadata | None:
        document = "authorization server metadata"
        failed: AuthorizationServerUnavailable | None = None
        for url in discovery.authorization_server_metadata_urls(issuer):
            response = await self._fetcher.get(url, document=document, policy=policy)
            if _is_document(response, required=False):
                return discovery.read_server_metadata(
                    response.body, url=url, issuer=issuer, policy_http_loopback=policy.loopback, legacy=legacy
                )
            if response.status >= 500:
                failed = _answered_badly(document, url, response)
        if failed is not None:
            raise failed
        return None

    # Becoming a client

    async def _register(self, server: ServerSettings, metadata: ServerMetadata) -> Registration:
        """Pre-registered client, then Client ID Metadata Document, then dynamic registration (RFC 7591)."""
        oauth = server.oauth
        if oauth.client_id is not None:
            return await self._configured(server, metadata, oauth.client_id)
        document_url = oauth.client_metadata_url
        if document_url is None and self._public_url.startswith("https://"):
            document_url = f"{self._public_url}/oauth/client-metadata.json"
        if document_url is not None and metadata.client_id_metadata_document_supported:
            return self._registration(
                server, metadata, RegistrationKind.METADATA_DOCUMENT, document_url, ClientAuth.NONE
            )
        stored = await self._registrations.find(server.name, metadata.issuer, self.redirect_uri)
        if stored is not None and not self._lapsed(stored):
            return stored
        if metadata.registration_endpoint is not None:
            return await self._register_dynamically(server, metadata, metadata.registration_endpoint)
        raise RegistrationImpossible(
            f"The authorization server {metadata.issuer} registers no clients by itself. Register one there by hand "
            f"with the redirect URI {self.redirect_uri}, and put it in servers.{server.name}.oauth.client_id "
            f"(and client_secret)."
        )

    def _lapsed(self, client: Registration) -> bool:
        return client.secret_expires_at is not None and client.secret_expires_at <= self._clock()

    async def _configured(self, server: ServerSettings, metadata: ServerMetadata, client_id: str) -> Registration:
        """Credentials of the configuration go to the issuer that they were first used with, and to no other."""
        oauth = server.oauth
        if oauth.issuer is None:
            bound = await self._registrations.bind_client(server.name, client_id, metadata.issuer)
            if bound != metadata.issuer:
                raise AuthorizationError(
                    f"Server {server.name} now names the authorization server {metadata.issuer}, but its configured "
                    f"client has been used with {bound} and is sent to no other. If the move is genuine, set "
                    f"servers.{server.name}.oauth.issuer to {metadata.issuer}."
                )
        secret = oauth.client_secret.value if oauth.client_secret else None
        method = client_auth.choose(
            metadata.token_endpoint_auth_methods_supported, configured=oauth.client_auth, has_secret=secret is not None
        )
        return self._registration(server, metadata, RegistrationKind.CONFIGURED, client_id, method, secret)

    async def _register_dynamically(
        self, server: ServerSettings, metadata: ServerMetadata, endpoint: str
    ) -> Registration:
        response = await self._fetcher.post(
            endpoint,
            body=registration.build_request(metadata, redirect_uri=self.redirect_uri),
            content_type="application/json",
            headers=[],
            document="client registration",
            policy=self.policy(server),
        )
        answer = registration.read_response(
            response.status,
            response.body,
            url=endpoint,
            server=server.name,
            supported=metadata.token_endpoint_auth_methods_supported,
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
            redirect_uri=self.redirect_uri,
            created_at=self._clock(),
        )

    async def forget_client(self, client: Registration) -> None:
        """Drop a dynamic registration that its server no longer knows, so that the next plan makes a new one."""
        if client.kind is RegistrationKind.DYNAMIC:
            await self._registrations.delete(client.server, client.issuer)

    # From a plan to tokens

    def flow(self, plan: Plan) -> Flow:
        """Return a new flow for the plan, not yet stored."""
        now = self._clock()
        return Flow(
            id=secrets.token_urlsafe(24),
            key=plan.key,
            registration=plan.registration,
            endpoints=plan.endpoints,
            scopes=plan.scopes,
            redirect_uri=self.redirect_uri,
            iss_supported=plan.metadata.iss_parameter_supported,
            extra_params=tuple(plan.server.oauth.authorization_params.items()),
            created_at=now,
            expires_at=now + FLOW_LIFETIME,
        )

    async def redeem(self, server: ServerSettings, flow: Flow, attempt: Attempt, code: str) -> Grant:
        """Exchange a code for tokens (RFC 6749 §4.1.3). Raises AuthorizationError."""
        tokens = await self._ask(
            server,
            flow.registration,
            flow.endpoints,
            token_endpoint.code_request(flow, attempt, code),
            requested=flow.scopes,
        )
        return Grant(
            key=flow.key,
            grant_type=GrantType.AUTHORIZATION_CODE,
            registration=flow.registration,
            endpoints=flow.endpoints,
            tokens=tokens,
            scopes=flow.scopes,
            granted_at=self._clock(),
        )

    async def obtain(self, plan: Plan) -> Grant:
        """Obtain a grant that needs no user (RFC 6749 §4.4). Raises AuthorizationError."""
        tokens = await self._ask(
            plan.server,
            plan.registration,
            plan.endpoints,
            token_endpoint.client_credentials_request(plan.key.resource, plan.scopes),
            requested=plan.scopes,
        )
        return Grant(
            key=plan.key,
            grant_type=GrantType.CLIENT_CREDENTIALS,
            registration=plan.registration,
            endpoints=plan.endpoints,
            tokens=tokens,
            scopes=plan.scopes,
            granted_at=self._clock(),
        )

    async def refresh(self, server: ServerSettings, grant: Grant) -> TokenSet:
        """Renew the tokens of a grant: by its refresh token, or by asking again where no user is needed."""
        if grant.grant_type is GrantType.CLIENT_CREDENTIALS:
            form = token_endpoint.client_credentials_request(grant.key.resource, grant.scopes)
        else:
            form = token_endpoint.refresh_request(grant)
        return await self._ask(
            server, grant.registration, grant.endpoints, form, requested=grant.scopes, previous=grant.tokens
        )

    async def revoke(self, server: ServerSettings, grant: Grant) -> bool:
        """Revoke upstream what the grant holds (RFC 7009). False where the server offers no revocation."""
        endpoint = grant.endpoints.revocation
        if endpoint is None:
            return False
        tokens = grant.tokens
        token, hint = (
            (tokens.refresh_token, "refresh_token") if tokens.refresh_token else (tokens.access_token, "access_token")
        )
        response = await self._post_form(
            server, grant.registration, endpoint, revocation.request(token, hint), document="token revocation"
        )
        if response.status >= 400:
            raise AuthorizationError(f"{endpoint} answered {response.status} to the revocation.")
        return True

    async def _ask(
        self,
        server: ServerSettings,
        client: Registration,
        endpoints: Endpoints,
        form: list[tuple[str, str]],
        *,
        requested: tuple[str, ...],
        previous: TokenSet | None = None,
    ) -> TokenSet:
        client = self._with_configured_secret(server, client)
        response = await self._post_form(server, client, endpoints.token, form, document="token response")
        return token_endpoint.read_tokens(
            response.status,
            response.headers,
            response.body,
            url=endpoints.token,
            now=self._clock(),
            requested_scopes=requested,
            previous=previous,
            secrets=[*(value for name, value in form if name in _SECRET_FIELDS), client.client_secret or ""],
        )

    @staticmethod
    def _with_configured_secret(server: ServerSettings, client: Registration) -> Registration:
        """A secret that the operator has changed since the grant was made takes the place of the stored one."""
        secret = server.oauth.client_secret
        if client.kind is RegistrationKind.CONFIGURED and client.client_id == server.oauth.client_id and secret:
            return replace(client, client_secret=secret.value)
        return client

    async def _post_form(
        self, server: ServerSettings, client: Registration, url: str, form: list[tuple[str, str]], *, document: str
    ) -> Response:
        fields, headers = client_auth.authenticate(client, form)
        return await self._fetcher.post(
            url,
            body=client_auth.encode_form(fields),
            content_type="application/x-www-form-urlencoded",
            headers=headers,
            document=document,
            policy=self.policy(server),
        )


def _is_document(response: Response, *, required: bool) -> bool:
    """Whether an answer is meant as the document.

    Sites answer 200 with a page of their own at addresses they do not know; where the address was only guessed,
    that is no document. Where the server named it, it is one, and the validator says what is wrong with it.
    """
    if response.status != 200:
        return False
    return required or response.body.lstrip()[:1] == b"{"


def _answered_badly(document: str, url: str, response: Response) -> AuthorizationServerUnavailable:
    return AuthorizationServerUnavailable(f"The {document} at {url} can't be read: HTTP {response.status}.")

