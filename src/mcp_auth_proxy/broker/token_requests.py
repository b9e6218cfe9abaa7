"""The token client: send requests to token, device and revocation endpoints, and make grants from the responses."""

import asyncio
import logging
from collections.abc import Callable

from mcp_auth_proxy.broker.authenticated_requests import AuthenticatedRequests, secrets_in
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.oauth_clients import WithSecret, revocation_endpoint, unchanged
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.broker.unattended import UnattendedForms
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, TokenRefused, excerpt
from mcp_auth_proxy.models import Attempt, Flow, Grant, GrantType, Registration, RegistrationKind, TokenSet
from mcp_auth_proxy.oauth import account_label, device_authorization, dpop, retry_after, revocation, token_endpoint
from mcp_auth_proxy.oauth.client_auth import Fields
from mcp_auth_proxy.oauth.device_authorization import DeviceGrantStart, Poll
from mcp_auth_proxy.oauth.documents import parse_object
from mcp_auth_proxy.oauth.fetch import Fetcher, Response
from mcp_auth_proxy.oauth.oauth_error import TokenRequestContext
from mcp_auth_proxy.oauth.token_exchange import SubjectToken

logger = logging.getLogger(__name__)

LABEL_DEADLINE = 3.0
"""Seconds to find out whose account a grant is for. A user in a browser waits for it."""


class TokenClient:
    """Send what the pure OAuth steps build, and read the responses. It stores nothing. Raises AuthorizationError."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        discoverer: Discoverer,
        clock: Callable[[], float],
        with_secret: WithSecret = unchanged,
    ) -> None:
        """``with_secret`` gives registrations that stand for clients of the API the secret that those have now."""
        self._requests = AuthenticatedRequests(
            fetcher=fetcher, discoverer=discoverer, clock=clock, with_secret=with_secret
        )
        self._forms = UnattendedForms(requests=self._requests, discoverer=discoverer)
        self._discoverer = discoverer
        self._fetcher = fetcher
        self._clock = clock

    # With a user

    async def redeem(self, server: ServerSettings, flow: Flow, attempt: Attempt, code: str) -> Grant:
        """Exchange an authorization code for tokens (RFC 6749 §4.1.3); return the grant, not yet stored."""
        form = token_endpoint.code_request(flow, attempt, code)
        tokens = await self._tokens(server, flow, form, dpop_key=flow.dpop_key)
        return self._grant(flow, GrantType.AUTHORIZATION_CODE, tokens, flow.dpop_key)

    async def start_device(self, plan: Plan) -> DeviceGrantStart:
        """Request a device code and a user code (RFC 8628 §3.1)."""
        url = plan.device_endpoint
        form = device_authorization.request(resource=plan.key.resource, scopes=plan.scopes)
        response = await self._requests.post(
            plan.server, plan.registration, url, form, document="device authorization response"
        )
        with retry_after.attached(response.headers):
            return device_authorization.read_response(
                response.status,
                response.headers,
                response.body,
                url=url,
                http_loopback=self._discoverer.policy(plan.server.url, plan.server).loopback,
                secrets=secrets_in(plan.server, plan.registration, form),
            )

    async def poll(self, server: ServerSettings, flow: Flow) -> Grant | Poll:
        """Ask once whether the user has authorized on the other device (RFC 8628 §3.4)."""
        form = device_authorization.poll_request(flow)
        response = await self._ask(server, flow.registration, flow.endpoints.token, form, dpop_key=flow.dpop_key)
        result = device_authorization.read_poll(
            response.status,
            response.headers,
            response.body,
            flow=flow,
            now=self._clock(),
            secrets=secrets_in(server, flow.registration, form),
            token_types=_token_types(server, flow.dpop_key),
        )
        if isinstance(result, Poll):
            return result
        return self._grant(flow, GrantType.DEVICE_CODE, result, flow.dpop_key)

    # Without a user

    async def check_unattended(self, plan: Plan) -> None:
        """Raise AuthorizationError if a grant that asks no user could not even be requested; send no token request."""
        if plan.server.oauth.grant is GrantType.TOKEN_EXCHANGE:
            # What it begins with comes with the request of a caller.
            return
        await self._forms.build(plan.server, plan.server.oauth.grant, plan.key, plan.scopes)

    async def check_credentials(self, server: ServerSettings) -> None:
        """Raise AuthorizationError if a configured token that a grant begins with can't be read; send nothing."""
        await self._forms.check_credentials(server)

    async def obtain(self, plan: Plan, *, subject: SubjectToken | None = None) -> Grant:
        """Obtain a grant that asks no user, not yet stored. ``subject`` is the caller's token."""
        grant_type = plan.server.oauth.grant
        form = await self._forms.build(plan.server, grant_type, plan.key, plan.scopes, subject=subject)
        key = plan.new_dpop_key()
        tokens = await self._tokens(plan.server, plan, form, dpop_key=key)
        return self._grant(plan, grant_type, tokens, key)

    async def refresh(self, server: ServerSettings, grant: Grant) -> TokenSet:
        """Renew the tokens of a grant: with its refresh token, or with a new request if the grant asks no user."""
        if grant.grant_type.repeatable:
            form = await self._forms.build(server, grant.grant_type, grant.key, grant.scopes)
        elif grant.key.resource or not grant.scopes:
            form = token_endpoint.refresh_request(grant)
        else:
            # Without a resource, the scope says which API the token is for. Entra ID wants it in each request.
            try:
                return await self._refresh(server, grant, token_endpoint.refresh_request(grant, with_scope=True))
            except TokenRefused as refused:
                if refused.error != "invalid_scope":
                    raise
            form = token_endpoint.refresh_request(grant)
        return await self._refresh(server, grant, form)

    async def _refresh(self, server: ServerSettings, grant: Grant, form: Fields) -> TokenSet:
        return await self._tokens(server, grant, form, dpop_key=grant.dpop_key, previous=grant.tokens)

    async def revoke(self, server: ServerSettings, grant: Grant) -> bool:
        """Revoke a grant's tokens (RFC 7009). Return False if the server offers no revocation."""
        endpoint = grant.endpoints.revocation or await self._revocation_endpoint(server, grant)
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

    async def _revocation_endpoint(self, server: ServerSettings, grant: Grant) -> str | None:
        """Look the endpoint up if nothing was discovered before, because a client of the API named the endpoints."""
        if grant.registration.kind is not RegistrationKind.OAUTH_CLIENT:
            return None
        try:
            metadata = await self._discoverer.server_metadata(server, grant.key.issuer)
        except AuthorizationError as error:
            logger.debug("no metadata of %s were found: %s", excerpt(grant.key.issuer), error)
            return None
        return revocation_endpoint(metadata) if metadata.token_endpoint == grant.endpoints.token else None

    async def discard(self, server: ServerSettings, grant: Grant) -> None:
        """Revoke a grant that arrived when it was no longer wanted. A failure is only logged."""
        try:
            await self.revoke(server, grant)
        except AuthorizationError as error:
            logger.warning("the tokens that came for server %s could not be revoked: %s", server.name, error)

    async def label(self, server: ServerSettings, grant: Grant) -> str:
        """Ask the userinfo endpoint who has authorized (OpenID Connect Core §5.3); return "" if that is not found out.

        Only bearer tokens with the scope ``openid`` are sent there.
        """
        if "openid" not in grant.tokens.scopes or grant.tokens.token_type != "Bearer":
            return ""
        try:
            async with asyncio.timeout(LABEL_DEADLINE):
                metadata = await self._discoverer.server_metadata(server, grant.key.issuer)
                if metadata.userinfo_endpoint is None:
                    return ""
                response = await self._fetcher.get(
                    metadata.userinfo_endpoint,
                    headers=[("Authorization", f"Bearer {grant.tokens.access_token}")],
                    document="userinfo response",
                    policy=self._discoverer.policy(server.url, server),
                )
                return account_label.of_person(parse_object(response.body)) if response.status == 200 else ""
        except (AuthorizationError, TimeoutError, ValueError) as error:
            logger.debug("whose account the grant for server %s is was not found out: %s", server.name, error)
            return ""

    # The token endpoint

    async def _tokens(
        self,
        server: ServerSettings,
        source: Flow | Plan | Grant,
        form: Fields,
        *,
        dpop_key: str | None,
        previous: TokenSet | None = None,
    ) -> TokenSet:
        """Return the tokens that a form brings (RFC 6749 §5.1), bound to ``dpop_key`` if there is one."""
        url, client = source.endpoints.token, source.registration
        response = await self._ask(server, client, url, form, dpop_key=dpop_key)
        resource = dict(form).get("resource", "")
        with retry_after.attached(response.headers):
            return token_endpoint.read_tokens(
                response.status,
                response.headers,
                response.body,
                url=url,
                now=self._clock(),
                requested_scopes=source.scopes,
                previous=previous,
                token_types=_token_types(server, dpop_key, previous),
                secrets=secrets_in(server, client, form),
                context=TokenRequestContext(
                    server=server.name,
                    resource=resource,
                    scopes=source.scopes,
                    configured_client=client.kind is RegistrationKind.CONFIGURED,
                ),
            )

    async def _ask(
        self, server: ServerSettings, client: Registration, url: str, form: Fields, *, dpop_key: str | None
    ) -> Response:
        """Post a form to the token endpoint, with the configured ``token_params``."""
        names = {name for name, _ in form}
        more = [(name, value) for name, value in server.oauth.token_params.items() if name not in names]
        return await self._requests.post(
            server, client, url, [*form, *more], document="token response", dpop_key=dpop_key
        )

    def _grant(self, source: Flow | Plan, grant_type: GrantType, tokens: TokenSet, dpop_key: str | None) -> Grant:
        return Grant(
            key=source.key,
            grant_type=grant_type,
            registration=source.registration,
            endpoints=source.endpoints,
            tokens=tokens,
            scopes=source.scopes,
            granted_at=self._clock(),
            dpop_key=dpop_key,
            label=tokens.label,
        )


def _token_types(server: ServerSettings, dpop_key: str | None, previous: TokenSet | None = None) -> tuple[str, ...]:
    """Return the token types to accept for a request that was sent with this key, or without one."""
    bound = previous is not None and previous.token_type == dpop.TOKEN_TYPE
    return dpop.token_types(server.oauth.dpop, bound=bound, proved=dpop_key is not None)
