"""Reads the ``servers`` section."""

import re
from collections.abc import Mapping

from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.reader import NOT_YET, Context, Section
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.models import ClientAuth, GrantType

RESERVED = frozenset({"mcp", "connect", "oauth", "static", "api", "healthz", "readyz", "metrics"})
"""First path segments that are the proxy's own."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_GRANTS: Mapping[str, GrantType | None] = {
    "authorization_code": GrantType.AUTHORIZATION_CODE,
    "client_credentials": GrantType.CLIENT_CREDENTIALS,
    "device_code": None,
    "jwt_bearer": None,
    "id_jag": None,
    "token_exchange": None,
}
_CLIENT_AUTHS: Mapping[str, ClientAuth | None] = {
    **{str(method): method for method in ClientAuth},
    "private_key_jwt": None,
}
_DPOP: Mapping[str, bool] = {"off": False, "auto": True, "required": True}
_OWN_PARAMS = frozenset(
    {
        *("response_type", "response_mode", "client_id", "client_secret", "client_assertion", "client_assertion_type"),
        *("redirect_uri", "state", "scope", "resource", "request", "request_uri", "grant_type", "code"),
        *("code_verifier", "code_challenge", "code_challenge_method", "dpop_jkt"),
    }
)
_HINTS = {"scope": "use scopes", "resource": "use the key resource", "client_id": "use the key client_id"}


def read_servers(section: Section, upstream_timeout: float) -> dict[str, ServerSettings]:
    """The servers by name, in file order; those with faults may be left out."""
    servers: dict[str, ServerSettings] = {}
    for name, value in section.entries():
        if _NAME.fullmatch(name) is None:
            section.fault(name, "a server name is 1 to 63 of a-z, 0-9 and -, and does not begin with -")
        elif name in RESERVED:
            section.fault(name, f"this name is the proxy's own path /{name}: choose another")
        server = _read_server(Section(value, section.inner(name), section.context), name, upstream_timeout)
        if server is not None:
            servers[name] = server
    return servers


def server_url(text: str, *, allow_http: bool) -> str:
    """The URL of an MCP server, as written. ValueError says which rule it breaks."""
    parts = values.url(text)
    if parts.scheme == "http" and not allow_http and not values.is_loopback(parts.hostname or ""):
        raise ValueError(
            "http:// would send tokens unencrypted to another machine: use https://, "
            "or set allow_http: true on this server in the configuration where the network is trusted"
        )
    return text


def _read_server(section: Section, name: str, upstream_timeout: float) -> ServerSettings | None:
    allow_http = section.boolean("allow_http", default=False)
    url = section.parsed("url", lambda text: server_url(text, allow_http=allow_http), None)
    if not section.has("url"):
        section.fault("url", "is needed: the address of the MCP server")
    timeout = section.parsed("upstream_timeout", values.positive_duration, upstream_timeout)
    inner = section.section("oauth")
    oauth = _read_oauth(inner) if section.has("oauth") else OAuthSettings()
    section.close()
    if url is None:
        return None
    return ServerSettings(name=name, url=url, allow_http=allow_http, upstream_timeout=timeout, oauth=oauth)


def _read_oauth(section: Section) -> OAuthSettings:
    grant = section.choice("grant", _GRANTS, GrantType.AUTHORIZATION_CODE)
    if grant is None:
        section.fault("grant", f"{section.text('grant')} {NOT_YET}: use authorization_code or client_credentials")
    client_auth = section.choice("client_auth", _CLIENT_AUTHS, None)
    if client_auth is None and section.text("client_auth") == "private_key_jwt":
        section.fault("client_auth", f"private_key_jwt {NOT_YET}: use client_secret_basic or client_secret_post")
    if section.choice("dpop", _DPOP, False):
        section.fault("dpop", f"{section.text('dpop')} {NOT_YET}: leave it off")
    section.unsupported("private_key", "signing_alg", "assertion", "idp")
    _check_client(section, grant, client_auth)
    settings = OAuthSettings(
        grant=grant or GrantType.AUTHORIZATION_CODE,
        client_id=section.text("client_id"),
        client_secret=section.parsed("client_secret", section.context.secret, None),
        client_auth=client_auth,
        scopes=_read_scopes(section),
        issuer=section.parsed("issuer", values.issuer, None),
        resource=section.parsed("resource", values.resource, "auto"),
        authorization_params=_read_params(section.section("authorization_params")),
        metadata=_read_metadata(section, grant),
        client_metadata_url=section.parsed("client_metadata_url", values.client_metadata_url, None),
        allow_missing_pkce=section.boolean("allow_missing_pkce", default=False),
    )
    section.close()
    return settings


def _check_client(section: Section, grant: GrantType | None, client_auth: ClientAuth | None) -> None:
    has_id, has_secret = section.has("client_id"), section.has("client_secret")
    if has_secret and not has_id:
        section.fault("client_secret", "needs a client_id beside it")
    if grant is GrantType.CLIENT_CREDENTIALS:
        if not has_id:
            section.fault("client_id", "is needed with grant client_credentials")
        if not has_secret and client_auth is not ClientAuth.NONE and not section.has("private_key"):
            section.fault("client_secret", "is needed with grant client_credentials (or client_auth: none)")
    elif has_id and not has_secret and client_auth in (ClientAuth.BASIC, ClientAuth.POST):
        section.fault("client_auth", f"{client_auth} needs a client_secret")


def _read_scopes(section: Section) -> tuple[str, ...] | None:
    scopes = section.each("scopes", values.scope)
    return None if scopes is None else tuple(dict.fromkeys(scopes))


def _read_params(section: Section) -> dict[str, str]:
    params: dict[str, str] = {}
    for name, value in section.entries():
        if name in _OWN_PARAMS:
            hint = f": {_HINTS[name]}" if name in _HINTS else ""
            section.fault(name, f"is a parameter that the proxy sets itself{hint}")
        elif not isinstance(value, str):
            section.fault(name, "must be text")
        else:
            params[name] = value
    return params


def _read_metadata(section: Section, grant: GrantType | None) -> dict[str, object] | None:
    inner = section.section("metadata")
    if not section.has("metadata"):
        return None
    metadata = {name: _metadata_value(inner, name, value) for name, value in inner.entries()}
    needed = ["token_endpoint"]
    if grant is GrantType.AUTHORIZATION_CODE:
        needed.append("authorization_endpoint")
    for name in needed:
        if not inner.has(name):
            inner.fault(name, "is needed in static metadata")
    return metadata


def _metadata_value(section: Section, name: str, value: object) -> object:
    """A value of RFC 8414 §2 by what its name promises: a URL, a list or flag (``…_supported``), or anything."""
    if name == "issuer":
        return section.parsed(name, values.issuer, "")
    if name.endswith(("_endpoint", "_uri")):
        return section.parsed(name, values.endpoint, "")
    flag = {"true": True, "false": False}.get(value) if isinstance(value, str) else None
    if flag is not None:
        return flag
    if name.endswith("_supported"):
        return list(section.each(name, str) or ())
    return value


def single_name(url: str) -> str:
    """A server name made from the host of a URL: ``https://mcp.linear.app/mcp`` gives ``linear``."""
    host = (values.url(url).hostname or "").rstrip(".")
    labels = host.split(".")
    numeric = ":" in host or all(label.isdigit() for label in labels)
    while len(labels) > 1 and labels[0] in ("mcp", "www", "api"):
        labels = labels[1:]
    name = re.sub(r"[^a-z0-9-]", "-", labels[0]).strip("-")[:63].strip("-")
    if numeric or values.is_loopback(host) or not name or name in RESERVED:
        return "server"
    return name


def read_single(url: str, context: Context) -> dict[str, ServerSettings]:
    """The one server of ``serve URL``; its faults go to the context."""
    section = Section({"URL": url}, "", context)
    checked = section.parsed("URL", lambda text: server_url(text, allow_http=False), None)
    if checked is None:
        return {}
    name = single_name(checked)
    return {name: ServerSettings(name=name, url=checked)}
