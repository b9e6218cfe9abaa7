"""From a challenge to a grant: discovery, registration, scopes, then a flow for the user or a token at once."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from mcp_auth_proxy.broker import dpop as bindings
from mcp_auth_proxy.broker.client_registration import Clients
from mcp_auth_proxy.broker.discovery import Discoverer, Observer, ignore_lookup
from mcp_auth_proxy.broker.token_requests import TokenRequests
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, TokenRefused
from mcp_auth_proxy.models import (
    Account,
    Attempt,
    DeviceAuthorization,
    Endpoints,
    Flow,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    TokenSet,
)
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import device_authorization, discovery, dpop, revocation, scopes, token_endpoint
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.client_auth import Fields
from mcp_auth_proxy.oauth.device_authorization import Poll
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.oauth.token_exchange import SubjectToken
from mcp_auth_proxy.store.registrations import Registrations

logger = logging.getLogger(__name__)

DISCOVERY_DEADLINE = 15.0
"""Seconds for all documents of one discovery together."""

FLOW_LIFETIME = 600.0
"""Seconds that a link can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that was found out and decided before anybody is asked for consent."""

    server: ServerSettings
    key: GrantKey
    metadata: ServerMetadata
    registration: Registration
    scopes: tuple[str, ...]
    dpop: bool = False
    """Whether the tokens are to be bound to a key of ours (RFC 9449)."""

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
        observe: Observer = ignore_lookup,
    ) -> None:
        self._discoverer = Discoverer(fetcher=fetcher, allow_private=allow_private, observe=observe)
        self._clients = Clients(fetcher=fetcher, registrations=registrations, public_url=public_url, clock=clock)
        self._requests = TokenRequests(fetcher=fetcher, discoverer=self._discoverer, clock=clock)
        self._clock = clock
        self._without_offline_access: set[tuple[str, str]] = set()

    def set_allow_private(self, hosts: tuple[str, ...]) -> None:
        """Change the private hosts and networks that metadata documents may lead to."""
        self._discoverer.allow_private = hosts

    def fits(self, flow: Flow, server: ServerSettings) -> bool:
        """Whether a stored flow can still end in what the server is configured for."""
        grant = server.oauth.grant
        is_device = flow.device is not None
        return (
            is_device == (grant is GrantType.DEVICE_CODE)
            and flow.redirect_uri == self._clients.redirect_uri(grant)
            and is_for(flow.key, server)
            and bindings.fits(flow, server)
        )

    @staticmethod
    def serves(grant: Grant, server: ServerSettings) -> bool:
        """Whether a stored grant is for what the server is configured to be now.

        A name that was given to another server must not take the old one's token there.
        """
        return grant.grant_type is server.oauth.grant and is_for(grant.key, server) and bindings.fits(grant, server)

    # From a challenge to a plan

    async def plan(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...],
        *,
        schemes: tuple[str, ...] = (),
    ) -> Plan:
        """Return what to ask for, and where; ``already`` are scopes that must not be lost in a step-up.

        ``schemes`` are what the server asks for besides a token, to be named where there is no OAuth to be found.
        Raises AuthorizationError, naming the document, its URL and the rule it breaks.
        """

        async def register(metadata: ServerMetadata) -> Registration:
            return await self._clients.register(server, metadata, self._discoverer.policy(server.url), schemes=schemes)

        return await self._plan(account, server, challenge, already, register)

    async def preview(self, account: Account, server: ServerSettings, challenge: BearerChallenge | None) -> Plan:
        """Return what ``plan`` would, from the same documents, but register nothing and write nothing.

        Raises AuthorizationError, also where what comes after the plan is seen to be impossible.
        """

        async def preview(metadata: ServerMetadata) -> Registration:
            return await self._clients.preview(server, metadata)

        plan = await self._plan(account, server, challenge, (), preview)
        grant = server.oauth.grant
        if grant is GrantType.DEVICE_CODE:
            _device_endpoint(plan)
        elif server.oauth.idp is not None:
            await self._discoverer.identity_provider(server.oauth.idp)
        elif grant.unattended:
            await self._requests.unattended_form(server, grant, plan.key, plan.scopes)
        return plan

    async def _plan(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...],
        register: Callable[[ServerMetadata], Awaitable[Registration]],
    ) -> Plan:
        try:
            async with asyncio.timeout(DISCOVERY_DEADLINE):
                resource, metadata = await self._discoverer.discover(server, challenge)
                bound = dpop.decide(
                    server.oauth.dpop,
                    metadata,
                    challenged=challenge is not None and challenge.dpop,
                    demanded=resource is not None and resource.dpop_required,
                    server=server.name,
                )
                client = await register(metadata)
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
            offline_access=not oauth.grant.unattended
            and (server.name, metadata.issuer) not in self._without_offline_access,
        )
        key = GrantKey(
            account=account,
            resource=_resource(server, resource),
            issuer=metadata.issuer,
            upstream=urls.parse(server.url).origin.serialized,
        )
        return Plan(server=server, key=key, metadata=metadata, registration=client, scopes=chosen, dpop=bound)

    def leave_out_offline_access(self, flow_or_plan: Flow | Plan) -> None:
        """Ask for ``offline_access`` by ourselves no more where a server has refused the scopes that had it.

        Some list it for all and allow it to some clients only. Asking for less is never a risk.
        """
        if scopes.OFFLINE_ACCESS in flow_or_plan.scopes:
            self._without_offline_access.add((flow_or_plan.key.account.server, flow_or_plan.key.issuer))

    async def forget_client(self, client: Registration) -> None:
        """Drop a dynamic registration that its server no longer knows, so that the next plan makes a new one."""
        await self._clients.forget(client)

    async def forget_clients(self, server: ServerSettings) -> None:
        """Drop every dynamic registration that was made for a server."""
        await self._clients.forget_all(server)

    # With a user

    async def begin(self, plan: Plan) -> Flow:
        """Return a new flow for the plan, not yet stored. Raises AuthorizationError."""
        if plan.server.oauth.grant is not GrantType.DEVICE_CODE:
            return self._flow(plan, FLOW_LIFETIME, None)
        url = _device_endpoint(plan)
        form = device_authorization.request(resource=plan.key.resource, scopes=plan.scopes)
        response = await self._requests.post(
            plan.server, plan.registration, url, form, document="device authorization response"
        )
        begun = device_authorization.read_response(
            response.status,
            response.headers,
            response.body,
            url=url,
            http_loopback=self._discoverer.policy(plan.server.url).loopback,
            secrets=self._requests.secrets(plan.server, plan.registration, form),
        )
        return self._flow(plan, begun.lifetime, begun.device)

    def clone_flow(self, flow: Flow) -> Flow:
        """Return a new flow, not yet stored, that asks for the same as an older one for a browser."""
        now = self._clock()
        return replace(
            flow,
            id=secrets.token_urlsafe(24),
            created_at=now,
            expires_at=now + FLOW_LIFETIME,
            dpop_key=dpop.Key.generate().text if flow.dpop_key else None,
        )

    def _flow(self, plan: Plan, lifetime: float, device: DeviceAuthorization | None) -> Flow:
        now = self._clock()
        return Flow(
            id=secrets.token_urlsafe(24),
            key=plan.key,
            registration=plan.registration,
            endpoints=plan.endpoints,
            scopes=plan.scopes,
            redirect_uri=self._clients.redirect_uri(plan.server.oauth.grant),
            iss_supported=plan.metadata.iss_parameter_supported,
            extra_params=tuple(plan.server.oauth.authorization_params.items()),
            created_at=now,
            expires_at=now + lifetime,
            device=device,
            dpop_key=_new_key(plan),
        )

    async def redeem(self, server: ServerSettings, flow: Flow, attempt: Attempt, code: str) -> Grant:
        """Exchange a code for tokens (RFC 6749 §4.1.3). Raises AuthorizationError."""
        form = token_endpoint.code_request(flow, attempt, code)
        tokens = await self._requests.tokens(
            server, flow.registration, flow.endpoints, form, requested=flow.scopes, dpop_key=flow.dpop_key
        )
        return self._granted(flow, GrantType.AUTHORIZATION_CODE, tokens, flow.dpop_key)

    async def poll(self, server: ServerSettings, flow: Flow) -> Grant | Poll:
        """Ask once whether the user has authorized on the other device (RFC 8628 §3.4). Raises AuthorizationError."""
        form = device_authorization.poll_request(flow)
        response = await self._requests.ask(
            server, flow.registration, flow.endpoints.token, form, dpop_key=flow.dpop_key
        )
        answer = device_authorization.read_poll(
            response.status,
            response.headers,
            response.body,
            flow=flow,
            now=self._clock(),
            secrets=self._requests.secrets(server, flow.registration, form),
            token_types=self._requests.token_types(server, flow.dpop_key),
        )
        if isinstance(answer, Poll):
            return answer
        return self._granted(flow, GrantType.DEVICE_CODE, answer, flow.dpop_key)

    def _granted(self, origin: Flow | Plan, grant: GrantType, tokens: TokenSet, dpop_key: str | None) -> Grant:
        return Grant(
            key=origin.key,
            grant_type=grant,
            registration=origin.registration,
            endpoints=origin.endpoints,
            tokens=tokens,
            scopes=origin.scopes,
            granted_at=self._clock(),
            dpop_key=dpop_key,
        )

    # Without one

    async def obtain(self, plan: Plan, *, subject: SubjectToken | None = None) -> Grant:
        """Obtain a grant that needs no user; ``subject`` is the caller's token. Raises AuthorizationError."""
        grant = plan.server.oauth.grant
        form = await self._requests.unattended_form(plan.server, grant, plan.key, plan.scopes, subject=subject)
        key = _new_key(plan)
        tokens = await self._requests.tokens(
            plan.server, plan.registration, plan.endpoints, form, requested=plan.scopes, dpop_key=key
        )
        return self._granted(plan, grant, tokens, key)

    async def refresh(self, server: ServerSettings, grant: Grant) -> TokenSet:
        """Renew the tokens of a grant: by its refresh token, or by asking again where the configuration is enough.

        Raises AuthorizationError.
        """
        if grant.grant_type.repeatable:
            form = await self._requests.unattended_form(server, grant.grant_type, grant.key, grant.scopes)
        elif grant.key.resource or not grant.scopes:
            form = token_endpoint.refresh_request(grant)
        else:
            # Where no resource says whom the token is for, the scope does: Entra ID wants it each time.
            try:
                return await self._refreshed(server, grant, token_endpoint.refresh_request(grant, with_scope=True))
            except TokenRefused as refused:
                if refused.error != "invalid_scope":
                    raise
            form = token_endpoint.refresh_request(grant)
        return await self._refreshed(server, grant, form)

    async def _refreshed(self, server: ServerSettings, grant: Grant, form: Fields) -> TokenSet:
        return await self._requests.tokens(
            server,
            grant.registration,
            grant.endpoints,
            form,
            requested=grant.scopes,
            previous=grant.tokens,
            dpop_key=grant.dpop_key,
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
        form = revocation.request(token, hint)
        response = await self._requests.post(server, grant.registration, endpoint, form, document="token revocation")
        if response.status >= 400:
            raise AuthorizationError(f"{endpoint} answered {response.status} to the revocation.")
        return True

    async def discard(self, server: ServerSettings, grant: Grant) -> None:
        """Revoke a grant that came when it was no longer wanted. A failure is logged: nobody else can do it either."""
        try:
            await self.revoke(server, grant)
        except AuthorizationError as error:
            logger.warning("the tokens that came for server %s could not be revoked: %s", server.name, error)


def _new_key(plan: Plan) -> str | None:
    """A key for each grant: two of them can't be told to belong together by it."""
    return dpop.Key.generate().text if plan.dpop else None


def _device_endpoint(plan: Plan) -> str:
    url = plan.metadata.device_authorization_endpoint
    if url is None:
        raise device_authorization.not_offered(plan.key.issuer, plan.server.name)
    return url


def _resource(server: ServerSettings, metadata: ResourceMetadata | None) -> str:
    """RFC 8707 §2: the resource's own spelling where it has one, for it compares strings."""
    match server.oauth.resource:
        case "omit":
            return ""
        case "auto":
            return metadata.resource if metadata else discovery.canonical_resource(server.url)
        case exact:
            return exact


def is_for(key: GrantKey, server: ServerSettings) -> bool:
    """Whether a key names the upstream, the issuer and the resource that the server has by now.

    A token goes to the origin that it was asked for only; the resource alone does not tell, where it is omitted.
    """
    oauth = server.oauth
    if key.upstream is not None and key.upstream != urls.parse(server.url).origin.serialized:
        return False
    if oauth.issuer is not None and key.issuer != oauth.issuer:
        return False
    match oauth.resource:
        case "omit":
            return not key.resource
        case "auto":
            return bool(key.resource) and urls.parse(key.resource).origin == urls.parse(server.url).origin
        case exact:
            return key.resource == exact
