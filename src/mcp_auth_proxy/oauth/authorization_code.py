"""The authorization code grant: authorization request and response (RFC 6749 §4.1, RFC 7636, RFC 9207)."""

import base64
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from urllib.parse import quote, unquote_plus, urlencode

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused, excerpt
from mcp_auth_proxy.models import Flow
from mcp_auth_proxy.oauth import dpop, oauth_error, scopes

PROTECTED = frozenset(
    {"response_type", "client_id", "redirect_uri", "state", "code_challenge", "code_challenge_method", "dpop_jkt"}
)
"""Parameters that neither the configuration nor the endpoint's own query can set."""

MAX_CODE = 4096
"""Maximum length of an authorization code."""

_ONCE = ("code", "state", "iss", "error", "error_description", "error_uri")


def new_verifier() -> str:
    """Return a new PKCE code verifier: 256 random bits in 43 characters (RFC 7636 §4.1)."""
    return secrets.token_urlsafe(32)


def challenge_s256(verifier: str) -> str:
    """Return the S256 code challenge of a verifier (RFC 7636 §4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode("ascii")).digest()).rstrip(b"=").decode()


def new_state() -> str:
    """Return a new state: 256 random bits in 43 characters (RFC 6749 §10.12)."""
    return secrets.token_urlsafe(32)


def endpoint(flow: Flow) -> str:
    """Return the authorization endpoint of a flow. Raises AuthorizationError if there is none."""
    if not flow.endpoints.authorization:
        raise AuthorizationError(
            f"The authorization server {excerpt(flow.key.issuer)} has no authorization_endpoint, "
            f"so users can't authorize there."
        )
    return flow.endpoints.authorization


def authorization_url(flow: Flow, *, state: str, code_verifier: str) -> str:
    """Return the URL of the authorization request, for the user's browser (RFC 6749 §4.1.1, RFC 8707 §2).

    The endpoint's own query is kept (§3.1). ``flow.extra_params`` override our values; an empty value omits the
    parameter. No parameter appears twice. ``offline_access`` comes with ``prompt=consent``, because providers ignore
    that scope without it (OpenID Connect Core §11). If the flow has a key, the code is bound to it (RFC 9449 §10).
    Raises AuthorizationError if there is no authorization endpoint.
    """
    base, _, query = endpoint(flow).partition("?")
    params = {
        "response_type": "code",
        "client_id": flow.registration.client_id,
        "redirect_uri": flow.redirect_uri,
        "scope": " ".join(flow.scopes),
        "state": state,
        "code_challenge": challenge_s256(code_verifier),
        "code_challenge_method": "S256",
        "resource": flow.key.resource,
        "dpop_jkt": dpop.Key.load(flow.dpop_key).thumbprint if flow.dpop_key else "",
        "prompt": "consent" if scopes.OFFLINE_ACCESS in flow.scopes else "",
    }
    params.update((name, value) for name, value in flow.extra_params if name not in PROTECTED)
    kept = [pair for pair in query.split("&") if pair and unquote_plus(pair.partition("=")[0]) not in params]
    ours = urlencode([(name, value) for name, value in params.items() if value], quote_via=quote)
    return f"{base}?{'&'.join([*kept, ours])}"


def check_response(params: Mapping[str, Sequence[str]], *, flow: Flow) -> str:
    """Return the code of an authorization response to ``flow``. The caller has already checked ``state``.

    ``iss`` is checked first (RFC 9207 §2.4), so the error text of a wrong server is never shown. Raises
    CallbackRefused if the response can't be from this server, AuthorizationDenied if it is an error response.
    """
    for name in _ONCE:
        if len(params.get(name, ())) > 1:
            raise CallbackRefused(f"The authorization response has {name} more than once (RFC 6749 §3.1).")
    values = {name: params[name][0] for name in _ONCE if params.get(name)}
    secret_values.remember(values.get("code"), values.get("state"))
    iss = values.get("iss")
    if iss is None and flow.iss_supported:
        raise CallbackRefused(
            f"The authorization response has no iss, which {excerpt(flow.key.issuer)} promises to send (RFC 9207 §2.4)."
        )
    if iss is not None and iss != flow.key.issuer:
        raise CallbackRefused(
            f"The authorization response is from another issuer than {excerpt(flow.key.issuer)} (RFC 9207 §2.4)."
        )
    if "error" in values:
        error = oauth_error.code(values["error"])
        description = values.get("error_description")
        words = oauth_error.format_error(error, description, secrets=(values.get("state"),))
        context = oauth_error.TokenRequestContext(
            server=flow.key.account.server, resource=flow.key.resource, scopes=flow.scopes
        )
        explanation, hint = oauth_error.hint(error, description, context)
        raise AuthorizationDenied(
            f"The authorization server {excerpt(flow.key.issuer)} refused: {words}.{explanation}", error, hint=hint
        )
    code = values.get("code", "")
    if not code or len(code) > MAX_CODE or not (code.isascii() and code.isprintable()):
        raise CallbackRefused("The authorization response has no usable code (RFC 6749 §4.1.2).")
    return code
