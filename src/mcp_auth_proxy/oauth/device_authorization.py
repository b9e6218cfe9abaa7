"""The device authorization grant: a code for the user, and polling until the user has entered it (RFC 8628)."""

import contextlib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from mcp_auth_proxy.config.settings import server_key
from mcp_auth_proxy.errors import AuthorizationError, excerpt
from mcp_auth_proxy.models import DeviceAuthorization, Flow, TokenSet
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import oauth_error, token_endpoint
from mcp_auth_proxy.oauth.documents import Document, parse_object

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:device_code"

INTERVAL_DEFAULT = 5.0
"""Seconds between polls if the server does not say (RFC 8628 §3.2)."""

SLOW_DOWN_STEP = 5.0
"""Seconds that ``slow_down`` adds to the interval (RFC 8628 §3.5)."""

INTERVAL_MIN, INTERVAL_MAX = 1.0, 60.0
LIFETIME_MIN, LIFETIME_MAX = 10.0, 3600.0
LIFETIME_DEFAULT = 600.0
"""Seconds. expires_in is required, but some servers omit it."""

MAX_CODE = 4096
"""Maximum length of a device code."""

MAX_USER_CODE = 64
"""Maximum length of a user code: a person has to type it."""


class Poll(Enum):
    """Responses to a poll that mean: poll again (RFC 8628 §3.5)."""

    PENDING = "authorization_pending"
    SLOW_DOWN = "slow_down"


class DeviceGrantStart(NamedTuple):
    """A device authorization and its lifetime in seconds."""

    device: DeviceAuthorization
    lifetime: float


def request(*, resource: str, scopes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the form of the device authorization request (RFC 8628 §3.1, RFC 8707 §2)."""
    scope = [("scope", " ".join(scopes))] if scopes else []
    return [*scope, *([("resource", resource)] if resource else [])]


def read_response(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    url: str,
    http_loopback: bool,
    secrets: Iterable[str] = (),
) -> DeviceGrantStart:
    """Return the validated device authorization response (RFC 8628 §3.2). Raises as ``token_endpoint.read_answer``.

    The verification URIs are shown to the user as links, so they must be https, or http on loopback if
    ``http_loopback`` is true. ``verification_url`` is Google's name for the member. A verification_uri_complete at
    another origin is ignored.
    """
    answer = token_endpoint.read_answer(
        status,
        headers,
        body,
        url=url,
        endpoint="device authorization endpoint",
        clause="RFC 8628 §3.2",
        secrets=secrets,
    )
    document = Document(answer, name="device authorization response", url=url, clause="RFC 8628 §3.2")
    device_code, user_code = document.required_string("device_code"), document.required_string("user_code")
    if len(device_code) > MAX_CODE or len(user_code) > MAX_USER_CODE:
        raise document.refusal("its device_code or user_code is too long")
    name = "verification_uri" if document.get("verification_uri") is not None else "verification_url"
    plain, complete = document.string(name), document.string("verification_uri_complete") or ""
    if not plain:
        raise document.refusal("it has no verification_uri")
    for member, uri in ((name, plain), ("verification_uri_complete", complete)):
        try:
            if uri:
                urls.check(uri, http_loopback=http_loopback)
        except ValueError as problem:
            raise document.refusal(f"{member} can't be used: it {problem}") from None
    if complete and urls.parse(complete).origin != urls.parse(plain).origin:
        # The user is shown the plain one, and must not be led elsewhere.
        complete = ""
    device = DeviceAuthorization(
        device_code=device_code,
        user_code=user_code,
        verification_uri=plain,
        verification_uri_complete=complete,
        interval=_clamped(document.get("interval"), INTERVAL_DEFAULT, INTERVAL_MIN, INTERVAL_MAX),
    )
    return DeviceGrantStart(device, _clamped(document.get("expires_in"), LIFETIME_DEFAULT, LIFETIME_MIN, LIFETIME_MAX))


def poll_request(flow: Flow) -> list[tuple[str, str]]:
    """Return the form of one poll (RFC 8628 §3.4). Raises ValueError if the flow has no device code."""
    if flow.device is None:
        raise ValueError("the flow has no device code")
    target = [("resource", flow.key.resource)] if flow.key.resource else []
    return [("grant_type", GRANT_TYPE), ("device_code", flow.device.device_code), *target]


def read_poll(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    flow: Flow,
    now: float,
    secrets: Iterable[str] = (),
    token_types: tuple[str, ...] = token_endpoint.BEARER_ONLY,
) -> TokenSet | Poll:
    """Return the tokens, or whether to poll again (RFC 8628 §3.5). Raises as ``token_endpoint.read_tokens``.

    Do not send the device code again after tokens: some servers take that for theft and end the grant.
    """
    if status < 500:
        # GitHub sends these errors with HTTP 200.
        with contextlib.suppress(ValueError):
            return Poll(oauth_error.code(parse_object(body).get("error")))
    return token_endpoint.read_tokens(
        status,
        headers,
        body,
        url=flow.endpoints.token,
        now=now,
        requested_scopes=flow.scopes,
        secrets=secrets,
        token_types=token_types,
    )


def not_offered(issuer: str, server: str) -> AuthorizationError:
    """Return the error for an authorization server without a device authorization endpoint (RFC 8628 §4)."""
    return AuthorizationError(
        f"The metadata of the authorization server {excerpt(issuer)} has no device_authorization_endpoint "
        f"(RFC 8628 §4). If the server has one, set it in {server_key(server, 'oauth.metadata')}. Otherwise use "
        f"another {server_key(server, 'oauth.grant')}."
    )


def _clamped(value: object, default: float, least: float, most: float) -> float:
    seconds = token_endpoint.read_lifetime(value)
    return default if seconds is None else min(max(seconds, least), most)
