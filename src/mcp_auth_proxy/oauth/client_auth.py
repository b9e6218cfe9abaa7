"""Client authentication at the token endpoint (RFC 6749 §2.3, RFC 7523 §2.2)."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from mcp_auth_proxy.config.settings import server_key
from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.errors import AuthorizationError, excerpt
from mcp_auth_proxy.models import ClientAuth, Registration
from mcp_auth_proxy.oauth import client_assertion
from mcp_auth_proxy.oauth.documents import parse_object

Fields = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCredentials:
    """What a client authenticates with. ``now`` is in Unix seconds; an empty ``audience`` means the issuer."""

    client: Registration
    key: SigningKey | None = None
    now: float = 0.0
    audience: str = ""

    def secret(self) -> str:
        """Return the client secret. Raises AuthorizationError if there is none."""
        if self.client.client_secret is None:
            raise self.missing("secret", "client_secret")
        return self.client.client_secret

    def missing(self, what: str, setting: str) -> AuthorizationError:
        """Return the error for a credential that the method needs; ``setting`` is its key below ``oauth``."""
        client = self.client
        return AuthorizationError(
            f"The client {excerpt(client.client_id)} must authenticate with {client.client_auth.value} but has no "
            f"{what}. Set {server_key(client.server, f'oauth.{setting}')}."
        )


@dataclass(frozen=True, slots=True)
class AuthFields:
    """What a method adds to a request: form fields and headers."""

    fields: Fields = field(default_factory=list, repr=False)
    headers: Fields = field(default_factory=list, repr=False)


Method = Callable[[ClientCredentials], AuthFields]


def _none(credentials: ClientCredentials) -> AuthFields:
    # A workload that presents an assertion may have no client identity at all (RFC 7521 §4.1).
    client_id = credentials.client.client_id
    return AuthFields([("client_id", client_id)] if client_id else [])


def _post(credentials: ClientCredentials) -> AuthFields:
    return AuthFields([("client_id", credentials.client.client_id), ("client_secret", credentials.secret())])


def _basic(credentials: ClientCredentials) -> AuthFields:
    # RFC 6749 §2.3.1: both are form-encoded before they are joined, so a colon in the id is unambiguous. A space is %20
    # and not "+": every form decoder understands both, but some servers, such as the MCP Python SDK, only unquote.
    pair = f"{quote(credentials.client.client_id, safe='')}:{quote(credentials.secret(), safe='')}"
    return AuthFields(headers=[("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")])


def _private_key_jwt(credentials: ClientCredentials) -> AuthFields:
    client = credentials.client
    if credentials.key is None:
        raise credentials.missing("key", "private_key")
    audience = credentials.audience or client.issuer
    assertion = client_assertion.build(
        credentials.key, client_id=client.client_id, audience=audience, now=credentials.now
    )
    # No client_id field: the assertion's sub identifies the client (MCP client credentials extension).
    return AuthFields(client_assertion.form(assertion))


_METHODS: Mapping[ClientAuth, Method] = {
    ClientAuth.NONE: _none,
    ClientAuth.BASIC: _basic,
    ClientAuth.POST: _post,
    ClientAuth.PRIVATE_KEY_JWT: _private_key_jwt,
}


def choose(
    supported: tuple[str, ...] | None, *, configured: ClientAuth | None, has_secret: bool, has_key: bool = False
) -> ClientAuth:
    """Return the authentication method: the configured one, or the one that fits the client's credentials.

    With a secret it also depends on ``supported``: basic is preferred to post (RFC 6749 §2.3.1), and is the default
    if the server does not list its methods (RFC 8414 §2).
    """
    if configured is not None:
        return configured
    if not has_secret:
        return ClientAuth.PRIVATE_KEY_JWT if has_key else ClientAuth.NONE
    if supported is not None and ClientAuth.POST in supported and ClientAuth.BASIC not in supported:
        return ClientAuth.POST
    return ClientAuth.BASIC


def authenticate(
    registration: Registration,
    form: Sequence[tuple[str, str]],
    *,
    key: SigningKey | None = None,
    now: float = 0.0,
    audience: str = "",
    include_client_id: bool = False,
) -> tuple[Fields, Fields]:
    """Return the form and headers of a request to the authorization server, with client authentication added.

    ``key``, ``now`` (Unix seconds) and ``audience`` (empty: the issuer) are for private_key_jwt. With
    ``include_client_id`` and client_secret_basic, the form has ``client_id`` as well (RFC 6749 §3.2.1), but never
    the secret. Raises AuthorizationError if the method needs a secret or key that is missing.
    """
    added = _METHODS[registration.client_auth](
        ClientCredentials(client=registration, key=key, now=now, audience=audience)
    )
    client_id = (
        [("client_id", registration.client_id)]
        if include_client_id and registration.client_auth is ClientAuth.BASIC
        else []
    )
    return [*form, *client_id, *added.fields], added.headers


def is_error_response(status: int, body: bytes, *errors: str) -> bool:
    """Return whether a response is one of these OAuth errors (RFC 6749 §5.2). None of them uses up a code or token."""
    if status not in (400, 401):
        return False
    try:
        return parse_object(body).get("error") in errors
    except ValueError:
        return False


def encode_form(fields: Sequence[tuple[str, str]]) -> bytes:
    """Return the fields as application/x-www-form-urlencoded (RFC 6749 appendix B)."""
    return urlencode(fields).encode()
