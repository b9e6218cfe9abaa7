"""The settings: frozen sections, each passed as a whole to the layer that needs it. Durations are in seconds."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.errors import without_query_values
from mcp_auth_proxy.models import ClientAuth, DpopUse, GrantType
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
    """The source of a store key: ``env`` and a variable name, or ``file`` and an absolute path."""

    kind: Literal["env", "file"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    path: Path
    """The SQLite file, absolute."""
    keys: tuple[KeySource, ...]
    """The first key encrypts, all of them decrypt. Never empty: the default is a key file next to the store."""
    default_key: bool = False
    """True if ``keys`` is that default: only then may a missing key file be created."""
    keys_named: bool = field(default=False, compare=False)
    """True if ``store.keys`` names them, even if it names the default: then the mode of a file is the user's choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationSettings:
    wait: float = 45.0
    open_browser: Literal["auto", "always", "never"] = "auto"
    cold_start: bool = True
    allow_private: tuple[str, ...] = ()
    """Host names, addresses or networks (CIDR)."""


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


def server_key(server: str, path: str) -> str:
    """Return the full configuration key of a path below a server, if only its name is known."""
    return f"servers.{server}.{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    name: str
    url: str
    allow_http: bool = False
    upstream_timeout: float = 300.0
    """Seconds within which the response head must arrive."""
    oauth: OAuthSettings = field(default_factory=OAuthSettings)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundSettings:
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
    outbound: OutboundSettings = OutboundSettings()
    servers: Mapping[str, ServerSettings]
    health_listen: Address | None = None
    """A second listener, with the health endpoints only. None: there is none."""
    health_quit: bool = False
    """Whether ``POST /quitquitquit`` on it ends the process."""
    source: Path | None = None
    """The file that the settings were read from, for messages."""
