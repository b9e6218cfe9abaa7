"""Map a raw request path to a server and its upstream: one dictionary look-up, however many servers there are."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcp_auth_proxy.config.servers import RESERVED
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.urls import Origin
from mcp_auth_proxy.observability.metrics import ServerMetrics

_RESERVED = frozenset(name.encode() for name in RESERVED)


@dataclass(frozen=True, slots=True)
class Route:
    """A server: where its requests go, and whose grant they use. Nothing here is taken from a request."""

    server: ServerSettings
    origin: Origin
    target: bytes
    host: bytes
    account: Account
    metrics: ServerMetrics


def build(servers: Mapping[str, ServerSettings]) -> dict[bytes, Route]:
    """Return the routes by raw path: ``/{server}/mcp``, and ``/mcp`` too if there is just one server."""
    routes = {f"/{name}/mcp".encode(): route_to(server) for name, server in servers.items()}
    if len(routes) == 1:
        routes[b"/mcp"] = next(iter(routes.values()))
    return routes


def route_to(server: ServerSettings) -> Route:
    """Return the route to one server."""
    url = urls.parse(server.url)
    return Route(
        server,
        url.origin,
        url.target,
        url.origin.authority.encode("ascii"),
        Account(LOCAL, server.name),
        ServerMetrics(server.name),
    )


def is_endpoint(path: bytes) -> bool:
    """Return whether a path has the form of an MCP endpoint, of a server that may not exist."""
    if path == b"/mcp":
        return True
    name, _, rest = path[1:].partition(b"/")
    return rest == b"mcp" and name not in _RESERVED


def is_own(path: bytes) -> bool:
    """Return whether a path begins with a segment that is reserved for pages and the like, as ``/mcp`` is not."""
    name = path[1:].partition(b"/")[0]
    return name in _RESERVED and name != b"mcp"


def is_canonical_path(path: bytes) -> bool:
    """Return whether a raw path has no dot segments, empty segments or encoded separators (RFC 3986 §6.2)."""
    if b"//" in path or b"\\" in path:
        return False
    if b"%" in path:
        lowered = path.lower()
        if b"%2f" in lowered or b"%2e" in lowered or b"%5c" in lowered or b"%00" in lowered:
            return False
    return b"/./" not in path and b"/../" not in path and not path.endswith((b"/.", b"/.."))
