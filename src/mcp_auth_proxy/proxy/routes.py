"""Map a caller and a raw path to a server and an account there: two look-ups, however many there are."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from mcp_auth_proxy.config.servers import RESERVED
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, LOCAL, LOCAL_PRINCIPAL, Account, Principal, Role
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.net.urls import Origin
from mcp_auth_proxy.observability.metrics import ServerMetrics, server_label
from mcp_auth_proxy.proxy import cold_answers
from mcp_auth_proxy.proxy.headers import ONE_CALLER, FieldRules, canonical_name
from mcp_auth_proxy.proxy.session_ids import SessionIds

ROUTES_OF_A_CALLER = 256
"""Routes that are kept for one caller beside those that were built ahead; beyond it, all of its own are dropped."""

ROUTES_KEPT = 20_000
"""Routes that are kept for all callers; beyond it, those of the callers that came first are dropped."""

_RESERVED = frozenset(name.encode() for name in RESERVED)
_PATH = re.compile(rb"/([a-z0-9][a-z0-9-]{0,62})(?:(?:@|%40)([a-z0-9][a-z0-9-]{0,31}))?/mcp")

_ENCODED_LETTER = re.compile(rb"%(?:3[0-9]|[46][1-9a-fA-F]|[57][0-9aA])")


@dataclass(frozen=True, slots=True)
class Route:
    """One caller's way to a server: where its requests go, and whose grant they use.

    Of a request, only the path decides which route is taken.
    """

    server: ServerSettings
    origin: Origin
    target: bytes
    host: bytes
    account: Account
    metrics: ServerMetrics
    policy: AddressPolicy | None = None
    """Which addresses may be dialed, for servers that were made at run time. None: any."""
    principal: str = LOCAL
    """The id of the caller; that of ``account`` may be the project's."""
    rules: FieldRules = ONE_CALLER
    may_authorize: bool = True
    """Whether the caller gets links: those of a shared grant are for admins."""
    marker: bytes = b""
    """Bytes that are in every call of one of the proxy's own tools."""


@dataclass(slots=True)
class _Table:
    """The routes of one caller, by raw path."""

    principal: Principal
    routes: dict[bytes, Route]
    limit: int = ROUTES_OF_A_CALLER


class Routes:
    """The routes of all callers. Belongs to one event loop."""

    def __init__(
        self,
        servers: Mapping[str, ServerSettings],
        *,
        session_key: bytes = b"",
        credential_fields: Collection[bytes] = (),
    ) -> None:
        """``servers`` may change at any time; call ``rebuild`` afterwards.

        ``session_key`` signs session ids; empty if callers are not identified. ``credential_fields`` are not forwarded.
        """
        self._servers = servers
        self._session_key = session_key
        self._credentials = frozenset(map(canonical_name, credential_fields))
        self.rebuild()

    def rebuild(self) -> None:
        """Read the servers again."""
        self._to_servers: dict[str, Route] = {}
        self._tables: dict[str, _Table] = {}
        self._kept = 0
        self._single = single_server(self._servers)
        self.local = {} if self._session_key else build(self._servers)
        """The routes of everybody, if callers are not identified."""
        if not self._session_key:
            self._tables[LOCAL] = _Table(LOCAL_PRINCIPAL, self.local, len(self.local) + ROUTES_OF_A_CALLER)

    def get(self, principal: Principal, path: bytes) -> Route | None:
        """Return a route that was found before; None if it has to be looked for with ``find``, or if there is none."""
        table = self._tables.get(principal.id)
        if table is None:
            return None
        if table.principal is not principal:
            if table.principal != principal:
                return None
            # To compare them costs a microsecond, and the next request mostly brings the same object.
            table.principal = principal
        return table.routes.get(path)

    def find(self, principal: Principal, path: bytes) -> Route | None:
        """Return the route for a path; None if there is none that this caller may use."""
        route = self.get(principal, path)
        if route is None:
            route = self._make(principal, path)
            if route is not None:
                self._keep(principal, path, route)
        return route

    def names(self, principal: Principal) -> list[str]:
        """Return the names of the servers that a caller may use."""
        return sorted(name for name, server in self._servers.items() if server.admits(principal))

    def forget(self, principal: str) -> None:
        """Drop the routes of a principal."""
        if self._session_key:
            table = self._tables.pop(principal, None)
            self._kept -= len(table.routes) if table is not None else 0

    def _make(self, principal: Principal, path: bytes) -> Route | None:
        name, account = self._parse(path)
        server = self._servers.get(name)
        if server is None or not server.admits(principal):
            return None
        to_server = self._to_servers.get(name)
        if to_server is None:
            self._to_servers[name] = to_server = route_to(server)
        its_account = server.account(principal, account)
        shared = its_account.principal != principal.id
        rules = ONE_CALLER
        if self._session_key:
            sessions = SessionIds(self._session_key, principal=principal.id, server=name, account=account)
            rules = FieldRules(self._credentials, sessions, shared)
        return replace(
            to_server,
            account=its_account,
            principal=principal.id,
            rules=rules,
            may_authorize=not shared or principal.role is Role.ADMIN,
        )

    def _parse(self, path: bytes) -> tuple[str, str]:
        """Return the server and the account that a raw path names; both may not exist."""
        if path == b"/mcp":
            return self._single, DEFAULT_ACCOUNT
        match = _PATH.fullmatch(path)
        if match is None:
            return "", ""
        name, account = match.groups()
        return name.decode(), DEFAULT_ACCOUNT if account is None else account.decode()

    def _keep(self, principal: Principal, path: bytes, route: Route) -> None:
        tables = self._tables
        table = tables.get(principal.id)
        if table is None or table.principal != principal:
            # Its name, role or project has changed: what it may use too.
            self.forget(principal.id)
            tables[principal.id] = table = _Table(principal, {})
        elif len(table.routes) >= table.limit:
            self._kept -= len(table.routes)
            table.routes.clear()
            if not self._session_key:
                table.routes.update(build(self._servers))
                self._kept += len(table.routes)
        while self._session_key and self._kept >= ROUTES_KEPT and len(tables) > 1:
            self.forget(next(each for each in tables if each != principal.id))
        table.routes[path] = route
        self._kept += 1


def single_server(servers: Mapping[str, ServerSettings]) -> str:
    """Return the name of the only server of the configuration, which is at ``/mcp`` too; empty if there are several.

    Servers that were made at run time do not change it.
    """
    configured = [name for name, server in servers.items() if server.origin == "config"]
    return configured[0] if len(configured) == 1 else ""


def build(servers: Mapping[str, ServerSettings]) -> dict[bytes, Route]:
    """Return the routes of ``local`` by raw path: ``/{server}/mcp``, and ``/mcp`` too if there is just one server."""
    routes = {f"/{name}/mcp".encode(): route_to(server) for name, server in servers.items()}
    if single := single_server(servers):
        routes[b"/mcp"] = routes[f"/{single}/mcp".encode()]
    return routes


def route_to(server: ServerSettings) -> Route:
    """Return the route of ``local`` to the default account of one server."""
    url = urls.parse(server.url)
    return Route(
        server,
        url.origin,
        url.target,
        url.origin.authority.encode("ascii"),
        server.account(LOCAL_PRINCIPAL),
        ServerMetrics(server_label(server.name)),
        None if server.allow_private is None else AddressPolicy.only(server.allow_private),
        marker=cold_answers.marker(server.name),
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


def has_encoded_letters(path: bytes) -> bool:
    """Return whether a raw path has a letter or digit percent-encoded, as no client does (RFC 3986 §6.2.2.2).

    Rules that look at raw paths would not see what the pages are routed by: ``/%6detrics`` is ``/metrics``.
    """
    return b"%" in path and _ENCODED_LETTER.search(path) is not None
