"""The settings: frozen sections, each passed whole to the floor that needs it. Durations are in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.models import ClientAuth, DpopUse, GrantType


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret value that shows itself in no repr, str or log."""

    value: str = field(repr=False)

    def __str__(self) -> str:
        return "****"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. An IPv6 host is written without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySource:
    """Where a store key comes from: ``env`` and a name, or ``file`` and an absolute path."""

    kind: Literal["env", "file"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    path: Path
    """The SQLite file, absolute."""
    keys: tuple[KeySource, ...]
    """The first seals, all open. Never empty: the default is a key file beside the store."""
    default_key: bool = False
    """True where ``keys`` is that default: only then may a missing key file be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationSettings:
    wait: float = 45.0
    open_browser: Literal["auto", "always", "never"] = "auto"
    cold_start: bool = True
    allow_private: tuple[str, ...] = ()
    """Host names, addresses or networks (CIDR)."""


Credential = Path | Secret
"""A credential that others renew: an absolute path is read again at each use, a secret stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdpSettings:
    """The identity provider of enterprise-managed authorization, and who the user is there."""

    issuer: str | None = None
    token_endpoint: str | None = None
    """None: as the metadata of ``issuer`` says."""
    client_id: str
    client_secret: Secret | None = None
    client_auth: ClientAuth | None = None
    id_token: Credential | None = None
    refresh_token: Credential | None = None
    """Either this or ``id_token``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OAuthSettings:
    grant: GrantType = GrantType.AUTHORIZATION_CODE
    client_id: str | None = None
    client_secret: Secret | None = None
    client_auth: ClientAuth | None = None
    """None: chosen from what the authorization server supports."""
    private_key: SigningKey | None = None
    client_assertion_audience: Literal["issuer", "endpoint"] = "issuer"
    assertion: Credential | None = None
    """The workload's own token, with grant jwt_bearer."""
    idp: IdpSettings | None = None
    scopes: tuple[str, ...] | None = None
    issuer: str | None = None
    resource: str = "auto"
    """``auto``, ``omit`` or an exact URI."""
    authorization_params: Mapping[str, str] = field(default_factory=dict)
    token_params: Mapping[str, str] = field(default_factory=dict)
    """Added to every request to the token endpoint."""
    metadata: Mapping[str, object] | None = None
    client_metadata_url: str | None = None
    dpop: DpopUse = DpopUse.OFF
    allow_missing_pkce: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    name: str
    url: str
    allow_http: bool = False
    upstream_timeout: float = 300.0
    """Seconds until the response head must have come."""
    oauth: OAuthSettings = field(default_factory=OAuthSettings)

    def key(self, path: str) -> str:
        """Return the full path of a key of this server, for messages: ``servers.NAME.oauth.resource``."""
        return f"servers.{self.name}.{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    body: int = 16 * 1024 * 1024
    """Bytes of request body that are accepted."""
    upstream_connections: int = 10_000
    """Connections at a time to one upstream origin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundSettings:
    allowed_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboundSettings:
    ca_bundle: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    listen: Address
    public_url: str | None
    """Without a trailing slash. None: the address that is listened on."""
    store: StoreSettings
    authorization: AuthorizationSettings = AuthorizationSettings()
    limits: LimitSettings = LimitSettings()
    inbound: InboundSettings = InboundSettings()
    outbound: OutboundSettings = OutboundSettings()
    servers: Mapping[str, ServerSettings]
    source: Path | None = None
    """The file that was read, for messages."""
