"""Read the ``servers`` section."""

import re
from collections.abc import Collection, Mapping

from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.oauth import read_authorization_params, read_oauth, read_scopes
from mcp_auth_proxy.config.reader import Context, Section
from mcp_auth_proxy.config.settings import (
    AccountSettings,
    GrantOwner,
    InboundMode,
    OAuthSettings,
    ServerSettings,
)
from mcp_auth_proxy.errors import ConfigError
from mcp_auth_proxy.models import GrantType, Role
from mcp_auth_proxy.net import urls

RESERVED = frozenset({"mcp", "connect", "oauth", "sign-in", "static", "api", "healthz", "readyz", "metrics"})
"""First path segments that the proxy uses itself."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_ROLES = frozenset(f"role:{role}" for role in Role)
_OWNERS: Mapping[str, GrantOwner] = {"caller": "caller", "shared": "shared"}
# What the configuration alone is enough for belongs to nobody in particular.
_SHARED_BY_DEFAULT = frozenset({GrantType.CLIENT_CREDENTIALS, GrantType.JWT_BEARER, GrantType.ID_JAG})


def read_servers(
    section: Section, upstream_timeout: float, *, secrets_of: Collection[str] | None = None
) -> dict[str, ServerSettings]:
    """Return the servers by name, in file order. Servers with errors may be left out.

    ``secrets_of``: the servers whose secrets are needed, None for all.
    """
    servers: dict[str, ServerSettings] = {}
    for name, value in section.entries():
        if _NAME.fullmatch(name) is None:
            section.error(name, "a server name is 1 to 63 of a-z, 0-9 and -, and does not start with -")
        elif name in RESERVED:
            section.error(name, f"this name is reserved for the proxy's own path /{name}: choose another")
        needed = secrets_of is None or name in secrets_of
        context = section.context if needed else section.context.without_secrets()
        server = _read_server(Section(value, section.inner(name), context), name, upstream_timeout)
        if server is not None:
            servers[name] = server
    return servers


def server_url(text: str, *, allow_http: bool) -> str:
    """Return the URL of an MCP server as written. Raises ValueError with the rule that it breaks."""
    try:
        origin = values.url(text).origin
    except ValueError as error:
        raise ValueError(f"{error}{_missing_scheme(text)}") from None
    if origin.scheme == "http" and not allow_http and not urls.is_loopback(origin.host):
        raise ValueError(
            "http:// would send tokens unencrypted to another machine: use https://, "
            "or set allow_http: true on this server in the configuration if you trust the network"
        )
    return text


def _missing_scheme(text: str) -> str:
    """Return what to add to an error if a URL only lacks its beginning; the text of the URL may be secret."""
    if "://" in text:
        return ""
    try:
        values.url(f"https://{text}")
    except ValueError:
        return ""
    return "; is https:// missing at its beginning?"


def _read_server(section: Section, name: str, upstream_timeout: float) -> ServerSettings | None:
    allow_http = section.boolean("allow_http", default=False)
    # Whether http is allowed is not known if that key has an error.
    http = allow_http or section.is_faulty("allow_http")
    url = section.parsed("url", lambda text: server_url(text, allow_http=http), None)
    if not section.has("url"):
        section.error("url", "is needed: the address of the MCP server")
    timeout = section.parsed("upstream_timeout", values.positive_duration, upstream_timeout)
    inner = section.section("oauth")
    oauth = (
        read_oauth(inner, http_server=(url or "") if allow_http else "") if section.has("oauth") else OAuthSettings()
    )
    default = ServerSettings(name=name, url="")
    owner = section.choice("grant_owner", _OWNERS, "shared" if oauth.grant in _SHARED_BY_DEFAULT else "caller")
    if oauth.grant is GrantType.TOKEN_EXCHANGE and owner == "shared":
        section.error("grant_owner", "shared: with grant token_exchange, each token is on behalf of one caller")
    project = section.parsed("project", _project, default.project)
    allow = section.each("allow", _pattern)
    accounts = _read_accounts(section.section("accounts"))
    section.close()
    if url is None:
        return None
    return ServerSettings(
        name=name,
        url=url,
        allow_http=allow_http,
        upstream_timeout=timeout,
        oauth=oauth,
        project=project,
        grant_owner=owner,
        allow=default.allow if allow is None else allow,
        accounts=accounts,
    )


def token_exchange_errors(servers: Mapping[str, ServerSettings], modes: Collection[InboundMode]) -> list[ConfigError]:
    """Return what keeps servers from exchanging the JWTs of their callers: without mode ``jwt`` there are none."""
    return [
        ConfigError(server.key("oauth.grant"), "token_exchange needs jwt in inbound.mode: it exchanges callers' JWTs")
        for server in servers.values()
        if server.oauth.grant is GrantType.TOKEN_EXCHANGE and "jwt" not in modes
    ]


def _project(text: str) -> str:
    if _NAME.fullmatch(text) is None:
        raise ValueError("a project is 1 to 63 of a-z, 0-9 and -, and does not start with -")
    return text


def _pattern(text: str) -> str:
    if text.startswith("role:") and text not in _ROLES:
        raise ValueError(f"must be a pattern of names, or one of {', '.join(sorted(_ROLES))}")
    return text


def _read_accounts(section: Section) -> dict[str, AccountSettings]:
    accounts: dict[str, AccountSettings] = {}
    for name, value in section.entries():
        if _ACCOUNT.fullmatch(name) is None:
            section.error(name, "an account name is 1 to 32 of a-z, 0-9 and -, and does not start with -")
        inner = Section(value, section.inner(name), section.context)
        accounts[name] = AccountSettings(
            login_hint=inner.text("login_hint"),
            authorization_params=read_authorization_params(inner),
            scopes=read_scopes(inner),
        )
        inner.close()
    return accounts


def single_name(url: str) -> str:
    """Return a server name made from the host of a URL: ``linear`` for ``https://mcp.linear.app/mcp``."""
    host = values.url(url).origin.host.rstrip(".")
    labels = host.split(".")
    numeric = ":" in host or all(label.isdigit() for label in labels)
    while len(labels) > 1 and labels[0] in ("mcp", "www", "api"):
        labels = labels[1:]
    name = re.sub(r"[^a-z0-9-]", "-", labels[0]).strip("-")[:63].strip("-")
    if numeric or urls.is_loopback(host) or not name or name in RESERVED:
        return "server"
    return name


def read_single(url: str, context: Context) -> dict[str, ServerSettings]:
    """Return the one server of ``serve URL``; errors go to the context."""
    section = Section({"URL": url}, "", context)
    checked = section.parsed("URL", lambda text: server_url(text, allow_http=False), None)
    if checked is None:
        return {}
    name = single_name(checked)
    return {name: ServerSettings(name=name, url=checked, from_url=True)}
