"""Everything that is not an MCP endpoint: the pages that a browser sees, and the health endpoints."""

import logging
from collections.abc import Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mcp_auth_proxy import __version__
from mcp_auth_proxy.broker import Broker
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import StoreError, excerpt
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.oauth.registration import client_metadata_document
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.observability.instruments import CONTENT_TYPE
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.web.address import Start, address_page, start_page
from mcp_auth_proxy.web.callback import callback
from mcp_auth_proxy.web.connect import connect, connected_page
from mcp_auth_proxy.web.pages import message, page

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
    ) -> None:
        self._broker = broker
        self._servers = servers
        self._database = database
        self._public_url = public_url
        self._draining = draining
        self._start = start
        self._warnings = OutageLog()

    def build(self) -> Starlette:
        """Return the ASGI application."""
        site = Starlette(
            routes=[
                Route("/", self._index),
                *self.health_routes(),
                Route("/connect/{server}", self._connect, methods=["GET", "POST"]),
                Route("/oauth/callback", self._callback),
                Route("/oauth/client-metadata.json", self._client_metadata),
                Route("/oauth/connected/{server}", self._connected),
                Route("/connect/{server}/start", self._start_authorization, methods=["POST"]),
                Route("/mcp", self._address),
                Route("/{server}/mcp", self._address),
            ],
            exception_handlers={404: _not_found, 405: _not_allowed, StoreError: _store_error},
        )
        # An address with a slash too many is another address, as for MCP clients.
        site.router.redirect_slashes = False
        return site

    def health_routes(self) -> list[Route]:
        """Return the routes for probes and for Prometheus, which ``health_listen`` has too."""
        return [
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", _metrics),
        ]

    async def _index(self, request: Request) -> Response:
        servers = [{"name": name, "address": f"{self._public_url}/{name}/mcp"} for name in self._servers]
        return page("index.html", servers=servers, version=__version__)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "service": "mcp-auth-proxy", "version": __version__})

    async def _readyz(self, request: Request) -> Response:
        if self._draining():
            return JSONResponse({"status": "draining"}, status_code=503)
        try:
            await self._database.check_writable()
        except StoreError as error:
            return JSONResponse({"status": "store", "reason": str(error)}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def _connect(self, request: Request) -> Response:
        name = request.path_params["server"]
        server = self._servers.get(name)
        return await connect(
            request,
            self._broker,
            public_url=self._public_url,
            command_name=server.command_name if server is not None else name,
            warn=self._warn,
        )

    def _warn(self, server: str, reason: str) -> None:
        if server in self._servers:
            self._warnings.warn(server, reason)

    async def _callback(self, request: Request) -> Response:
        return await callback(request, self._broker)

    async def _connected(self, request: Request) -> Response:
        server = request.path_params["server"]
        connected = await self._broker.connected(server)
        if connected is not None:
            return connected_page(connected)
        text = "Your MCP client gets a link when it uses the server."
        return message(f"{excerpt(server)} is not connected", text, status=404)

    async def _address(self, request: Request) -> Response:
        """Show what an MCP address is; the router sends browsers here, and MCP clients to the server."""
        server = self._servers.get(request.path_params.get("server") or next(iter(self._servers), ""))
        if server is None:
            return await _not_found(request, HTTPException(404))
        return await address_page(server, self._broker, public_url=self._public_url)

    async def _start_authorization(self, request: Request) -> Response:
        server = self._servers.get(request.path_params["server"])
        if server is None:
            return await _not_found(request, HTTPException(404))
        return await start_page(server, self._start)

    async def _client_metadata(self, request: Request) -> Response:
        if not self._public_url.startswith("https://"):
            return message("Not found", "A client metadata document needs a public_url with https.", status=404)
        device = any(server.oauth.grant is GrantType.DEVICE_CODE for server in self._servers.values())
        document = client_metadata_document(self._public_url, device=device)
        return JSONResponse(document, headers={"cache-control": "public, max-age=3600"})


async def _metrics(request: Request) -> Response:
    return Response(metrics.registry.render(), headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})


async def _not_found(request: Request, error: Exception) -> Response:
    return message("Not found", "There is no page at this address.", status=404)


async def _not_allowed(request: Request, error: Exception) -> Response:
    response = message("Not possible", f"This address does not accept {request.method}.", status=405)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def _store_error(request: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return message("The store can't be used now", str(error), status=503)
