"""Client authentication by a signed assertion instead of a secret: private_key_jwt (RFC 7523 §2.2, §3)."""

import secrets

from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.oauth.signing import sign

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

LIFETIME = 120
"""Lifetime of an assertion in seconds: it is used at once, but clocks differ a little."""


def build(key: SigningKey, *, client_id: str, audience: str, now: float) -> str:
    """Return a new assertion for one request; ``now`` is in Unix seconds.

    ``audience`` should be the issuer identifier of the authorization server. RFC 7523 §3 also allows the endpoint's
    URL, but then a hostile server can use the assertion at another one (draft-ietf-oauth-rfc7523bis §4; MCP client
    credentials extension). ``jti`` is unique.
    """
    issued = int(now)
    claims: dict[str, object] = {
        "iss": client_id,
        "sub": client_id,
        "aud": audience,
        "jti": secrets.token_urlsafe(24),
        "iat": issued,
        "exp": issued + LIFETIME,
    }
    return sign(claims, key.key, algorithm=key.algorithm)


def form(assertion: str) -> list[tuple[str, str]]:
    """Return the fields that carry an assertion (RFC 7523 §2.2)."""
    return [("client_assertion_type", ASSERTION_TYPE), ("client_assertion", assertion)]
