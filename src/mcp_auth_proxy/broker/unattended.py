"""Build the token requests of grants that ask no user: client credentials, assertions, token exchange."""

import asyncio

from mcp_auth_proxy.broker import credentials
from mcp_auth_proxy.broker.authenticated_requests import AuthenticatedRequests, FormRequest
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.config.settings import IdpSettings, ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable
from mcp_auth_proxy.models import GrantKey, GrantType, Registration, RegistrationKind
from mcp_auth_proxy.oauth import client_auth, jwt_bearer, token_endpoint, token_exchange
from mcp_auth_proxy.oauth.client_auth import Fields
from mcp_auth_proxy.oauth.token_exchange import IdJag, SubjectToken, TokenType

IDP_DEADLINE = 10.0
"""Seconds for the metadata and the ID-JAG of an identity provider together."""


class UnattendedForms:
    """Build the forms for the token endpoint, reading assertions again each time. Raises AuthorizationError."""

    def __init__(self, *, requests: AuthenticatedRequests, discoverer: Discoverer) -> None:
        self._requests = requests
        self._discoverer = discoverer

    async def build(
        self,
        server: ServerSettings,
        grant: GrantType,
        key: GrantKey,
        scopes: tuple[str, ...],
        *,
        subject: SubjectToken | None = None,
    ) -> Fields:
        """Return the form that requests tokens for a grant. ``subject`` is the caller's token, for token_exchange."""
        oauth = server.oauth
        match grant:
            case GrantType.CLIENT_CREDENTIALS:
                return token_endpoint.client_credentials_request(key.resource, scopes)
            case GrantType.JWT_BEARER if oauth.assertion is not None:
                assertion = await credentials.read(oauth.assertion, server.key("oauth.assertion"))
                return jwt_bearer.request(assertion, resource=key.resource, scopes=scopes)
            case GrantType.ID_JAG if oauth.idp is not None:
                jag = await self._id_jag(server, oauth.idp, key, scopes)
                granted = scopes if jag.scopes is None else jag.scopes
                return jwt_bearer.request(jag.assertion, resource=key.resource, scopes=granted)
            case GrantType.TOKEN_EXCHANGE if subject is not None:
                return token_exchange.request(subject, resource=key.resource, scopes=scopes)
            case GrantType.TOKEN_EXCHANGE:
                raise AuthorizationError(
                    f"{server.key('oauth.grant')} is token_exchange, which needs the JWT that a caller was identified "
                    f"by, and there is none here. Send requests with a JWT of an issuer in inbound.jwt."
                )
            case _:
                raise AuthorizationError(
                    f"Server {server.name} was authorized by the grant {grant.value}, for which {server.key('oauth')} "
                    f"is no longer configured. Run `mcp-auth-proxy logout {server.name}`, or configure it again."
                )

    async def check_credentials(self, server: ServerSettings) -> None:
        """Raise AuthorizationError if a configured token that a grant begins with can't be read; send nothing."""
        oauth = server.oauth
        if oauth.grant is GrantType.JWT_BEARER and oauth.assertion is not None:
            await credentials.read(oauth.assertion, server.key("oauth.assertion"))
        elif oauth.grant is GrantType.ID_JAG and oauth.idp is not None:
            await _user_token(server, oauth.idp)

    async def _id_jag(self, server: ServerSettings, idp: IdpSettings, key: GrantKey, scopes: tuple[str, ...]) -> IdJag:
        """Get an ID-JAG from the identity provider for the user's token (enterprise-managed authorization, §4)."""
        user = await _user_token(server, idp)
        try:
            async with asyncio.timeout(IDP_DEADLINE):
                return await self._exchange(server, idp, user, key, scopes)
        except TimeoutError:
            raise AuthorizationServerUnavailable(
                f"The identity provider {idp.issuer or idp.token_endpoint} of server {server.name} did not answer "
                f"within {IDP_DEADLINE:.0f} s."
            ) from None

    async def _exchange(
        self, server: ServerSettings, idp: IdpSettings, user: SubjectToken, key: GrantKey, scopes: tuple[str, ...]
    ) -> IdJag:
        url, methods = await self._discoverer.identity_provider(server, idp)
        client = _idp_client(server, idp, url, methods)
        response = await self._requests.send(
            FormRequest(
                client=client,
                url=url,
                form=token_exchange.id_jag_request(user, audience=key.issuer, resource=key.resource, scopes=scopes),
                document="ID-JAG response",
                policy=self._discoverer.policy(idp.issuer or url, server),
            )
        )
        secrets = [user.value, client.client_secret or ""]
        return token_exchange.read_id_jag(response.status, response.headers, response.body, url=url, secrets=secrets)


async def _user_token(server: ServerSettings, idp: IdpSettings) -> SubjectToken:
    setting = server.key("oauth.idp")
    if idp.id_token is not None:
        return SubjectToken(await credentials.read(idp.id_token, f"{setting}.id_token"), TokenType.ID_TOKEN)
    if idp.refresh_token is not None:
        token = await credentials.read(idp.refresh_token, f"{setting}.refresh_token")
        return SubjectToken(token, TokenType.REFRESH_TOKEN)
    raise AuthorizationError(f"{setting} does not say who the user is: set id_token or refresh_token.")


def _idp_client(
    server: ServerSettings, idp: IdpSettings, token_endpoint: str, methods: tuple[str, ...] | None
) -> Registration:
    secret = idp.client_secret.value if idp.client_secret else None
    return Registration(
        server=server.name,
        issuer=idp.issuer or token_endpoint,
        client_id=idp.client_id,
        client_auth=client_auth.choose(methods, configured=idp.client_auth, has_secret=secret is not None),
        kind=RegistrationKind.CONFIGURED,
        client_secret=secret,
    )
