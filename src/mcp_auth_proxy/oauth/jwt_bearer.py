"""An assertion as an authorization grant (RFC 7523 §2.1): a workload's own token, or an ID-JAG."""

import re

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:jwt-bearer"

_JWT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*){2,4}")


def is_jwt(text: str) -> bool:
    """Return whether a text has the form of a signed or encrypted JWT (RFC 7519 §3). Its content is not checked."""
    return _JWT.fullmatch(text) is not None


def request(assertion: str, *, resource: str, scopes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the form that exchanges an assertion for an access token (RFC 7523 §2.1, RFC 8707 §2.2)."""
    scope = [("scope", " ".join(scopes))] if scopes else []
    target = [("resource", resource)] if resource else []
    return [("grant_type", GRANT_TYPE), ("assertion", assertion), *scope, *target]
