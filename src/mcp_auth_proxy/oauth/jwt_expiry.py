"""When an access token expires, as the token itself says: a hint for renewing it ahead of time, and nothing else.

Access tokens are opaque to their clients (RFC 6749 §1.4). Some are JWTs (RFC 9068), whose ``exp`` anybody can read. It
is used only if the token response has no ``expires_in``, nothing is verified, and nothing is refused because of it.
"""

import base64
import binascii
import math

from mcp_auth_proxy.oauth.documents import parse_object

MAX_LIFETIME = 10 * 365 * 86400.0
"""Seconds after which ``exp`` is hardly meant."""


def read(token: str, *, obtained_at: float) -> float | None:
    """Return the ``exp`` of a JWT in Unix seconds; None if it is not one, or not later than it was obtained."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = parse_object(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        return None
    expires_at = claims.get("exp")
    if isinstance(expires_at, bool) or not isinstance(expires_at, int | float):
        return None
    try:
        lifetime = float(expires_at) - obtained_at
    except OverflowError:
        return None
    return float(expires_at) if math.isfinite(lifetime) and 1 <= lifetime <= MAX_LIFETIME else None
