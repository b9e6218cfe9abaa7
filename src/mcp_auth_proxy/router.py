"""Route each request: check it with the guard, find out who calls, then pass it to the forwarder (MCP endpoints) or to
the site."""

import math
import secrets
from http import HTTPStatus

from mcp_auth_proxy.errors import CallerRefused, StoreError, excerpt
from mcp_auth_proxy.identity import Authenticator
from mcp_auth_proxy.models import LOCAL_CALLER, Caller, Principal, Role, Scope
from mcp_auth_proxy.net.asgi import App, run_asgi
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.observability.peer_log import RefusalLog
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.forwarder import Forwarder
from mcp_auth_proxy.proxy.routes import Route, Routes
from mcp_auth_proxy.rpc import answers
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.servers import ServerChange, ServerRegistry
from mcp_auth_proxy.web import protected_resource
from mcp_auth_proxy.web.cors import preflight_fields
from mcp_auth_proxy.web.failed_credentials import TOO_MANY, FailedCredentials
from mcp_auth_proxy.web.guard import Guard
from mcp_auth_proxy.web.protected_resource import ProtectedResource
from mcp_auth_proxy.web.wire_errors import WireError, is_wire, refusal

UNKNOWN_SERVER = answers.NOT_FOUND

MAX_TARGET = 16 * 1024
"""Bytes of the path and query of a page. The longest are callbacks, whose code may be a JWT. To read 60 KB takes
30 ms."""

_SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS"})
_METRICS = b"/metrics"


class Router:
    """The ``net.client_request.RequestServer`` that the listener calls with each request."""

    def __init__(
        self,
        *,
        guard: Guard,
        servers: ServerRegistry,
        forwarder: Forwarder,
        site: App,
        authenticator: Authenticator,
        resource: ProtectedResource,
        failed_credentials: FailedCredentials,
        session_key: bytes,
    ) -> None:
        """``session_key`` signs the ids of sessions if callers are identified."""
        self.guard = guard
        """May be replaced at any time, as ``resource``."""
        self.resource = resource
        self._servers = servers
        self._forwarder = forwarder
        self._site = site
        self._session_key = session_key
        self._failed_credentials = failed_credentials
        self.draining = False
        self._refusals = RefusalLog()
        self.identify_by(authenticator)
        servers.on_change(self._servers_changed)

    def identify_by(self, authenticator: Authenticator) -> None:
        """Identify the callers of all requests that begin from now on; active requests continue as they began."""
        self._authenticator = authenticator
        self._anonymous = authenticator.anonymous
        self._routes = Routes(
            self._servers,
            session_key=b"" if authenticator.anonymous else self._session_key,
            credential_fields=authenticator.credential_fields,
        )
        authenticator.on_refused(self._caller_refused)
        authenticator.on_key_refused(self._forwarder.refuse_key)

    @property
    def authenticator(self) -> Authenticator:
        """What identifies the callers now."""
        return self._authenticator

    def try_fast_path(self, request: ClientRequest) -> bool:
        """Forward a usual request at once and return True; return False if it is for ``serve``."""
        if self.draining:
            # Otherwise a client that always has another request would delay the shutdown.
            request.keep_alive = False
            if self._forwarder.ended:
                return False
        if request.method != b"POST" or not self.guard.knows(request.host):
            return False
        if self._anonymous:
            route = self._routes.local.get(request.path)
            return route is not None and self._forwarder.try_fast_path(route, request, LOCAL_CALLER)
        caller = self._authenticator.recognize(request)
        if caller is None or not caller.may_call:
            return False
        route = self._routes.get(caller.principal, request.path)
        return route is not None and self._forwarder.try_fast_path(route, request, caller)

    async def serve(self, request: ClientRequest) -> None:
        """Answer any request."""
        if self.draining:
            request.keep_alive = False
        path = request.path
        endpoint = routes.is_endpoint(path)
        page = endpoint and request.method == b"GET" and _wants_page(request) and self._has_page(path)
        well_known = not self._anonymous and path.startswith(protected_resource.PREFIX)
        for_pages_elsewhere = well_known or (endpoint and not page)
        allowed_origins = self.guard.allowed_origins
        if for_pages_elsewhere:
            request.added_fields = allowed_origins.response_fields(request.method, request.headers)
        refused = self.guard.refusal(
            path,
            request.headers,
            endpoint=for_pages_elsewhere,
            page_write=not for_pages_elsewhere and request.method not in _SAFE_METHODS,
        )
        if refused is not None:
            self._refuse(request, *refused)
        elif for_pages_elsewhere and request.method == b"OPTIONS" and allowed_origins.origin_of(request.headers):
            request.respond(204, preflight_fields(request.headers), b"")
        elif not routes.is_canonical_path(path):
            self._refuse(request, 400, "The path is not in canonical form.")
        elif well_known:
            self._respond_metadata(request)
        elif endpoint and not page:
            await self._serve_endpoint(request)
        elif routes.has_encoded_letters(path):
            self._refuse(request, 400, "The path is not in canonical form.")
        elif not (routes.is_own(path) or is_wire(path)) and _is_mcp_client(request):
            if (caller := await self._caller(request)) is not None:
                self._respond_unknown_server(request, caller)
        elif len(path) + len(request.query) > MAX_TARGET:
            self._refuse(request, 414, "The target is too long for a page.")
        elif path != _METRICS or await self._is_admin(request):
            await run_asgi(self._site, request)

    async def _serve_endpoint(self, request: ClientRequest) -> None:
        caller = await self._caller(request)
        if caller is None:
            return
        if not caller.may_call:
            self._respond_refused(request, CallerRefused("This credential is not for calls of MCP servers."))
            return
        route = self._routes.find(caller.principal, request.path)
        if route is None:
            self._respond_unknown_server(request, caller)
        else:
            await self._forwarder.serve(route, request, caller)

    async def _caller(self, request: ClientRequest) -> Caller | None:
        """Return who calls; None if that is not known, and the request was answered."""
        if self._anonymous:
            return LOCAL_CALLER
        try:
            return await self._authenticator.identify(request.headers, request.peer)
        except CallerRefused as refused:
            seconds = 0.0
            if refused.status == 401 and self._has_credential(request):
                seconds = await self._failed_credentials.pace(request.client)
            self._respond_refused(request, CallerRefused(TOO_MANY, 429, retry_after=seconds) if seconds else refused)
        except StoreError as error:
            self._respond_refused(request, CallerRefused(str(error), 503, retry_after=5.0))
        return None

    def _has_credential(self, request: ClientRequest) -> bool:
        return any(name in self._authenticator.credential_fields for name, _ in request.headers)

    def _has_page(self, path: bytes) -> bool:
        """Return whether a browser gets a page at an address; if callers are identified, the site looks who asks."""
        return not self._anonymous or self._route_of_everybody(path) is not None

    def _route_of_everybody(self, path: bytes) -> Route | None:
        return self._routes.find(LOCAL_CALLER.principal, path)

    async def _is_admin(self, request: ClientRequest) -> bool:
        """Return whether an admin calls, or callers are not identified; otherwise answer the request."""
        if self._anonymous:
            return True
        caller = await self._caller(request)
        if caller is None:
            return False
        if caller.principal.role is not Role.ADMIN or Scope.ADMIN not in caller.scopes:
            self._respond_refused(request, CallerRefused("This is for admins.", 403))
            return False
        return True

    # Answers

    def _refuse(self, request: ClientRequest, status: int, reason: str) -> None:
        self._refusals.warn(request.client, status, reason, kind=str(status))
        error = WireError(status=status, kind="refused", detail=reason, event_id=secrets.token_hex(16))
        # As the API answers, which is imported only if it is used.
        shaped = refusal(request.path.decode("latin-1"), error, HTTPStatus(status).phrase)
        if shaped is not None:
            fields = [(b"content-type", shaped.media_type.encode())]
            request.respond(shaped.status, fields, encode(shaped.document))
            return
        request.respond(status, [(b"content-type", b"text/plain; charset=utf-8")], reason.encode())

    def _respond_refused(self, request: ClientRequest, refused: CallerRefused) -> None:
        """Answer a request whose caller is not known, or may not call."""
        self._refusals.warn(request.client, refused.status, str(refused), kind=f"caller {refused.status}")
        headers = list(answers.JSON_HEADERS)
        if refused.status == 401:
            headers += self.resource.challenge(request.path, presented=self._has_credential(request))
        if refused.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(refused.retry_after))))
        self._respond_error(request, refused.status, answers.CALLER_REFUSED, str(refused), headers=headers)

    def _respond_unknown_server(self, request: ClientRequest, caller: Caller) -> None:
        names = self._routes.names(caller.principal)
        place = excerpt(request.path.decode("latin-1"))
        rule = "" if routes.is_endpoint(request.path) else ": the path of a server is /NAME/mcp"
        text = f"There is no server at {place}{rule}. Configured servers: {', '.join(names)}."
        self._respond_error(request, 404, UNKNOWN_SERVER, text, data={"servers": names})

    def _respond_error(
        self,
        request: ClientRequest,
        status: int,
        code: int,
        text: str,
        *,
        data: object = None,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        error = {"code": code, "message": text, **({} if data is None else {"data": data})}
        document = encode({"jsonrpc": "2.0", "id": None, "error": error})
        request.respond(status, headers or answers.JSON_HEADERS, document)

    def _respond_metadata(self, request: ClientRequest) -> None:
        """Answer at ``/.well-known/…``, without asking who calls: clients look here to find out how to log in."""
        resource = protected_resource.endpoint_of(request.path)
        document = self.resource.document(request.path, is_endpoint=routes.is_endpoint(resource))
        if document is not None and request.method in (b"GET", b"HEAD"):
            request.respond(200, answers.JSON_HEADERS, document)
        else:
            request.respond(404, answers.JSON_HEADERS, encode({"error": "not_found"}))

    # Changes

    def _servers_changed(self, change: ServerChange) -> None:
        self._routes.rebuild()
        self._forwarder.servers_changed(change.removed, change.changed)
        if change.changed:
            self._forwarder.end_unless(self._admits)

    def _admits(self, name: str, principal: Principal) -> bool:
        # A server that was removed ends its requests itself.
        server = self._servers.get(name)
        return server is None or server.admits(principal)

    def _caller_refused(self, principal: str) -> None:
        self._routes.forget(principal)
        self._forwarder.refuse(principal)


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
