"""The settings: frozen sections, each passed as a whole to the layer that needs it. Durations are in seconds."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.errors import without_query_values
from mcp_auth_proxy.models import (
    DEFAULT_ACCOUNT,
    DEFAULT_PROJECT,
    LOCAL,
    Account,
    ClientAuth,
    DpopUse,
    GrantType,
    Principal,
    shared_principal,
)
from mcp_auth_proxy.net.peers import IPNetwork


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret that never appears in ``repr``, ``str`` or logs."""

    value: str = field(repr=False)

    def __post_init__(self) -> None:
        secret_values.remember(self.value)

    def __str__(self) -> str:
        return "****"


@dataclass(frozen=True, slots=True)
class Address:
    """The address to listen on. An IPv6 host has no brackets here."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def reachable(listening: Address) -> Address:
    """Return the address to connect to from this machine: a wildcard address becomes loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening.host, listening.host)
    return Address(host, listening.port)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """The source of a store key.

    ``env`` and a variable name, ``file`` and an absolute path, ``exec`` and a command, ``keyring`` and SERVICE/NAME.
    """

    kind: Literal["env", "file", "exec", "keyring"]
    name: str
    written: str = field(default="", compare=False)
    """What the configuration says; empty for the default key."""

    def __str__(self) -> str:
        """Return the source for a message, of a command its program only: other words may be secret."""
        if self.kind == "exec":
            program, *rest = shlex.split(self.name)
            return f"exec:{program}{' …' if rest else ''}"
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresqlUrl:
    """A PostgreSQL database, as libpq names one. ``str`` and ``repr`` have neither user nor password."""

    text: str = field(repr=False)
    shown: str
    """``postgresql://HOST/DATABASE``, as the user wrote these."""
    identity: str = field(repr=False, compare=False)
    """What says which database it is, without secrets."""

    def __str__(self) -> str:
        return self.shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSettings:
    """Exports that ``serve`` takes into the store, each once."""

    files: tuple[Path, ...] = ()
    """Absolute."""
    passphrase: Secret | None = None
    """None if there are no files, or if secrets are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    path: Path
    """The SQLite file, absolute. For PostgreSQL, a name in this user's run folder that stands for the database: there
    is no such file, but local processes find each other by files beside it."""
    postgresql: PostgresqlUrl | None = None
    """None: the store is the SQLite file."""
    keys: tuple[KeySource, ...]
    """The first key encrypts, all of them decrypt. Never empty: the default is a key file next to the store."""
    default_key: bool = False
    """True if ``keys`` is that default: only then may a missing key file be created."""
    keys_named: bool = field(default=False, compare=False)
    """True if ``store.keys`` names them, even if it names the default: then the mode of a file is the user's choice."""
    imports: ImportSettings = field(default_factory=ImportSettings, compare=False)

    @property
    def shown(self) -> str:
        """What users read of where the store is: the path of the file, or a URL without user and password."""
        return str(self.postgresql or self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationSettings:
    wait: float = 45.0
    open_browser: Literal["auto", "always", "never"] = "auto"
    cold_start: bool = True
    allow_private: tuple[str, ...] = ()
    """Host names, addresses or networks (CIDR)."""
    keep_alive: float = 7 * 86_400.0
    """Seconds after which a grant that is not used is refreshed all the same; 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSettings:
    """Where events of grants are posted, signed with a secret."""

    url: str
    secret: Secret | None
    """None only if secrets were not needed when the settings were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSettings:
    webhook: WebhookSettings | None = None


Credential = Path | Secret
"""A credential that something else renews: a path (absolute) is read again at each use, a secret is fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdpSettings:
    """The identity provider of enterprise-managed authorization, and how it knows the user."""

    issuer: str | None = None
    token_endpoint: str | None = None
    """None: taken from the metadata of ``issuer``."""
    client_id: str
    client_secret: Secret | None = None
    client_auth: ClientAuth | None = None
    id_token: Credential | None = None
    refresh_token: Credential | None = None
    """Either this or ``id_token`` is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuthSettings:
    grant: GrantType = GrantType.AUTHORIZATION_CODE
    client_id: str | None = None
    client_secret: Secret | None = None
    client_auth: ClientAuth | None = None
    """None: chosen from the methods that the authorization server supports."""
    private_key: SigningKey | None = None
    client_assertion_audience: Literal["issuer", "endpoint"] = "issuer"
    assertion: Credential | None = None
    """The workload's own token, for grant jwt_bearer."""
    idp: IdpSettings | None = None
    scopes: tuple[str, ...] | None = None
    issuer: str | None = None
    resource: str = "auto"
    """``auto``, ``omit`` or an exact URI."""
    authorization_params: Mapping[str, str] = field(default_factory=dict)
    token_params: Mapping[str, str] = field(default_factory=dict)
    """Parameters added to every token request."""
    metadata: Mapping[str, object] | None = None
    client_metadata_url: str | None = None
    dpop: DpopUse = DpopUse.OFF
    allow_missing_pkce: bool = False

    @property
    def pinned(self) -> bool:
        """Whether the configuration names the authorization server, and not the MCP server."""
        return self.issuer is not None or self.metadata is not None


GrantOwner = Literal["caller", "shared"]
"""Whose a grant is: that of the principal who calls, or that of the server's project."""


def server_key(server: str, path: str) -> str:
    """Return the full configuration key of a path below a server, if only its name is known."""
    return f"servers.{server}.{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountSettings:
    """What is preset for one account of a server."""

    login_hint: str | None = None
    authorization_params: Mapping[str, str] = field(default_factory=dict)
    scopes: tuple[str, ...] | None = None
    """None: those of the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    name: str
    url: str
    allow_http: bool = False
    upstream_timeout: float = 300.0
    """Seconds within which the response head must arrive."""
    oauth: OAuthSettings = field(default_factory=OAuthSettings)
    project: str = DEFAULT_PROJECT
    grant_owner: GrantOwner = "caller"
    allow: tuple[str, ...] = ("*",)
    """Patterns of principal names (fnmatch), or ``role:admin``. For anyone else the server does not exist."""
    accounts: Mapping[str, AccountSettings] = field(default_factory=dict)
    """Presets, by the name of the account."""
    id: str = ""
    """The id of a server that the API made; a server of the file has its name for an id (``server_id``)."""
    origin: Literal["config", "api", "adhoc"] = "config"
    owner: str = ""
    """The principal that an ad-hoc server belongs to."""
    version: float = 0.0
    """When a server that was made at run time was changed last."""
    allow_private: tuple[str, ...] | None = None
    """The private hosts and networks that the URL of a server made at run time may lead to. None: it is configured,
    and may lead anywhere."""

    @property
    def server_id(self) -> str:
        """Return what the API calls this server."""
        return self.id or self.name

    def account(self, principal: Principal, name: str = DEFAULT_ACCOUNT) -> Account:
        """Return the account whose grant a principal uses here.

        If callers are not identified, all grants are those of ``local``.
        """
        shared = self.grant_owner == "shared" and principal.id != LOCAL
        return Account(shared_principal(self.project) if shared else principal.id, self.name, name)

    def admits(self, principal: Principal) -> bool:
        """Return whether a principal may use this server; for anyone else it does not exist."""
        if principal.id == LOCAL:
            return True
        if self.project != principal.project_id or (self.origin == "adhoc" and self.owner != principal.id):
            return False
        return any(
            principal.role == pattern.removeprefix("role:")
            if pattern.startswith("role:")
            else fnmatchcase(principal.name, pattern)
            for pattern in self.allow
        )

    def scopes_of(self, account: Account) -> tuple[str, ...] | None:
        """Return the scopes that are configured for an account, None if there are none."""
        preset = self.accounts.get(account.name)
        return self.oauth.scopes if preset is None or preset.scopes is None else preset.scopes

    from_url: bool = False
    """Whether there is no configuration: the commands were given a URL."""

    @property
    def command_name(self) -> str:
        """What to write for this server after ``mcp-auth-proxy login``: its name, or its URL, quoted for a shell.

        Query values are masked.
        """
        return shlex.quote(without_query_values(self.url)) if self.from_url else self.name

    def key(self, path: str) -> str:
        """Return the full configuration key of a path below this server, for messages.

        ``key("oauth.resource")`` is ``servers.NAME.oauth.resource``.
        """
        return server_key(self.name, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    body: int = 16 * 1024 * 1024
    """Maximum size of a request body in bytes."""
    memory: int = 128 * 1024 * 1024
    """Maximum number of bytes that all requests together keep."""
    held: int = 1000
    """Maximum number of requests that wait for a user, or for the proxy's own requests."""
    upstream_connections: int = 10_000
    """Maximum number of connections to one upstream origin."""
    connections: int | None = None
    """Maximum number of connections of clients. None: as many as the process's limit on open files leaves."""
    connections_per_address: int | None = None
    """The same for one address. None: three quarters of ``connections``."""
    sse_ping: float = 15.0
    """Seconds of silence in an event stream after which its client is sent a comment; 0 for none."""
    refresh_rate: float = 10.0
    """Maximum number of refreshes that an authorization server is sent in a second, by all processes on one store."""


InboundMode = Literal["api_key", "jwt", "trusted_header"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtSettings:
    """One issuer of JWTs that callers present (RFC 7519)."""

    issuer: str
    """Empty for the Kubernetes preset until the token of the pod was read."""
    audience: str
    jwks: str = "auto"
    """The URL of the keys (RFC 7517), or ``auto``: taken from the issuer's metadata."""
    principal: str = "sub"
    """The claim that names the principal."""
    roles_claim: str | None = None
    roles_admin: tuple[str, ...] = ()
    """Values of that claim that make an admin."""
    scopes: tuple[str, ...] = ()
    """What clients request at this issuer, as the metadata of the MCP endpoints say."""
    kubernetes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedHeaderSettings:
    """The field in which a web server in front names the caller that it has identified."""

    name: str
    """In lower case, as the secret's field."""
    sources: tuple[IPNetwork, ...]
    secret: Secret | None = None
    secret_header: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignInSettings:
    """The identity provider that browsers sign in at (OpenID Connect)."""

    issuer: str
    client_id: str
    client_secret: Secret | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    """Who may do what with the API."""

    enabled: bool = True
    adhoc: Literal["off", "admin", "member"] = "admin"
    """Who may make servers by URL for themselves."""
    popup_origins: tuple[str, ...] = ()
    allow_private: tuple[str, ...] = ()
    """Host names, addresses or networks (CIDR) that servers made at run time may have."""
    customer_id: str = "default"
    token_file: Path | None = None
    """Where the key of ``local`` is kept. None: ``api-token`` beside the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundSettings:
    modes: tuple[InboundMode, ...] = ()
    """How callers are identified. Empty for mode ``none``: everybody is the principal ``local``."""
    provision: Literal["auto", "listed"] = "auto"
    jwt: tuple[JwtSettings, ...] = ()
    trusted_header: TrustedHeaderSettings | None = None
    sign_in: SignInSettings | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the MCP endpoints, as browsers write them (RFC 6454 §6.2)."""
    trusted_proxies: tuple[IPNetwork, ...] = ()
    """Web servers in front of the proxy: many clients share such an address."""
    allow_anonymous: bool = False
    """Callers are not identified, and may reach the proxy although it does not listen on loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundSettings:
    ca_bundle: Path | None = None
    trust_proxy: bool = False
    """Leave names that can't be looked up here to the forward proxy of the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    listen: Address
    public_url: str | None
    """Without a trailing slash. None: the listen address."""
    store: StoreSettings
    authorization: AuthorizationSettings = AuthorizationSettings()
    limits: LimitSettings = LimitSettings()
    inbound: InboundSettings = InboundSettings()
    admin: AdminSettings = AdminSettings()
    events: EventSettings = EventSettings()
    outbound: OutboundSettings = OutboundSettings()
    servers: Mapping[str, ServerSettings]
    health_listen: Address | None = None
    """A second listener, with the health endpoints only. None: there is none."""
    health_quit: bool = False
    """Whether ``POST /quitquitquit`` on it ends the process."""
    source: Path | None = None
    """The file that the settings were read from, for messages."""
