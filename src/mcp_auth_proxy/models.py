"""Frozen values that every floor shares. Secrets are left out of ``repr``.

Times are Unix seconds (float, UTC); scopes are tuples in the order they were given, without repeats.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

LOCAL = "local"
"""The id of the one principal if callers are not identified."""


class Account(NamedTuple):
    """Whose grant of which server: the key of token cache, flows, single flight and store.

    A named tuple, because it is hashed for every request.
    """

    principal: str
    server: str
    name: str = "default"
    """One principal may use a server with several accounts."""


class ClientAuth(StrEnum):
    """How a client authenticates at the token endpoint (RFC 7591 §2, token_endpoint_auth_method)."""

    NONE = "none"
    BASIC = "client_secret_basic"
    POST = "client_secret_post"
    PRIVATE_KEY_JWT = "private_key_jwt"


class GrantType(StrEnum):
    """How tokens are obtained; the values are those of the configuration key ``grant``."""

    AUTHORIZATION_CODE = "authorization_code"
    CLIENT_CREDENTIALS = "client_credentials"
    DEVICE_CODE = "device_code"
    JWT_BEARER = "jwt_bearer"
    ID_JAG = "id_jag"
    TOKEN_EXCHANGE = "token_exchange"

    @property
    def unattended(self) -> bool:
        """Whether tokens are had within a request: no user is asked."""
        return self.repeatable or self is GrantType.TOKEN_EXCHANGE

    @property
    def repeatable(self) -> bool:
        """Whether the configuration alone is enough to ask for new tokens at any time."""
        return self in (GrantType.CLIENT_CREDENTIALS, GrantType.JWT_BEARER, GrantType.ID_JAG)


class DpopUse(StrEnum):
    """Whether tokens are bound to a key of ours (RFC 9449); the values are those of the configuration key ``dpop``."""

    OFF = "off"
    AUTO = "auto"
    """Where both the resource and the authorization server want it."""
    REQUIRED = "required"


class RegistrationKind(StrEnum):
    """Where a client identity came from."""

    CONFIGURED = "configured"
    METADATA_DOCUMENT = "metadata_document"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """A client identity at one authorization server, for one of our servers."""

    server: str
    issuer: str
    client_id: str
    client_auth: ClientAuth
    kind: RegistrationKind
    client_secret: str | None = field(default=None, repr=False)
    redirect_uri: str = ""
    account: str = "default"
    secret_expires_at: float | None = None
    created_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """What a token endpoint answered, after validation (RFC 6749 §5.1)."""

    access_token: str = field(repr=False)
    token_type: str = "Bearer"
    """``Bearer``, or ``DPoP`` for a token that is good with a proof only."""
    refresh_token: str | None = field(default=None, repr=False)
    obtained_at: float
    expires_at: float | None = None
    """None where the server did not say: then only a 401 tells that it has died."""
    scopes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """The endpoints of an authorization server that outlive discovery."""

    authorization: str = ""
    token: str
    revocation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantKey:
    """What a grant is for. ``resource`` is empty where the resource parameter is omitted.

    ``upstream`` is the origin that the tokens may be sent to; None in what was stored before that was kept. A new
    authorization for another one takes the place of the old.
    """

    account: Account
    resource: str
    issuer: str
    upstream: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Tokens held for one key, and all that renewing them needs."""

    id: int = 0
    """0 until stored."""
    key: GrantKey
    grant_type: GrantType
    registration: Registration
    endpoints: Endpoints
    tokens: TokenSet
    scopes: tuple[str, ...]
    """What was asked for; ``tokens.scopes`` is what was given."""
    granted_at: float
    dpop_key: str | None = field(default=None, repr=False)
    """The private key that the tokens were asked for with, as ``oauth.dpop.Key.text``; kept for the grant's life."""
    version: int = 1
    """The fencing version: one more with each renewal."""
    refresh_begun_at: float | None = None
    """Set while a refresh is on its way; found set at start-up, it tells of a crash in between."""
    refresh_owner: str = ""
    ended_at: float | None = None
    ended_reason: str = ""


class FlowStatus(StrEnum):
    """How far an authorization has come."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAuthorization:
    """What the user needs to authorize on another device, and what we poll with (RFC 8628 §3.2)."""

    device_code: str = field(repr=False)
    user_code: str = field(repr=False)
    verification_uri: str
    verification_uri_complete: str = field(default="", repr=False)
    """Empty where the server has none."""
    interval: float = 5.0
    """Seconds between two polls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One authorization that waits for a user. ``id`` is the unguessable part of the link."""

    id: str
    key: GrantKey
    registration: Registration
    endpoints: Endpoints
    scopes: tuple[str, ...]
    redirect_uri: str
    iss_supported: bool
    """The server promises ``iss`` in every authorization response (RFC 9207 §3)."""
    extra_params: tuple[tuple[str, str], ...] = ()
    created_at: float
    expires_at: float
    status: FlowStatus = FlowStatus.PENDING
    reason: str = ""
    """Why it failed, in words for the user."""
    device: DeviceAuthorization | None = None
    """Set where the user authorizes on another device; then there is no redirect."""
    dpop_key: str | None = field(default=None, repr=False)
    """The key that the grant is to be bound to, from before the user is asked until it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One visit of a browser to the link of a flow: what the authorization response is held against.

    ``state_hash`` and ``browser_hash`` are SHA-256 in hex of the state and of the cookie that binds the
    browser; the values themselves are never stored.
    """

    flow_id: str
    state_hash: str
    browser_hash: str
    code_verifier: str = field(repr=False)
    created_at: float
    expires_at: float


class DPoPSigner(Protocol):
    """Goes with a token that is good for nothing without a proof for each request."""

    def prove(self, method: bytes, target: bytes) -> bytes:
        """Return the proof for one request to the token's server, to be used once."""

    def update_nonce(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Take in what an answer says about the next proof."""


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What the data plane may hold: a ready Authorization header and its generation."""

    header: bytes = field(repr=False)
    generation: int
    """Grows with every token that is put in the place of another for this principal and server."""
    prover: DPoPSigner | None = field(default=None, repr=False)
    """None for a bearer token."""
