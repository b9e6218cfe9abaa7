"""Read the ``servers`` section."""

import re
from collections.abc import Collection

from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.oauth import read_oauth
from mcp_auth_proxy.config.reader import Context, Section
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.net import urls

RESERVED = frozenset({"mcp", "connect", "oauth", "static", "api", "healthz", "readyz", "metrics"})
"""First path segments that the proxy uses itself."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


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
    section.close()
    if url is None:
        return None
    return ServerSettings(name=name, url=url, allow_http=allow_http, upstream_timeout=timeout, oauth=oauth)


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
