"""Requests to an authorization server with client authentication and, for bound tokens, a DPoP proof."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.dpop import Nonces
from mcp_auth_proxy.broker.oauth_clients import WithSecret, unchanged
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.models import ClientAuth, Registration, RegistrationKind
from mcp_auth_proxy.oauth import client_auth, dpop
from mcp_auth_proxy.oauth.client_auth import Fields
from mcp_auth_proxy.oauth.fetch import AddressPolicy, Fetcher, Response

_SECRET_FIELDS = frozenset(
    {
        "code",
        "code_verifier",
        "refresh_token",
        "assertion",
        "subject_token",
        "actor_token",
        "device_code",
        "client_secret",
        "client_assertion",
        "token",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormRequest:
    """One form to post. ``document`` names the expected response in error messages."""

    client: Registration
    url: str
    form: Fields
    document: str
    policy: AddressPolicy
    signing_key: SigningKey | None = None
    """The key for ``private_key_jwt``."""
    audience: str = ""
    """The audience of the client assertion; empty: the issuer."""


class AuthenticatedRequests:
    """Post forms as a client. All methods that send raise AuthorizationError."""

    def __init__(
        self,
        *,
        fetcher: Fetcher,
        discoverer: Discoverer,
        clock: Callable[[], float],
        with_secret: WithSecret = unchanged,
    ) -> None:
        self._fetcher = fetcher
        self._with_secret = with_secret
        self._discoverer = discoverer
        self._clock = clock
        self._nonces = Nonces()
        self._urls_wanting_client_id: set[str] = set()

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
        """Post a form to the authorization server of an MCP server, and return the response.

        With client_secret_basic the form is sent without ``client_id``, since some servers take that for a second
        authentication method (RFC 6749 §2.3); others find no client without it. If the client is refused, the form is
        sent once more with it: a request that was refused for its client has used up nothing (§5.2).
        """
        client, signing_key = _as_configured(server, await self._with_secret(client, url))
        request = FormRequest(
            client=client,
            url=url,
            form=form,
            document=document,
            policy=self._discoverer.policy(server.url, server),
            signing_key=signing_key,
            audience=url if server.oauth.client_assertion_audience == "endpoint" else "",
        )
        include_client_id = url in self._urls_wanting_client_id
        first = await self._post_with_proof(request, dpop_key, include_client_id=include_client_id)
        may_repeat = client.client_auth is ClientAuth.BASIC and not include_client_id
        if not may_repeat or not client_auth.is_error_response(first.status, first.body, "invalid_client"):
            return first
        second = await self._post_with_proof(request, dpop_key, include_client_id=True)
        if client_auth.is_error_response(second.status, second.body, "invalid_client", "invalid_request"):
            return first
        self._urls_wanting_client_id.add(url)
        return second

    async def _post_with_proof(
        self, request: FormRequest, dpop_key: str | None, *, include_client_id: bool
    ) -> Response:
        """Post a form, with a DPoP proof if there is a key.

        If the server requires a nonce, the form is sent once more with it: the first one was not processed
        (RFC 9449 §8).
        """
        if dpop_key is None:
            return await self.send(request, include_client_id=include_client_id)
        key = dpop.Key.load(dpop_key)

        async def send(nonce: str) -> Response:
            proof = key.proof(method="POST", url=request.url, now=self._clock(), nonce=nonce)
            headers = [("DPoP", proof)]
            response = await self.send(request, include_client_id=include_client_id, headers=headers)
            self._nonces.update_nonce(request.url, dpop.read_nonce(response.headers.get("dpop-nonce")))
            return response

        response = await send(self._nonces.get(request.url))
        nonce = dpop.required_nonce(response.status, response.headers, response.body)
        return await send(nonce) if nonce else response

    async def send(
        self, request: FormRequest, *, include_client_id: bool = False, headers: Sequence[tuple[str, str]] = ()
    ) -> Response:
        """Post a form once, with client authentication, and return the response."""
        fields, auth_headers = client_auth.authenticate(
            request.client,
            request.form,
            key=request.signing_key,
            now=self._clock(),
            audience=request.audience,
            include_client_id=include_client_id,
        )
        secret_values.remember(
            *(value for name, value in fields if name in _SECRET_FIELDS),
            *(value.rpartition(" ")[2] for _, value in (*auth_headers, *headers)),
        )
        return await self._fetcher.post(
            request.url,
            body=client_auth.encode_form(fields),
            content_type="application/x-www-form-urlencoded",
            headers=[*auth_headers, *headers],
            document=request.document,
            policy=request.policy,
        )


def secrets_in(server: ServerSettings, client: Registration, form: Fields) -> list[str]:
    """Return the secrets of a request, which must be masked if an error response repeats them."""
    client, _ = _as_configured(server, client)
    return [*(value for name, value in form if name in _SECRET_FIELDS), client.client_secret or ""]


def _as_configured(server: ServerSettings, client: Registration) -> tuple[Registration, SigningKey | None]:
    """Return a stored client with the credentials that the configuration has for it now."""
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
