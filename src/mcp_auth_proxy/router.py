"""Route each request: check it with the guard, then pass it to the forwarder (MCP endpoints) or to the site."""

from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.net.asgi import App, run_asgi
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.observability.peer_log import RefusalLog
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.forwarder import Forwarder
from mcp_auth_proxy.rpc import answers
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.servers import ServerChange, ServerRegistry
from mcp_auth_proxy.web.cors import preflight_fields
from mcp_auth_proxy.web.guard import Guard

UNKNOWN_SERVER = -32004
"""JSON-RPC error code of the proxy's own: the path names a server that is not configured."""

MAX_TARGET = 16 * 1024
"""Bytes of the path and query of a page. The longest are callbacks, whose code may be a JWT. To read 60 KB takes
30 ms."""

_SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS"})


class Router:
    """The ``net.client_request.RequestServer`` that the listener calls with each request."""

    def __init__(self, *, guard: Guard, servers: ServerRegistry, forwarder: Forwarder, site: App) -> None:
        self.guard = guard
        """May be replaced at any time."""
        self._servers = servers
        self._forwarder = forwarder
        self._site = site
        self._routes = routes.build(servers)
        self.draining = False
        self._refusals = RefusalLog()
        servers.on_change(self._servers_changed)

    def try_fast_path(self, request: ClientRequest) -> bool:
        """Forward a usual request at once and return True; return False if it is for ``serve``."""
        if self.draining:
            # Otherwise a client that always has another request would delay the shutdown.
            request.keep_alive = False
            if self._forwarder.ended:
                return False
        if request.method != b"POST" or not self.guard.knows(request.host):
            return False
        route = self._routes.get(request.path)
        return route is not None and self._forwarder.try_fast_path(route, request)

    async def serve(self, request: ClientRequest) -> None:
        """Answer any request."""
        if self.draining:
            request.keep_alive = False
        path = request.path
        route = self._routes.get(path)
        page = route is not None and request.method == b"GET" and _wants_page(request)
        endpoint = not page and (route is not None or routes.is_endpoint(path))
        allowed_origins = self.guard.allowed_origins
        if endpoint:
            request.added_fields = allowed_origins.response_fields(request.headers)
        refused = self.guard.refusal(
            path,
            request.headers,
            endpoint=endpoint,
            page_write=not endpoint and request.method not in _SAFE_METHODS,
        )
        if refused is not None:
            self._refuse(request, *refused)
        elif endpoint and request.method == b"OPTIONS" and allowed_origins.origin_of(request.headers):
            request.respond(204, preflight_fields(request.headers), b"")
        elif page:
            await run_asgi(self._site, request)
        elif route is not None:
            await self._forwarder.serve(route, request)
        elif not routes.is_canonical_path(path):
            self._refuse(request, 400, "The path is not in canonical form.")
        elif routes.is_endpoint(path) or (not routes.is_own(path) and _is_mcp_client(request)):
            self._respond_unknown_server(request)
        elif len(path) + len(request.query) > MAX_TARGET:
            self._refuse(request, 414, "The target is too long for a page.")
        else:
            await run_asgi(self._site, request)

    def _refuse(self, request: ClientRequest, status: int, reason: str) -> None:
        self._refusals.warn(request.client, status, reason, kind=str(status))
        request.respond(status, [(b"content-type", b"text/plain; charset=utf-8")], reason.encode())

    def _respond_unknown_server(self, request: ClientRequest) -> None:
        names = sorted(self._servers)
        place = excerpt(request.path.decode("latin-1"))
        rule = "" if routes.is_endpoint(request.path) else ": the path of a server is /NAME/mcp"
        text = f"There is no server at {place}{rule}. Configured servers: {', '.join(names)}."
        error = {"code": UNKNOWN_SERVER, "message": text, "data": {"servers": names}}
        document = encode({"jsonrpc": "2.0", "id": None, "error": error})
        request.respond(404, answers.JSON_HEADERS, document)

    def _servers_changed(self, change: ServerChange) -> None:
        self._routes = routes.build(self._servers)
        self._forwarder.servers_changed(change.removed, change.changed)


def _wants_page(request: ClientRequest) -> bool:
    """Return whether a browser asks, not an MCP client: those accept event streams (MCP 2025-11-25, transports)."""
    accepted = _field(request, b"accept")
    return b"text/html" in accepted and b"text/event-stream" not in accepted


def _is_mcp_client(request: ClientRequest) -> bool:
    """Return whether a request is that of an MCP client: many have a path of their server in mind, such as ``/sse``."""
    if request.method == b"POST":
        return _field(request, b"content-type").startswith(b"application/json")
    return request.method == b"GET" and b"text/event-stream" in _field(request, b"accept")


def _field(request: ClientRequest, name: bytes) -> bytes:
    """Return the values of a field in lower case."""
    return b",".join(value for each, value in request.headers if each == name).lower()
