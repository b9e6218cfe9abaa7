"""Reads what clients send to the demo's authorization server."""

import base64
import binascii
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote_plus, urlsplit

from starlette.requests import Request

from mcp_auth_proxy.cli.demo_servers.ledger import OAuthFault

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def asked_scopes(params: Mapping[str, str]) -> tuple[str, ...]:
    """RFC 6749 §3.3, without repeats."""
    return tuple(dict.fromkeys(params.get("scope", "").split()))


async def read_form(request: Request) -> dict[str, str]:
    """RFC 6749 §3.2: form-encoded, and no parameter twice."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise OAuthFault("invalid_request", "the body must be application/x-www-form-urlencoded")
    pairs = parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    form = dict(pairs)
    if len(form) != len(pairs):
        raise OAuthFault("invalid_request", "a parameter is given twice")
    return form


def basic_credentials(header: str) -> tuple[str, str]:
    """RFC 6749 §2.3.1: both halves are form-encoded before they are joined."""
    scheme, _, encoded = header.partition(" ")
    try:
        client_id, colon, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if scheme.lower() != "basic" or not colon:
        raise OAuthFault("invalid_client", "the Authorization header is not Basic", 401)
    return unquote_plus(client_id), unquote_plus(secret)


def registered_redirects(asked: Mapping[str, object]) -> tuple[str, ...]:
    """RFC 7591 §5 and OpenID Connect registration §2: what suits the application type."""
    grant_types = asked.get("grant_types", ["authorization_code"])
    given = asked.get("redirect_uris", [])
    if not isinstance(given, list) or not all(isinstance(uri, str) for uri in given):
        raise OAuthFault("invalid_redirect_uri", "redirect_uris is not a list of strings")
    if not given and isinstance(grant_types, list) and "authorization_code" in grant_types:
        raise OAuthFault("invalid_redirect_uri", "redirect_uris is missing")
    for uri in given:
        parts = urlsplit(uri)
        loopback = parts.scheme == "http" and parts.hostname in LOOPBACK
        if parts.fragment or not (loopback or parts.scheme == "https"):
            raise OAuthFault("invalid_redirect_uri", "redirect URIs are https, or http on loopback")
        kind = asked.get("application_type")
        if (kind == "web" and loopback) or (kind == "native" and not loopback):
            raise OAuthFault("invalid_redirect_uri", f"this redirect URI does not suit application_type {kind}")
    return tuple(given)
