"""Client registration: dynamic registration (RFC 7591) and the Client ID Metadata Document.

No ``scope`` is registered: some providers refuse it, others make it a limit, and then a step-up fails.
"""

import json
from typing import Literal, NamedTuple

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.config.settings import server_key
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, RegistrationImpossible, excerpt
from mcp_auth_proxy.models import ClientAuth
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import client_auth, device_authorization, oauth_error, retry_after
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.oauth.documents import Document, parse_object

CLIENT_NAME = "mcp-auth-proxy"

# A native app can't keep a secret (RFC 8252 §8.4); a shared service can, and a secret protects its refresh tokens.
# Post is preferred to basic: some servers list both, but support only post at /revoke or /token.
_PREFERENCE: dict[str, tuple[ClientAuth, ...]] = {
    "native": (ClientAuth.NONE, ClientAuth.POST, ClientAuth.BASIC),
    "web": (ClientAuth.POST, ClientAuth.BASIC, ClientAuth.NONE),
}

# private_key_jwt needs a key from the operator, which a dynamically registered client does not have.
_REGISTRABLE = frozenset({ClientAuth.NONE, ClientAuth.BASIC, ClientAuth.POST})


class RegisteredClient(NamedTuple):
    """A client information response (RFC 7591 §3.2.1). ``secret_expires_at`` is in Unix seconds, None if never."""

    client_id: str
    client_secret: str | None
    client_auth: ClientAuth
    secret_expires_at: float | None

    def __repr__(self) -> str:
        return f"RegisteredClient(client_id={self.client_id!r}, client_auth={self.client_auth.value!r})"


def application_type(redirect_uri: str) -> Literal["native", "web"]:
    """Return ``native`` without a redirect URI or with http on loopback, else ``web`` (OIDC Registration §2)."""
    if not redirect_uri:
        return "native"
    origin = urls.parse(redirect_uri).origin
    return "native" if origin.scheme == "http" and urls.is_loopback(origin.host) else "web"


def build_request(auth_method: ClientAuth | None, *, redirect_uri: str, client_name: str = CLIENT_NAME) -> bytes:
    """Return the JSON body of a registration request (RFC 7591 §3.1); without a redirect URI, one for device codes.

    ``auth_method`` is the authentication method that ``method`` chose. None omits the member and lets the server
    decide: the default is client_secret_basic (RFC 7591 §2), and servers for public clients only send no secret.
    """
    kind = application_type(redirect_uri)
    request: dict[str, object] = {**_client(redirect_uri, client_name), "application_type": kind}
    if auth_method is not None:
        request["token_endpoint_auth_method"] = auth_method.value
    return json.dumps(request).encode()


def method(
    metadata: ServerMetadata, *, redirect_uri: str, configured: ClientAuth | None = None, server: str = ""
) -> ClientAuth | None:
    """Return the authentication method to register for; None to let the server decide.

    It is the configured method, or one that the server lists. Raises AuthorizationError if the server lists its
    methods and the configured one is not among them.
    """
    supported = metadata.token_endpoint_auth_methods_supported or ()
    listed = next((m for m in _PREFERENCE[application_type(redirect_uri)] if m.value in supported), None)
    if configured is None or not supported or configured.value in supported:
        return configured or listed
    raise AuthorizationError(
        f"The authorization server {excerpt(metadata.issuer)} supports {excerpt(', '.join(supported))} at its token "
        f"endpoint (token_endpoint_auth_methods_supported, RFC 8414 §2), but {server_key(server, 'oauth.client_auth')} "
        f"is {configured.value}. Change or remove that key."
    )


def read_response(
    status: int,
    body: bytes,
    *,
    url: str,
    server: str,
    supported: tuple[str, ...] | None = None,
    requested: ClientAuth | None = None,
    configured: ClientAuth | None = None,
) -> RegisteredClient:
    """Return the client that was registered.

    If the response names no authentication method, it is the ``requested`` one, or, if there is an unrequested secret,
    one of ``supported``, the server's methods. A method other than the ``configured`` one is an error.

    Raises RegistrationImpossible with the server's reason and the keys that replace registration, DocumentRefused for
    a response that breaks RFC 7591 §3.2.1, AuthorizationServerUnavailable for 408, 429 and 5xx.
    """
    if retry_after.is_temporary(status):
        raise AuthorizationServerUnavailable(f"Could not register a client at {excerpt(url)}: HTTP {status}.")
    if status not in (200, 201):
        raise _refused(_error_text(status, body), url, server)
    document = Document.parse(body, name="client registration", url=url, clause="RFC 7591 §3.2.1")
    client_id = document.required_string("client_id")
    secret = document.string("client_secret") or None
    management = document.get("registration_access_token")
    secret_values.remember(secret, management if isinstance(management, str) else None)
    stated = document.string("token_endpoint_auth_method") or None
    if configured is not None and stated not in (None, configured.value):
        key = server_key(server, "oauth.client_auth")
        raise _refused(f"the client was registered for {excerpt(stated)}, but {key} is {configured}", url, server)
    if stated is None:
        kept = requested if secret is not None and requested is not ClientAuth.NONE else None
        method = client_auth.choose(supported, configured=configured or kept, has_secret=secret is not None)
    elif stated in _REGISTRABLE:
        method = ClientAuth(stated)
    else:
        raise _refused(
            f"it requires the authentication method {excerpt(stated)}, which the proxy does not support", url, server
        )
    if method is not ClientAuth.NONE and secret is None:
        raise document.refusal(f"it has no client_secret, which {method.value} needs")
    return RegisteredClient(client_id, secret, method, _expiry(document.get("client_secret_expires_at")))


def is_not_oauth(status: int, body: bytes) -> bool:
    """Return whether the response of a guessed registration endpoint shows that there is no OAuth at this server."""
    if status in (401, 403):
        try:
            return not isinstance(parse_object(body).get("error"), str)
        except ValueError:
            return True
    return status in (404, 405, 410)


def oauth_not_found(url: str, status: int, *, server: str, schemes: tuple[str, ...]) -> RegistrationImpossible:
    """Return the error for a server that requires credentials, but not OAuth. ``schemes`` are the ones it asks for."""
    asks = f" The server asks for {', '.join(schemes)}, which the proxy does not support." if schemes else ""
    issuer, metadata, client_id = (server_key(server, f"oauth.{key}") for key in ("issuer", "metadata", "client_id"))
    return RegistrationImpossible(
        f"No OAuth metadata was found, and the default endpoint {excerpt(url)} (MCP 2025-03-26) answers HTTP {status}."
        f"{asks} If its authorization server is elsewhere, set {issuer} or {metadata}. If it does not support dynamic "
        f"registration, register a client there by hand and set {client_id}."
    )


def client_metadata_document(public_url: str, *, device: bool = False) -> dict[str, object]:
    """Return the proxy's Client ID Metadata Document; its ``client_id`` is its own URL.

    ``device``: it may also use device codes (draft-ietf-oauth-client-id-metadata-document §4).
    """
    redirect_uri = f"{public_url}/oauth/callback"
    document: dict[str, object] = {
        "client_id": f"{public_url}/oauth/client-metadata.json",
        "client_uri": public_url,
        **_client(redirect_uri, CLIENT_NAME),
        "application_type": application_type(redirect_uri),
        "token_endpoint_auth_method": ClientAuth.NONE.value,
    }
    if device:
        document["grant_types"] = ["authorization_code", "refresh_token", device_authorization.GRANT_TYPE]
    return document


def _client(redirect_uri: str, client_name: str) -> dict[str, object]:
    # RFC 7591 §2.1: a response type is only for grant types that use the authorization endpoint.
    return {
        "client_name": client_name,
        "redirect_uris": [redirect_uri] if redirect_uri else [],
        "grant_types": ["authorization_code" if redirect_uri else device_authorization.GRANT_TYPE, "refresh_token"],
        "response_types": ["code"] if redirect_uri else [],
    }


def _refused(reason: str, url: str, server: str) -> RegistrationImpossible:
    return RegistrationImpossible(
        f"Dynamic client registration at {excerpt(url)} failed: {reason}. Register a client there by hand and set "
        f"{server_key(server, 'oauth.client_id')} and {server_key(server, 'oauth.client_secret')}."
    )


def _error_text(status: int, body: bytes) -> str:
    """Return the error in words (RFC 7591 §3.2.2), or the status if there is no structured error."""
    try:
        answer = parse_object(body)
    except ValueError:
        return f"HTTP {status}"
    if not isinstance(answer.get("error"), str):
        return f"HTTP {status}"
    return oauth_error.format_error(oauth_error.code(answer["error"]), answer.get("error_description"))


def _expiry(value: object) -> float | None:
    """Return the expiry in Unix seconds; None for never, which is 0 (RFC 7591 §3.2.1), and for what is not a time."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 15:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < 1e12 else None
