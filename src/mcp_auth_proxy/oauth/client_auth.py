"""How the client proves itself at the token endpoint (RFC 6749 §2.3, RFC 7523 §2.2)."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote_plus, urlencode

from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import ClientAuth, Registration
from mcp_auth_proxy.oauth import client_assertion
from mcp_auth_proxy.oauth.documents import parse_object

Fields = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCredentials:
    """What the methods prove a client with. ``now`` is in Unix seconds; an empty ``audience`` means the issuer."""

    client: Registration
    key: SigningKey | None = None
    now: float = 0.0
    audience: str = ""

    def secret(self) -> str:
        if self.client.client_secret is None:
            raise self.missing("secret", "client_secret")
        return self.client.client_secret

    def missing(self, what: str, setting: str) -> AuthorizationError:
        client = self.client
        return AuthorizationError(
            f"The client {client.client_id} is to authenticate by {client.client_auth.value} but has no {what}: set "
            f"servers.{client.server}.oauth.{setting}."
        )


@dataclass(frozen=True, slots=True)
class AuthFields:
    """What a method adds to a request: fields of the form, and headers."""

    fields: Fields = field(default_factory=list, repr=False)
    headers: Fields = field(default_factory=list, repr=False)


Method = Callable[[ClientCredentials], AuthFields]


def _none(proof: ClientCredentials) -> AuthFields:
    # A workload that presents an assertion may have no client identity at all (RFC 7521 §4.1).
    client_id = proof.client.client_id
    return AuthFields([("client_id", client_id)] if client_id else [])


def _post(proof: ClientCredentials) -> AuthFields:
    return AuthFields([("client_id", proof.client.client_id), ("client_secret", proof.secret())])


def _basic(proof: ClientCredentials) -> AuthFields:
    # RFC 6749 §2.3.1: both are form-encoded before they are joined, so that a colon in the id stays unambiguous.
    pair = f"{quote_plus(proof.client.client_id)}:{quote_plus(proof.secret())}"
    return AuthFields(headers=[("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")])


def _private_key_jwt(proof: ClientCredentials) -> AuthFields:
    client = proof.client
    if proof.key is None:
        raise proof.missing("key", "private_key")
    audience = proof.audience or client.issuer
    assertion = client_assertion.build(proof.key, client_id=client.client_id, audience=audience, now=proof.now)
    # No client_id beside it: the assertion's sub says who it is (MCP client credentials extension).
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
    """Return how a client is to authenticate: as configured; by what it has; with a secret by what is supported.

    Basic goes before post (RFC 6749 §2.3.1), and is the default of a server that does not say (RFC 8414 §2).
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
    """Return form and headers of a request to the authorization server, with the client's authentication in one.

    ``key``, ``now`` (Unix seconds) and ``audience`` (empty: the issuer) are for private_key_jwt. If
    ``include_client_id`` is true, with
    client_secret_basic ``client_id`` stands in the form as well (RFC 6749 §3.2.1), never the secret. Raises
    AuthorizationError where the method needs a secret or a key, and there is none.
    """
    added = _METHODS[registration.client_auth](
        ClientCredentials(client=registration, key=key, now=now, audience=audience)
    )
    name = (
        [("client_id", registration.client_id)]
        if include_client_id and registration.client_auth is ClientAuth.BASIC
        else []
    )
    return [*form, *name, *added.fields], added.headers


def refuses_client(status: int, body: bytes, *errors: str) -> bool:
    """Whether an answer is one of these errors, all of which leave what was sent unused (RFC 6749 §5.2)."""
    if status not in (400, 401):
        return False
    try:
        return parse_object(body).get("error") in errors
    except ValueError:
        return False


def encode_form(fields: Sequence[tuple[str, str]]) -> bytes:
    """Return the fields as application/x-www-form-urlencoded (RFC 6749 appendix B)."""
    return urlencode(fields).encode()
