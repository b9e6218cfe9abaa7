"""Requests to an authorization server, each with the client's proof; and the forms of grants that ask no user."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from mcp_auth_proxy.broker import credentials
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.dpop import Nonces
from mcp_auth_proxy.config.settings import IdpSettings, ServerSettings
from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable
from mcp_auth_proxy.models import (
    ClientAuth,
    Endpoints,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.oauth import client_auth, dpop, jwt_bearer, token_endpoint, token_exchange
from mcp_auth_proxy.oauth.client_auth import Fields
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher, Response
from mcp_auth_proxy.oauth.oauth_error import TokenRequestContext
from mcp_auth_proxy.oauth.token_exchange import IdJag, SubjectToken, TokenType

IDP_DEADLINE = 10.0
"""Seconds for an identity provider's metadata and its ID-JAG together."""

_SECRET_FIELDS = frozenset({"code", "code_verifier", "refresh_token", "assertion", "subject_token", "device_code"})


class TokenRequests:
    """Sends what the pure steps build, and reads what comes back. Raises AuthorizationError throughout."""

    def __init__(self, *, fetcher: Fetcher, discoverer: Discoverer, clock: Callable[[], float]) -> None:
        self._fetcher = fetcher
        self._discoverer = discoverer
        self._clock = clock
        self._nonces = Nonces()
        self._wanting_client_id: set[str] = set()

    async def tokens(
        self,
        server: ServerSettings,
        client: Registration,
        endpoints: Endpoints,
        form: Fields,
        *,
        requested: tuple[str, ...],
        previous: TokenSet | None = None,
        dpop_key: str | None = None,
    ) -> TokenSet:
        """Return the tokens that the form brings (RFC 6749 §5.1), bound to the key where there is one."""
        response = await self.ask(server, client, endpoints.token, form, dpop_key=dpop_key)
        return token_endpoint.read_tokens(
            response.status,
            response.headers,
            response.body,
            url=endpoints.token,
            now=self._clock(),
            requested_scopes=requested,
            previous=previous,
            token_types=self.token_types(server, dpop_key, previous),
            secrets=self.secrets(server, client, form),
            context=TokenRequestContext(server=server.name, resource=dict(form).get("resource", ""), scopes=requested),
        )

    async def ask(
        self,
        server: ServerSettings,
        client: Registration,
        url: str,
        form: Fields,
        *,
        dpop_key: str | None = None,
    ) -> Response:
        """Return what the token endpoint answers to a form, the client's proof and the configured ``token_params``."""
        names = {name for name, _ in form}
        more = [(name, value) for name, value in server.oauth.token_params.items() if name not in names]
        return await self.post(server, client, url, [*form, *more], document="token response", dpop_key=dpop_key)

    async def post(
        self,
        server: ServerSettings,
        client: Registration,
        url: str,
        form: Fields,
        *,
        document: str,
        dpop_key: str | None = None,
    ) -> Response:
        """Return what the server's authorization server answers to a form and the client's proof.

        With client_secret_basic the form is sent without ``client_id``, since some servers take that for a second way
        of authenticating (RFC 6749 §2.3); others find no client without it. Where the client is refused it is sent
        again with it, once: a client that was not recognised has consumed nothing (§5.2).
        """
        client, key = _as_configured(server, client)
        include_client_id = url in self._wanting_client_id
        first = await self._proved(
            server, client, key, url, form, document=document, dpop_key=dpop_key, include_client_id=include_client_id
        )
        unnamed = client.client_auth is ClientAuth.BASIC and not include_client_id
        if not unnamed or not client_auth.is_error_response(first.status, first.body, "invalid_client"):
            return first
        second = await self._proved(
            server, client, key, url, form, document=document, dpop_key=dpop_key, include_client_id=True
        )
        if client_auth.is_error_response(second.status, second.body, "invalid_client", "invalid_request"):
            return first
        self._wanting_client_id.add(url)
        return second

    async def _proved(
        self,
        server: ServerSettings,
        client: Registration,
        key: SigningKey | None,
        url: str,
        form: Fields,
        *,
        document: str,
        dpop_key: str | None,
        include_client_id: bool,
    ) -> Response:
        """With a DPoP key, a proof of that goes along too.

        A server that wants it with a nonce is asked again, once: it has not consumed what was sent (RFC 9449 §8).
        """
        policy = self._discoverer.policy(server.url)
        audience = url if server.oauth.client_assertion_audience == "endpoint" else ""
        if dpop_key is None:
            return await self._post(
                client,
                key,
                url,
                form,
                document=document,
                policy=policy,
                audience=audience,
                include_client_id=include_client_id,
            )
        bound = dpop.Key.load(dpop_key)

        async def send(nonce: str) -> Response:
            proof = bound.proof(method="POST", url=url, now=self._clock(), nonce=nonce)
            response = await self._post(
                client,
                key,
                url,
                form,
                document=document,
                policy=policy,
                audience=audience,
                include_client_id=include_client_id,
                headers=[("DPoP", proof)],
            )
            self._nonces.update_nonce(url, dpop.read_nonce(response.headers.get("dpop-nonce")))
            return response

        response = await send(self._nonces.get(url))
        nonce = dpop.required_nonce(response.status, response.headers, response.body)
        return await send(nonce) if nonce else response

    @staticmethod
    def token_types(server: ServerSettings, dpop_key: str | None, previous: TokenSet | None = None) -> tuple[str, ...]:
        """Return the types that a token may have which was asked for with this key, or without one."""
        bound = previous is not None and previous.token_type == dpop.TOKEN_TYPE
        return dpop.token_types(server.oauth.dpop, bound=bound, proved=dpop_key is not None)

    @staticmethod
    def secrets(server: ServerSettings, client: Registration, form: Fields) -> list[str]:
        """Return what was sent and must not be shown should an error repeat it."""
        client, _ = _as_configured(server, client)
        return [*(value for name, value in form if name in _SECRET_FIELDS), client.client_secret or ""]

    async def unattended_form(
        self,
        server: ServerSettings,
        grant: GrantType,
        key: GrantKey,
        scopes: tuple[str, ...],
        *,
        subject: SubjectToken | None = None,
    ) -> Fields:
        """Return the form that asks for the tokens of a grant without a user, with assertions as they are now.

        ``subject`` is the token of the caller, for token_exchange.
        """
        oauth = server.oauth
        setting = f"servers.{server.name}.oauth"
        match grant:
            case GrantType.CLIENT_CREDENTIALS:
                return token_endpoint.client_credentials_request(key.resource, scopes)
            case GrantType.JWT_BEARER if oauth.assertion is not None:
                assertion = await credentials.read(oauth.assertion, f"{setting}.assertion")
                return jwt_bearer.request(assertion, resource=key.resource, scopes=scopes)
            case GrantType.ID_JAG if oauth.idp is not None:
                jag = await self._id_jag(server, oauth.idp, key, scopes)
                asked = scopes if jag.scopes is None else jag.scopes
                return jwt_bearer.request(jag.assertion, resource=key.resource, scopes=asked)
            case GrantType.TOKEN_EXCHANGE if subject is not None:
                return token_exchange.request(subject, resource=key.resource, scopes=scopes)
            case GrantType.TOKEN_EXCHANGE:
                raise AuthorizationError(
                    f"{setting}.grant is token_exchange, which acts with the token that the caller itself was "
                    f"identified by, and this proxy does not identify its callers. Use another grant."
                )
            case _:
                raise AuthorizationError(
                    f"Server {server.name} was authorized by the grant {grant.value}, for which {setting} is no longer "
                    f"configured. Run `mcp-auth-proxy logout {server.name}`, or configure it again."
                )

    async def _id_jag(self, server: ServerSettings, idp: IdpSettings, key: GrantKey, scopes: tuple[str, ...]) -> IdJag:
        """The identity provider's leg of enterprise-managed authorization (§4): the user's token for an ID-JAG."""
        setting = f"servers.{server.name}.oauth.idp"
        if idp.id_token is not None:
            user = SubjectToken(await credentials.read(idp.id_token, f"{setting}.id_token"), TokenType.ID_TOKEN)
        elif idp.refresh_token is not None:
            token = await credentials.read(idp.refresh_token, f"{setting}.refresh_token")
            user = SubjectToken(token, TokenType.REFRESH_TOKEN)
        else:
            raise AuthorizationError(f"{setting} says nothing of who the user is: set id_token or refresh_token.")
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
        url, methods = await self._discoverer.identity_provider(idp)
        form = token_exchange.id_jag_request(user, audience=key.issuer, resource=key.resource, scopes=scopes)
        client = _idp_client(server, idp, url, methods)
        response = await self._post(
            client, None, url, form, document="ID-JAG response", policy=self._discoverer.policy(idp.issuer or url)
        )
        secrets = [user.value, client.client_secret or ""]
        return token_exchange.read_id_jag(response.status, response.headers, response.body, url=url, secrets=secrets)

    async def _post(
        self,
        client: Registration,
        key: SigningKey | None,
        url: str,
        form: Fields,
        *,
        document: str,
        policy: AddressPolicy,
        audience: str = "",
        include_client_id: bool = False,
        headers: Sequence[tuple[str, str]] = (),
    ) -> Response:
        fields, proofs = client_auth.authenticate(
            client, form, key=key, now=self._clock(), audience=audience, include_client_id=include_client_id
        )
        return await self._fetcher.post(
            url,
            body=client_auth.encode_form(fields),
            content_type="application/x-www-form-urlencoded",
            headers=[*proofs, *headers],
            document=document,
            policy=policy,
        )


def _as_configured(server: ServerSettings, client: Registration) -> tuple[Registration, SigningKey | None]:
    """What the operator has changed since the grant was made takes the place of what was stored."""
    oauth = server.oauth
    if client.kind is not RegistrationKind.CONFIGURED or client.client_id != (oauth.client_id or ""):
        return client, None
    has_key = oauth.private_key is not None
    method = oauth.client_auth or client.client_auth
    if oauth.client_auth is None and has_key != (method is ClientAuth.PRIVATE_KEY_JWT):
        has_secret = oauth.client_secret is not None
        method = client_auth.choose(None, configured=None, has_secret=has_secret, has_key=has_key)
    secret = oauth.client_secret.value if oauth.client_secret else client.client_secret
    return replace(client, client_auth=method, client_secret=secret), oauth.private_key


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
