"""Frozen values shared by all layers. Secrets are left out of ``repr``, and masked in texts from outside.

Times are Unix seconds (float, UTC); scopes are tuples in the order given, without duplicates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

from mcp_auth_proxy import secret_values

LOCAL = "local"
"""The id of the only principal if callers are not identified."""

DEFAULT_PROJECT = "default"
"""The project of principals and servers that name none."""

DEFAULT_ACCOUNT = "default"
"""The name of the account that a principal uses if none is named."""


class Account(NamedTuple):
    """One account of a principal at a server: the key of token cache, flows, single flight and store.

    A named tuple, because it is hashed for every request.
    """

    principal: str
    server: str
    name: str = DEFAULT_ACCOUNT
    """One principal may use a server with several accounts."""

    @property
    def shown(self) -> str:
        """``SERVER`` or, if it is not the default account, ``SERVER@ACCOUNT``: how people and addresses name it."""
        return self.server if self.name == DEFAULT_ACCOUNT else f"{self.server}@{self.name}"


def shared_principal(project_id: str) -> str:
    """Return what stands for a principal in the accounts of servers whose grants belong to a project."""
    return f"project:{project_id}"


class Role(StrEnum):
    """What a principal may do with the things of others."""

    ADMIN = "admin"
    MEMBER = "member"


class PrincipalStatus(StrEnum):
    """Whether a principal may call."""

    ACTIVE = "active"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Somebody who calls: a person or a program, with grants of its own."""

    id: str
    name: str
    project_id: str = DEFAULT_PROJECT
    role: Role = Role.MEMBER
    status: PrincipalStatus = PrincipalStatus.ACTIVE
    listed: bool = True
    """Somebody who administers the proxy has made or named it; otherwise its first request has made it."""
    created_at: float = 0.0

    @property
    def is_active(self) -> bool:
        """Whether the principal may call."""
        return self.status is PrincipalStatus.ACTIVE


class Identity(NamedTuple):
    """What a credential says about who calls; each belongs to one principal.

    ``source`` is ``key``, ``jwt:<issuer>``, ``header:<name>`` or ``local``; ``subject`` is unique there.
    """

    source: str
    subject: str


class Scope(StrEnum):
    """What a credential may be used for."""

    MCP = "mcp"
    """Calls of MCP servers."""
    SELF = "self"
    """The API, for the principal's own things."""
    ADMIN = "admin"
    """The API, for the things of others; only if the principal is an admin too."""


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """An API key as it is stored. The key itself is shown once, when it is made, and then forgotten."""

    id: str
    """The second part of the key, ``mapk_<id>_<secret>``."""
    principal: str
    """The id of the principal that it belongs to."""
    name: str
    key_hash: str
    """The SHA-256 (hex) of the whole key, which has 256 random bits."""
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None
    """To the hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A principal, and the credential that it calls with."""

    principal: Principal
    credential: str
    """For the audit trail: ``local``, ``token``, ``key:ID``, ``jwt:ISSUER``, ``header:NAME`` or ``session:ID``."""
    scopes: frozenset[Scope] = ALL_SCOPES
    key: str = ""
    """The id of the API key that it calls with, or has signed in with; empty if there is none."""
    jwt: str | None = field(default=None, repr=False)
    """The JWT that the caller presented, the subject of a token exchange. Never stored, and sent nowhere else."""
    may_call: bool = field(init=False, repr=False, compare=False)
    """Whether the credential is for calls of MCP servers. To hash a member of an enum takes 0.3 µs for each request."""

    @property
    def is_admin(self) -> bool:
        """Whether the caller may do what is for admins: by its role, and with the credential that it uses."""
        return self.principal.role is Role.ADMIN and Scope.ADMIN in self.scopes

    def __post_init__(self) -> None:
        object.__setattr__(self, "may_call", Scope.MCP in self.scopes)
        secret_values.remember(self.jwt)


LOCAL_PRINCIPAL = Principal(id=LOCAL, name=LOCAL, role=Role.ADMIN)
LOCAL_CALLER = Caller(principal=LOCAL_PRINCIPAL, credential="local")
"""Everybody, if callers are not identified."""


class SessionKind(StrEnum):
    """Where a session of a browser comes from, or what a link for one has become."""

    BROWSER = "browser"
    """Its user has signed in."""
    LINK = "link"
    """Its user has opened the single-use link of ``dashboard``."""
    UNUSED_LINK = "unused_link"
    """Not a session yet: the link itself."""
    USED_LINK = "used_link"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A browser whose user has signed in. ``id`` is no secret: the browser's cookie is, and only its hash is stored."""

    id: str
    kind: SessionKind
    principal: str
    """The principal's id."""
    credential: str
    """What the user has signed in with, as in ``Caller``; ``link:ID`` for a single-use link."""
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float


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
        """Whether tokens are obtained without asking a user."""
        return self.repeatable or self is GrantType.TOKEN_EXCHANGE

    @property
    def repeatable(self) -> bool:
        """Whether the configuration alone is enough to request new tokens at any time."""
        return self in (GrantType.CLIENT_CREDENTIALS, GrantType.JWT_BEARER, GrantType.ID_JAG)


class DpopUse(StrEnum):
    """Whether tokens are bound to a key of the proxy (RFC 9449); the values of the configuration key ``dpop``."""

    OFF = "off"
    AUTO = "auto"
    """If both the resource and the authorization server want it."""
    REQUIRED = "required"


class RegistrationKind(StrEnum):
    """Where a client identity comes from."""

    CONFIGURED = "configured"
    METADATA_DOCUMENT = "metadata_document"
    DYNAMIC = "dynamic"
    OAUTH_CLIENT = "oauth_client"
    """An ``OAuthClient``, which the API made."""


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
    secret_expires_at: float | None = None
    created_at: float = 0.0
    account: str = DEFAULT_ACCOUNT
    """The name of the account of that server (``Account.name``)."""
    oauth_client: str | None = None
    """The id of the ``OAuthClient`` that it stands for, whose present secret each request reads; None if for none."""

    def __post_init__(self) -> None:
        secret_values.remember(self.client_secret)


class OAuthClientStatus(StrEnum):
    """Whether a client may be used."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    """For refreshes, but for no new authorization."""
    REVOKED = "revoked"
    """Not any more, and never again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuthClient:
    """A client that was registered by hand at a provider, and given to the API."""

    id: str
    customer_id: str
    project_id: str = DEFAULT_PROJECT
    provider: str
    """Unique in its project, among those that are not deleted."""
    provider_name: str
    client_id: str
    client_secret: str | None = field(default=None, repr=False)
    authorization_url: str
    token_url: str
    scopes: tuple[str, ...] = ()
    redirect_uris: tuple[str, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    """``issuer``, ``discovery_url`` and ``token_auth_method`` are used; others are only kept."""
    server_ids: tuple[str, ...] = ()
    """The servers that it is for. Empty: those of the project whose token endpoint is ``token_url``."""
    status: OAuthClientStatus = OAuthClientStatus.ACTIVE
    version: int = 1
    """Incremented by each change."""
    created_at: float = 0.0
    updated_at: float = 0.0
    deleted_at: float | None = None

    def __post_init__(self) -> None:
        secret_values.remember(self.client_secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """A validated token response (RFC 6749 §5.1)."""

    access_token: str = field(repr=False)
    token_type: str = "Bearer"
    """``Bearer``, or ``DPoP`` for a token that needs a proof with each request."""
    refresh_token: str | None = field(default=None, repr=False)
    obtained_at: float
    expires_at: float | None = None
    """None if the server did not say: then only a 401 shows that the token has expired."""
    refresh_expires_at: float | None = None
    """When the refresh token lapses if it is not used; None if the server did not say."""
    scopes: tuple[str, ...] = ()
    label: str = ""
    """Whose account it is, as far as the response says. Not stored: a grant keeps the label that it was made with."""

    def __post_init__(self) -> None:
        secret_values.remember(self.access_token, self.refresh_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """The endpoints of an authorization server that are needed after discovery."""

    authorization: str = ""
    token: str
    revocation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantKey:
    """What a grant is for. ``resource`` is empty if the resource parameter is omitted.

    ``upstream`` is the origin that the tokens may be sent to, ``path`` the path of the server's URL there; None in
    grants from before this was stored. A new authorization for another origin or path replaces the old grant.
    """

    account: Account
    resource: str
    issuer: str
    upstream: str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewalHealth:
    """How the renewal of a grant goes, as all processes on a store see it. Times are Unix seconds."""

    refused_at: float | None = None
    """When a renewal was refused while the access token worked; None if none was."""
    failing_since: float | None = None
    """Since when renewals have failed for reasons that may pass; None if the last one did not."""
    failure: str = ""
    """Why the last renewal was refused or failed; empty if it was not. No secret is in it."""
    next_try_at: float | None = None
    """When the next renewal may be tried; None if nothing holds it back."""
    rejected_since: float | None = None
    """Since when the answer has been an error that only a person can mend; None if it was another one."""


HEALTHY = RenewalHealth()
"""That of a grant whose last renewal has worked, or which has not been renewed yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The tokens for one key, with everything needed to renew them."""

    id: int = 0
    """0 until stored."""
    key: GrantKey
    grant_type: GrantType
    registration: Registration
    endpoints: Endpoints
    tokens: TokenSet
    scopes: tuple[str, ...]
    """The scopes requested; ``tokens.scopes`` are those granted."""
    granted_at: float
    dpop_key: str | None = field(default=None, repr=False)
    """The private key that the tokens are bound to, as ``oauth.dpop.Key.text``; the same for the life of the grant."""
    version: int = 1
    """The fencing version: incremented by each renewal."""
    refresh_begun_at: float | None = None
    """Set while a refresh is in progress. If it is set at start-up, the proxy crashed during a refresh."""
    refresh_owner: str = ""
    ended_at: float | None = None
    ended_reason: str = ""
    label: str = ""
    """Whose account it is, in words for its owner, as far as the authorization server said so."""
    health: RenewalHealth = HEALTHY


class FlowStatus(StrEnum):
    """The state of an authorization."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


HEADLESS_ATTEMPT = "headless"
"""The ``Attempt.browser_hash`` of an attempt that no browser made: it is no hash, so no cookie matches it."""


class FlowMode(StrEnum):
    """How the user comes to the authorization server, and the code back."""

    BROWSER = "browser"
    HEADLESS = "headless"
    """A program shows the authorization server's address, and brings the code by the API."""
    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAuthorization:
    """What the user needs to authorize on another device, and the code to poll with (RFC 8628 §3.2)."""

    device_code: str = field(repr=False)
    user_code: str = field(repr=False)
    verification_uri: str
    verification_uri_complete: str = field(default="", repr=False)
    """Empty if the server sent none."""
    interval: float = 5.0
    """Seconds between polls."""

    def __post_init__(self) -> None:
        secret_values.remember(self.device_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """An authorization that waits for a user. ``id`` is the unguessable part of the link."""

    id: str
    key: GrantKey
    registration: Registration
    endpoints: Endpoints
    scopes: tuple[str, ...]
    redirect_uri: str
    iss_supported: bool
    """The server sends ``iss`` in every authorization response (RFC 9207 §3)."""
    extra_params: tuple[tuple[str, str], ...] = ()
    created_at: float
    expires_at: float
    status: FlowStatus = FlowStatus.PENDING
    reason: str = ""
    """Why the flow failed, as text for the user."""
    device: DeviceAuthorization | None = None
    """Set if the user authorizes on another device; then there is no redirect."""
    dpop_key: str | None = field(default=None, repr=False)
    """The private key that the tokens will be bound to, generated before the user is asked."""
    mode: FlowMode = FlowMode.BROWSER
    return_origin: str | None = None
    """The origin of the page that opened the link in a popup, which is told how it ended."""

    @property
    def ends_elsewhere(self) -> bool:
        """Whether the code goes to a redirect URI that is not the proxy's, and only a program can bring it."""
        return self.redirect_uri != self.registration.redirect_uri


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeServer:
    """A server that was made at run time, by the API or by its URL alone."""

    id: str
    name: str
    project_id: str = DEFAULT_PROJECT
    origin: Literal["api", "adhoc"] = "api"
    owner: str = ""
    """The id of the principal that an ad-hoc server belongs to."""
    url: str
    document: Mapping[str, object] = field(default_factory=dict, repr=False)
    """Its other settings, with the keys of the configuration file."""
    created_at: float = 0.0
    updated_at: float = 0.0
    connected_at: float | None = None
    """When it was first seen to be connected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A browser that has opened the link of a flow: the authorization response is checked against it.

    ``state_hash`` and ``browser_hash`` are the SHA-256 (hex) of the state and of the cookie that binds the
    browser; the values themselves are never stored. HEADLESS_ATTEMPT stands for no browser.
    """

    flow_id: str
    state_hash: str
    browser_hash: str
    code_verifier: str = field(repr=False)
    created_at: float
    expires_at: float

    def __post_init__(self) -> None:
        secret_values.remember(self.code_verifier)


class Tool(NamedTuple):
    """A tool that an MCP server offers, for people to see that the server can be used."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What a server answered to ``initialize``, ``server/discover`` and the lists, for one account.

    All are results as the server wrote them (JSON objects), which may say anything: they are shown to no one but the
    account's own clients.
    """

    initialize: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """The results of ``initialize``, by the revision that was asked for; empty if the server has no sessions."""
    discover: Mapping[str, Any] | None = field(default=None, repr=False)
    """The result of ``server/discover`` (MCP 2026-07-28); None if the server does not know it."""
    lists: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict, repr=False)
    """By member name: ``tools``, ``prompts``, ``resources``, ``resourceTemplates``; absent if not listed."""
    fetched_at: float = 0.0
    """When the server was asked, in Unix seconds; 0 if it has not answered everything."""


class DPoPSigner(Protocol):
    """Sign the proof that each request with a DPoP-bound token needs (RFC 9449 §4)."""

    def prove(self, method: bytes, target: bytes) -> bytes:
        """Return the proof for one request to the token's server. It can be used only once."""

    def update_nonce(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember the nonce for the next proof, if a response brought one (RFC 9449 §8.2)."""


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A token as the data plane sees it: a complete Authorization header, and its generation."""

    header: bytes = field(repr=False)
    generation: int
    """Increases with every new token of the same account."""
    signer: DPoPSigner | None = field(default=None, repr=False)
    """None for a bearer token."""
