"""Everything that is not an MCP endpoint: the pages that a browser sees, and the health endpoints."""

import importlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from math import ceil
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from mcp_auth_proxy import __version__
from mcp_auth_proxy.broker import Broker, ownership
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import CallbackRefused, CallerRefused, SignInNeeded, StoreError, excerpt
from mcp_auth_proxy.models import Caller, Flow, GrantType, Principal
from mcp_auth_proxy.oauth.registration import client_metadata_document
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.observability.instruments import CONTENT_TYPE
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.events import OK
from mcp_auth_proxy.web.accounts import PageAccounts
from mcp_auth_proxy.web.address import Start, address_page, start_page
from mcp_auth_proxy.web.api_mount import WIRES, ApiMount, WireMount
from mcp_auth_proxy.web.audit import CONFIRM, START, PageAudit
from mcp_auth_proxy.web.callback import callback
from mcp_auth_proxy.web.connect import connect, connected_page, is_other_loopback_name, to_public_url
from mcp_auth_proxy.web.dashboard_mount import DashboardMount
from mcp_auth_proxy.web.forms import read_form
from mcp_auth_proxy.web.pages import message, redirect
from mcp_auth_proxy.web.paths import path_of, sign_in_path
from mcp_auth_proxy.web.popup import STARTS, WIRE_CALLBACK, Popups, keep_opener, signed_in
from mcp_auth_proxy.web.session import Visitors
from mcp_auth_proxy.web.static_files import static_file

if TYPE_CHECKING:
    from mcp_auth_proxy.web.dashboard.pages import Dashboard
    from mcp_auth_proxy.web.sign_in import SignInPages

logger = logging.getLogger(__name__)


class Site:
    """The handlers of the pages; ``build`` gives them their routes."""

    def __init__(
        self,
        *,
        broker: Broker,
        servers: Mapping[str, ServerSettings],
        database: Engine,
        public_url: str,
        draining: Callable[[], bool],
        start: Start,
        visitors: Visitors,
        audit: PageAudit,
        sign_in: "Callable[[], SignInPages]",
        problems: Callable[[], list[str]] = list,
        api: ApiMount | None = None,
        find_principal: Callable[[str], Principal | None] = lambda principal: None,
        on_loopback: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``sign_in`` returns the pages to sign in with, which are made when they are first needed.

        ``problems`` returns in sentences why some callers can't be identified now. ``api`` is None if the API is off.
        ``find_principal`` returns the principal with an id. ``on_loopback``: whether only this machine reaches the
        proxy.
        """
        self._broker = broker
        self._servers = servers
        self._database = database
        self._public_url = public_url
        self._draining = draining
        self._start = start
        self.api = api
        self._start_page: Callable[[Request], Awaitable[Response]] | None = None
        """Made when it is first needed: it imports the API."""
        self._visitors = visitors
        self._audit = audit
        self._sign_in = sign_in
        self._popups = Popups(broker, servers)
        self._problems = problems
        self._accounts = PageAccounts(servers, visitors, public_url)

        def make_dashboard(kind: "type[Dashboard]") -> "Dashboard":
            return kind(
                broker=broker,
                servers=servers,
                database=database,
                visitors=visitors,
                find_principal=find_principal,
                public_url=public_url,
                on_loopback=on_loopback,
                draining=draining,
                audit=audit,
            )

        self._dashboard = DashboardMount(make_dashboard, visitors, self._accounts)
        self._warnings = OutageLog()

    def build(self) -> Starlette:
        """Return the ASGI application."""
        site = Starlette(
            routes=[
                *self._dashboard.routes(),
                *self.health_routes(),
                Route("/connect/{server}", self._connect, methods=["GET", "POST"]),
                Route("/sign-in", self._sign_in_page, methods=["GET", "POST"]),
                Route("/sign-in/callback", self._signed_in),
                Route("/sign-in/out", self._sign_out, methods=["POST"]),
                Route("/oauth/callback", self._callback),
                Route("/oauth/client-metadata.json", self._client_metadata),
                Route("/oauth/connected/{server}", self._connected),
                Route("/connect/{server}/start", self._start_authorization, methods=["POST"]),
                Route("/mcp", self._address),
                Route("/{server}/mcp", self._address),
                Route("/static/{name}", _static),
                *self._api_routes(),
            ],
            exception_handlers={
                404: _not_found,
                405: _not_allowed,
                SignInNeeded: self._sign_in_needed,
                CallerRefused: _caller_refused,
                StoreError: _store_error,
            },
        )
        # An address with a slash too many is another address, as for MCP clients.
        site.router.redirect_slashes = False
        return site

    def _api_routes(self) -> list[BaseRoute]:
        """Return the routes of the API, and of the page that begins an authorization by URL alone."""
        if self.api is None:
            return []
        wires = WireMount(self.api)
        return [
            *(Route(path, self._start_by_url, methods=["GET", "POST"]) for path in STARTS),
            Route(WIRE_CALLBACK, _wire_callback),
            *(Route(path, wires) for path in WIRES),
            Mount("/api/v1", self.api),
        ]

    async def _start_by_url(self, request: Request) -> Response:
        if self._start_page is None:
            assert self.api is not None
            module = importlib.import_module("mcp_auth_proxy.web.start")
            self._start_page = module.StartPage(self.api.application(), self._visitors, self._public_url)
        return await self._start_page(request)

    def health_routes(self) -> list[Route]:
        """Return the routes for probes and for Prometheus, which ``health_listen`` has too."""
        return [
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", _metrics),
        ]

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "service": "mcp-auth-proxy", "version": __version__})

    async def _readyz(self, request: Request) -> Response:
        if self._draining():
            return JSONResponse({"status": "draining"}, status_code=503)
        try:
            await self._database.check_writable()
        except StoreError as error:
            return JSONResponse({"status": "store", "reason": str(error)}, status_code=503)
        # An identity provider that is down is no reason to send nobody here: known callers go on.
        problems = self._problems()
        return JSONResponse({"status": "ready", **({"problems": problems} if problems else {})})

    async def _connect(self, request: Request) -> Response:
        name, flow_id = request.path_params["server"], request.query_params.get("flow", "")
        server = self._servers.get(name)

        async def confirmed(caller: Caller) -> None:
            await self._audit.record(request, caller, CONFIRM, target=flow_id, server=server)

        response = await connect(
            request,
            self._broker,
            self._visitors,
            self._popups,
            public_url=self._public_url,
            command_name=server.command_name if server is not None else name,
            warn=self._warn,
            confirmed=confirmed,
            offer_start=lambda caller, flow: self._accounts.restart(caller, flow, name),
        )
        opened = await self._popups.flow(flow_id)
        return response if opened is None else keep_opener(response)

    def _warn(self, server: str, reason: str) -> None:
        if server in self._servers:
            self._warnings.warn(server, reason)

    async def _callback(self, request: Request) -> Response:
        async def ended(caller: Caller | None, flow: Flow | None, action: str, outcome: str) -> None:
            if flow is not None:
                server = self._servers.get(flow.key.account.server)
                await self._audit.record(request, caller, action, outcome, target=flow.id, server=server)

        return await callback(
            request,
            self._broker,
            self._visitors,
            self._popups,
            ended=ended,
            offer_start=self._accounts.restart,
        )

    async def _sign_in_page(self, request: Request) -> Response:
        pages = self._sign_in()
        response = await (pages.submit(request) if request.method == "POST" else pages.show(request))
        return signed_in(response, request.query_params.get("next", ""))

    async def _signed_in(self, request: Request) -> Response:
        return signed_in(await self._sign_in().callback(request), "")

    async def _sign_out(self, request: Request) -> Response:
        return await self._sign_in().sign_out(request)

    async def _connected(self, request: Request) -> Response:
        caller = await self._visitors.require(request)
        found = self._accounts.find(caller, request.path_params["server"])
        connected = await self._broker.connected(found[1]) if found is not None else None
        if connected is not None:
            opened = await self._popups.flow(request.query_params.get("flow", ""))
            own = found is not None and opened is not None and opened.key.account == found[1]
            return connected_page(connected, await self._popups.ended(opened) if own else None)
        text = "Your MCP client gets a link when it uses the server."
        return message(f"{excerpt(request.path_params['server'])} is not connected", text, status=404)

    async def _address(self, request: Request) -> Response:
        """Show what an MCP address is; the router sends browsers here, and MCP clients to the server."""
        caller = await self._visitors.require(request)
        found = self._accounts.find(caller, request.path_params.get("server") or next(iter(self._servers), ""))
        if found is None:
            return await _not_found(request, HTTPException(404))
        server, account = found
        may_authorize = self._visitors.may_open(caller)(account)
        return await address_page(
            server, account, self._broker, public_url=self._public_url, may_authorize=may_authorize
        )

    async def _start_authorization(self, request: Request) -> Response:
        caller = await self._visitors.require(request)
        found = self._accounts.find(caller, request.path_params["server"])
        if found is None:
            return await _not_found(request, HTTPException(404))
        server, account = found
        try:
            ownership.require(self._visitors.may_open(caller), account)
        except CallbackRefused as refused:
            return message("You can't authorize this server", str(refused), status=refused.status)
        popup = (await read_form(request)).get("popup") == "1"
        restart = self._accounts.button(server, account, popup=popup)
        response = await start_page(server, account, self._start, restart)
        await self._audit.record(request, caller, START, OK if response.status_code < 400 else "failed", server=server)
        return keep_opener(response) if popup else response

    async def _sign_in_needed(self, request: Request, error: Exception) -> Response:
        """Lead a browser to the sign-in page and, if what it opened can be opened again, back."""
        if is_other_loopback_name(request, self._public_url):
            # It may be signed in under the name that the callback comes to.
            return to_public_url(request, self._public_url)
        again = request.method in ("GET", "HEAD") or "flow" in request.query_params
        return redirect(sign_in_path(path_of(request) if again else "/"), "Sign in first")

    async def _client_metadata(self, request: Request) -> Response:
        if not self._public_url.startswith("https://"):
            return message("Not found", "A client metadata document needs a public_url with https.", status=404)
        device = any(server.oauth.grant is GrantType.DEVICE_CODE for server in self._servers.values())
        document = client_metadata_document(self._public_url, device=device)
        return JSONResponse(document, headers={"cache-control": "public, max-age=3600"})


async def _static(request: Request) -> Response:
    return await static_file(request) or await _not_found(request, HTTPException(404))


async def _wire_callback(request: Request) -> Response:
    """Lead on to the callback: the cookie of an attempt is sent to its path alone."""
    return keep_opener(redirect(f"/oauth/callback?{request.url.query}", "Continue"))


async def _metrics(request: Request) -> Response:
    return Response(metrics.registry.render(), headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})


async def _not_found(request: Request, error: Exception) -> Response:
    return message("Not found", "There is no page at this address.", status=404)


async def _not_allowed(request: Request, error: Exception) -> Response:
    response = message("Not possible", f"This address does not accept {request.method}.", status=405)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _caller_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, CallerRefused)
    response = message("You can't use this page", str(error), status=error.status)
    if error.retry_after is not None:
        response.headers["retry-after"] = str(max(1, ceil(error.retry_after)))
    return response


async def _store_error(request: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return message("The store can't be used now", str(error), status=503)
