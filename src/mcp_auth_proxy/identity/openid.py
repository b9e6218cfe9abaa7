"""The identity provider that browsers sign in at (OpenID Connect Core 1.0, with a code and PKCE)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from mcp_auth_proxy.config.settings import InboundSettings, SignInSettings
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    CallerRefused,
    DocumentRefused,
    excerpt,
)
from mcp_auth_proxy.identity.key_sets import (
    KEY_SET,
    KeySet,
    KeysUnavailable,
    VerificationKey,
    checked,
    read_key_set,
)
from mcp_auth_proxy.identity.tokens import Token
from mcp_auth_proxy.models import Caller, Registration, RegistrationKind
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import client_auth, discovery, openid
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.oauth.documents import Document
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher
from mcp_auth_proxy.oauth.token_endpoint import read_answer

METADATA_LIFETIME = 300.0
"""Seconds that the provider's metadata are used for."""

RETRY_INTERVAL = 5.0
"""Seconds after a failure until they are asked for again."""

CallerOfClaims = Callable[[str, Mapping[str, object]], Awaitable[Caller]]
"""Return the caller that the verified claims of an issuer name. Raises CallerRefused, StoreError."""


class OpenIdProvider:
    """Send browsers to the provider, and tell who comes back."""

    def __init__(
        self,
        inbound: InboundSettings,
        *,
        fetcher: Fetcher,
        public_url: str,
        caller_of_claims: CallerOfClaims,
        clock: Callable[[], float],
    ) -> None:
        """``inbound`` must have ``sign_in``. The configuration names the issuer, so it may have a private address."""
        assert inbound.sign_in is not None
        self._settings: SignInSettings = inbound.sign_in
        own = [each for each in inbound.jwt if each.issuer == self._settings.issuer]
        self._claims = [claim for each in own for claim in (each.principal, each.roles_claim) if claim is not None]
        self._fetcher = fetcher
        self._policy = AddressPolicy.for_upstream(self._settings.issuer)
        self._redirect_uri = f"{public_url}/sign-in/callback"
        self._caller_of_claims = caller_of_claims
        self._clock = clock
        self._keys = KeySet(self._settings.issuer, self)
        self._metadata: tuple[ServerMetadata, str] | None = None
        self._problem: AuthorizationError | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()

    @property
    def address(self) -> str:
        """The origin of the provider, for the button that leads there."""
        return urls.parse(self._settings.issuer).origin.serialized

    async def aclose(self) -> None:
        """End a request that is running."""
        await self._keys.aclose()

    async def authentication_url(self, *, state: str, nonce: str, code_verifier: str) -> str:
        """Return where to send a browser. Raises AuthorizationError."""
        metadata, _ = await self._read_metadata()
        discovery.require_authorization_endpoint(metadata)
        return openid.authentication_url(
            metadata.authorization_endpoint,
            client_id=self._settings.client_id,
            redirect_uri=self._redirect_uri,
            scopes=openid.scopes_for(self._claims, metadata.scopes_supported),
            state=state,
            nonce=nonce,
            code_verifier=code_verifier,
        )

    async def finish(self, params: Mapping[str, Sequence[str]], *, nonce: str, code_verifier: str) -> Caller:
        """Return who has signed in. The state of the response was checked.

        Raises CallbackRefused if the response can't be the provider's, AuthorizationError, CallerRefused if the
        principal may not call, and StoreError.
        """
        metadata, _ = await self._read_metadata()
        issuer = self._settings.issuer
        code = openid.check_response(params, issuer=issuer, iss_supported=metadata.iss_parameter_supported)
        encoded = await self._redeem(metadata, code, code_verifier)
        claims = await self._verified(encoded, nonce)
        return await self._caller_of_claims(issuer, claims)

    async def fetch(self) -> list[VerificationKey]:
        """Return the provider's keys. Raises AuthorizationError."""
        _, url = await self._read_metadata()
        response = await self._fetcher.get(url, document=KEY_SET, policy=self._policy)
        return read_key_set(checked(response, KEY_SET))

    async def _redeem(self, metadata: ServerMetadata, code: str, code_verifier: str) -> str:
        settings = self._settings
        secret = settings.client_secret.value if settings.client_secret is not None else None
        method = client_auth.choose(
            metadata.token_endpoint_auth_methods_supported, configured=None, has_secret=secret is not None
        )
        client = Registration(
            server="",
            issuer=settings.issuer,
            client_id=settings.client_id,
            client_auth=method,
            kind=RegistrationKind.CONFIGURED,
            client_secret=secret,
        )
        form = openid.token_request(code, redirect_uri=self._redirect_uri, code_verifier=code_verifier)
        fields, headers = client_auth.authenticate(client, form)
        url = metadata.token_endpoint
        response = await self._fetcher.post(
            url,
            body=client_auth.encode_form(fields),
            content_type="application/x-www-form-urlencoded",
            headers=headers,
            document="token response",
            policy=self._policy,
        )
        secrets = (code, code_verifier, *([secret] if secret else []))
        answer = read_answer(response.status, response.headers, response.body, url=url, secrets=secrets)
        return openid.id_token(answer, issuer=settings.issuer)

    async def _verified(self, encoded: str, nonce: str) -> Mapping[str, object]:
        """Return the claims of an ID token whose signature holds. Raises AuthorizationError."""
        settings = self._settings
        refused = AuthorizationError(
            f"The ID token of {excerpt(settings.issuer)} is not valid for this sign-in (OpenID Connect Core §3.1.3.7)."
        )
        try:
            token = Token(encoded.encode())
            token.check_claims(settings.issuer, settings.client_id, now=self._clock())
            keys = await self._keys.find(token.kid, token.algorithm)
        except CallerRefused:
            raise refused from None
        except KeysUnavailable as error:
            raise AuthorizationServerUnavailable(
                f"The keys of the identity provider {excerpt(settings.issuer)} can't be had now.", error.retry_after
            ) from None
        if not openid.is_for(token.claims, client_id=settings.client_id, nonce=nonce):
            raise refused
        # Signatures are computed in another thread: one takes up to a millisecond.
        if not await asyncio.to_thread(lambda: any(token.is_signed_by(key) for key in keys)):
            raise refused
        return token.claims

    async def _read_metadata(self) -> tuple[ServerMetadata, str]:
        """Return the metadata of the provider, and the URL of its keys. Raises AuthorizationError.

        Anybody can ask for a sign-in: so one request runs at a time, and after a failure the next one waits.
        """
        async with self._reading:
            age = self._clock() - self._read_at
            if self._problem is not None and age < RETRY_INTERVAL:
                raise self._problem.with_traceback(None)
            if self._metadata is None or self._problem is not None or age >= METADATA_LIFETIME:
                self._read_at = self._clock()
                try:
                    self._metadata = await self._fetch_metadata()
                except AuthorizationError as error:
                    self._problem = error
                    raise
                self._problem = None
            return self._metadata

    async def _fetch_metadata(self) -> tuple[ServerMetadata, str]:
        issuer = self._settings.issuer
        problem: AuthorizationError = DocumentRefused(
            discovery.SERVER_METADATA, issuer, "none was found", "OpenID Connect Discovery §4"
        )
        # OpenID providers have the last of these documents for certain.
        for url in reversed(discovery.authorization_server_metadata_urls(issuer)):
            response = await self._fetcher.get(url, document=discovery.SERVER_METADATA, policy=self._policy)
            if response.status == 200:
                document = Document.parse(
                    response.body, name=discovery.SERVER_METADATA, url=url, clause="OpenID Connect Discovery §3"
                )
                keys = document.required_string("jwks_uri")
                metadata = discovery.read_server_metadata(
                    response.body, url=url, issuer=issuer, policy_http_loopback=self._policy.loopback
                )
                return metadata, keys
            if response.status == 429 or response.status >= 500:
                problem = AuthorizationServerUnavailable(
                    f"The identity provider {excerpt(issuer)} can't be used now: HTTP {response.status}."
                )
        raise problem
