"""Sign-in with OpenID Connect: authentication request and response, and what is read from the token response.

OpenID Connect Core 1.0 §3.1, with PKCE (RFC 7636) and the issuer in the response (RFC 9207).
"""

from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote, unquote_plus, urlencode

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused, excerpt
from mcp_auth_proxy.oauth import oauth_error
from mcp_auth_proxy.oauth.authorization_code import MAX_CODE, challenge_s256

OPENID = "openid"
_ONCE = ("code", "state", "iss", "error", "error_description")


def scopes_for(claims: Iterable[str], supported: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the scopes to ask for, so that the ID token has certain claims (§5.4).

    Providers refuse scopes that they do not know, so only those that they list are added.
    """
    wanted = ["profile", "email", *claims]
    return tuple(dict.fromkeys((OPENID, *(scope for scope in wanted if scope in (supported or ())))))


def authentication_url(
    endpoint: str,
    *,
    client_id: str,
    redirect_uri: str,
    scopes: tuple[str, ...],
    state: str,
    nonce: str,
    code_verifier: str,
) -> str:
    """Return the URL of the authentication request, for the user's browser (§3.1.2.1)."""
    base, _, query = endpoint.partition("?")
    params = {
        "response_type": "code",
        "client_id": client_id,
        "redirect_uri": redirect_uri,
        "scope": " ".join(scopes),
        "state": state,
        "nonce": nonce,
        "code_challenge": challenge_s256(code_verifier),
        "code_challenge_method": "S256",
    }
    kept = [pair for pair in query.split("&") if pair and unquote_plus(pair.partition("=")[0]) not in params]
    return f"{base}?{'&'.join([*kept, urlencode(params, quote_via=quote)])}"


def check_response(params: Mapping[str, Sequence[str]], *, issuer: str, iss_supported: bool) -> str:
    """Return the code of a response (§3.1.2.5). The caller has already checked ``state``.

    Raises CallbackRefused if it can't be from this issuer, AuthorizationDenied if it is an error response.
    """
    for name in _ONCE:
        if len(params.get(name, ())) > 1:
            raise CallbackRefused(f"The response has {name} more than once (RFC 6749 §3.1).")
    values = {name: params[name][0] for name in _ONCE if params.get(name)}
    secret_values.remember(values.get("code"), values.get("state"))
    iss = values.get("iss")
    if (iss is None and iss_supported) or (iss is not None and iss != issuer):
        raise CallbackRefused(f"The response is not from {excerpt(issuer)}: its iss is another or missing (RFC 9207).")
    if "error" in values:
        error = oauth_error.code(values["error"])
        words = oauth_error.format_error(error, values.get("error_description"), secrets=(values.get("state"),))
        raise AuthorizationDenied(f"The identity provider {excerpt(issuer)} refused: {words}.", error)
    code = values.get("code", "")
    if not code or len(code) > MAX_CODE or not (code.isascii() and code.isprintable()):
        raise CallbackRefused("The response has no usable code (RFC 6749 §4.1.2).")
    return code


def token_request(code: str, *, redirect_uri: str, code_verifier: str) -> list[tuple[str, str]]:
    """Return the form that redeems a code (§3.1.3.1)."""
    return [
        ("grant_type", "authorization_code"),
        ("code", code),
        ("redirect_uri", redirect_uri),
        ("code_verifier", code_verifier),
    ]


def id_token(answer: Mapping[str, object], *, issuer: str) -> str:
    """Return the ID token of a token response (§3.1.3.3). Raises AuthorizationError."""
    token = answer.get("id_token")
    if not isinstance(token, str) or not token.isascii():
        raise AuthorizationError(f"The token response of {excerpt(issuer)} has no id_token.")
    return token


def is_for(claims: Mapping[str, object], *, client_id: str, nonce: str) -> bool:
    """Return whether an ID token was made for this client and this request (§3.1.3.7).

    Issuer, audience, times and signature are checked elsewhere.
    """
    audiences = claims.get("aud")
    several = isinstance(audiences, list) and len(audiences) > 1
    azp = claims.get("azp")
    if claims.get("nonce") != nonce:
        return False
    return azp == client_id or (azp is None and not several)
