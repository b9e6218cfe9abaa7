"""Let pages of the configured origins use the MCP endpoints (WHATWG Fetch §3.2, CORS).

An origin is allowed by name, never by ``*``, and without cookies: the endpoints have none. A page that has a key or a
token of its own sends it as any client does.
"""

import re
from collections.abc import Collection

from mcp_auth_proxy.net.http_head import Headers, encode_fields

METHODS = b"GET, POST, DELETE"

REQUEST_FIELDS = (
    b"accept",
    b"authorization",
    b"content-type",
    b"last-event-id",
    b"mcp-method",
    b"mcp-name",
    b"mcp-protocol-version",
    b"mcp-session-id",
    b"traceparent",
    b"tracestate",
    b"x-api-key",
)
"""What MCP clients send. A page may send other fields too, which a preflight asks for by name."""

EXPOSED = b"Mcp-Session-Id, WWW-Authenticate, Retry-After"
"""Response fields that a script may read."""

MAX_AGE = b"7200"
"""Seconds that a browser may remember a preflight. Chromium allows no more."""

_NAME = re.compile(rb"[!#$%&'+.^_`|~0-9a-z-]+")
"""A field name (RFC 9110 §5.1), but not ``*``, which would stand for all of them."""


class AllowedOrigins:
    """The origins in ``inbound.allowed_origins``, as browsers write them. Falsy if there are none."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origin.encode("ascii") for origin in origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def __contains__(self, origin: bytes) -> bool:
        return origin in self._origins

    def origin_of(self, headers: Headers) -> bytes:
        """Return the origin of a request if its pages are allowed, else ``b""``."""
        origins = [value for name, value in headers if name == b"origin"]
        return origins[0] if len(origins) == 1 and origins[0] in self else b""

    def response_fields(self, method: bytes, headers: Headers) -> bytes:
        """Return the encoded fields of every response to a request, refusals too.

        None if there is no Origin, except for a GET: caches may keep its response, and must not give it to a page.
        """
        if not self or (method != b"GET" and all(name != b"origin" for name, _ in headers)):
            return b""
        fields = [(b"vary", b"Origin")]
        if origin := self.origin_of(headers):
            fields += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED)]
        return encode_fields(fields)


def preflight_fields(headers: Headers) -> Headers:
    """Return the fields of the answer to a preflight, besides those of every response."""
    asked = b",".join(value for name, value in headers if name == b"access-control-request-headers")
    names = [name for part in asked.split(b",") if _NAME.fullmatch(name := part.strip().lower())]
    fields = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-allow-headers", b", ".join(dict.fromkeys((*REQUEST_FIELDS, *names)))),
        (b"access-control-max-age", MAX_AGE),
    ]
    if (b"access-control-request-private-network", b"true") in headers:
        # From a page on the internet to this machine (WICG Private Network Access §3.1).
        fields.append((b"access-control-allow-private-network", b"true"))
    return fields
