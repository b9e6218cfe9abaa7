"""Parse requests to the demo's authorization server."""

import base64
import binascii
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from starlette.requests import Request

from mcp_auth_proxy.cli.demo_servers.ledger import OAuthError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def requested_scopes(params: Mapping[str, str]) -> tuple[str, ...]:
    """Return the requested scopes without duplicates (RFC 6749 §3.3)."""
    return tuple(dict.fromkeys(params.get("scope", "").split()))


async def read_form(request: Request) -> dict[str, str]:
    """Return the form of a request: form-encoded, no duplicate parameters (RFC 6749 §3.2)."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise OAuthError("invalid_request", "the body must be application/x-www-form-urlencoded")
    pairs = parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    form = dict(pairs)
    if len(form) != len(pairs):
        raise OAuthError("invalid_request", "a parameter is given twice")
    return form


def basic_credentials(header: str) -> tuple[str, str]:
    """Return client id and secret; both are form-encoded before they are joined (RFC 6749 §2.3.1)."""
    scheme, _, encoded = header.partition(" ")
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if scheme.lower() != "basic" or not colon:
        raise OAuthError("invalid_client", "the Authorization header is not Basic", 401)
    return unquote_plus(client_id), unquote_plus(secret)


def registered_redirects(client_metadata: Mapping[str, object]) -> tuple[str, ...]:
    """Return the redirect URIs, which must fit the application type (RFC 7591 §5, OpenID Connect registration §2)."""
    grant_types = client_metadata.get("grant_types", ["authorization_code"])
    given = client_metadata.get("redirect_uris", [])
    if not isinstance(given, list) or not all(isinstance(uri, str) for uri in given):
        raise OAuthError("invalid_redirect_uri", "redirect_uris is not a list of strings")
    if not given and isinstance(grant_types, list) and "authorization_code" in grant_types:
        raise OAuthError("invalid_redirect_uri", "redirect_uris is missing")
    for uri in given:
        parts = urlsplit(uri)
        loopback = parts.scheme == "http" and parts.hostname in LOOPBACK
        if parts.fragment or not (loopback or parts.scheme == "https"):
            raise OAuthError("invalid_redirect_uri", "redirect URIs are https, or http on loopback")
        kind = client_metadata.get("application_type")
        if (kind == "web" and loopback) or (kind == "native" and not loopback):
            raise OAuthError("invalid_redirect_uri", f"this redirect URI does not fit application_type {kind}")
    return tuple(given)
