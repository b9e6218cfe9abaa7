"""The composition root: builds every floor from the settings, owns their lives, and leads each request to its place."""

import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route as PageRoute

from mcp_auth_proxy import __version__
from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.broker.planning import Authorizer
from mcp_auth_proxy.config.settings import Address, Settings
from mcp_auth_proxy.errors import StoreError
from mcp_auth_proxy.models import Flow, GrantType
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.urls import is_loopback
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.oauth.registration import client_metadata_document
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.forwarder import Forwarder
from mcp_auth_proxy.proxy.handler import Receive, Send
from mcp_auth_proxy.store.database import Database
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.web import browser
from mcp_auth_proxy.web.callback import callback
from mcp_auth_proxy.web.connect import connect
from mcp_auth_proxy.web.guard import Guard
from mcp_auth_proxy.web.pages import message, page

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

DRAIN_SECONDS = 30.0
"""Seconds that requests under way are given after SIGTERM."""


def effective_public_url(settings: Settings, listening: Address) -> str:
    """Return how browsers reach the proxy: as configured, else the address that is listened on."""
    if settings.public_url is not None:
        return settings.public_url
    return f"http://{reachable(listening)}"


def reachable(listening: Address) -> Address:
    """Return where this machine reaches what listens there: a wildcard is no address to call."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listening.host, listening.host)
    return Address(host, listening.port)


@asynccontextmanager
async def lifespan(
    settings: Settings,
    listening: Address,
    *,
    clock: Clock = time.time,
    announce: Callable[[Flow, str], None] | None = None,
    announce_key: Callable[[str], None] = logger.warning,
    background: bool = True,
) -> AsyncIterator["Application"]:
    """Open all that a running proxy needs, and close it again in the opposite order. Raises StoreError.

    ``announce`` is told of each new flow and its link; ``background``: renew tokens, and watch the store.
    """
    public_url = effective_public_url(settings, listening)
    async with AsyncExitStack() as stack:
        database = await Database.open(settings.store, announce=announce_key)
        stack.push_async_callback(database.close)
        dialer = Dialer(ca_bundle=settings.outbound.ca_bundle)
        fetcher = Fetcher(dialer)
        stack.push_async_callback(fetcher.aclose)
        broker = Broker(
            servers=settings.servers,
            database=database,
            authorizer=Authorizer(
                fetcher=fetcher,
                registrations=Registrations(database),
                public_url=public_url,
                allow_private=settings.authorization.allow_private,
                clock=clock,
            ),
            public_url=public_url,
            announce=announce or _Announcer(settings, listening),
            clock=clock,
        )
        stack.push_async_callback(broker.aclose)
        if background:
            await broker.start()
        upstream = HttpClient(dialer, connections_per_origin=settings.limits.upstream_connections)
        stack.push_async_callback(upstream.aclose)
        forwarder = Forwarder(
            broker=broker,
            upstream=upstream,
            body_limit=settings.limits.body,
            wait=settings.authorization.wait,
        )
        yield Application(settings, listening, public_url, database=database, broker=broker, forwarder=forwarder)


class _Announcer:
    """Tells of a new flow, once: in the log, and by opening the browser where there is somebody to see it."""

    def __init__(self, settings: Settings, listening: Address) -> None:
        self._opens = browser.should_open(
            settings.authorization.open_browser, loopback=is_loopback(listening.host), environ=os.environ
        )

    def __call__(self, flow: Flow, link: str) -> None:
        logger.warning("server %s needs your authorization, open this link: %s", flow.key.account.server, link)
        if flow.device is not None:
            # The link may lead to a machine that no browser reaches; this address is for any device.
            where, code = flow.device.verification_uri, flow.device.user_code
            logger.warning("server %s: or open %s on any device, and enter %s", flow.key.account.server, where, code)
        if self._opens:
            browser.open_link(link)


class Application:
    """The ASGI application. MCP endpoints are found by one look-up; all else goes to the pages."""

    def __init__(
        self,
        settings: Settings,
        listening: Address,
        public_url: str,
        *,
        database: Database,
        broker: Broker,
        forwarder: Forwarder,
    ) -> None:
        self.settings = settings
        self.public_url = public_url
        self.broker = broker
        self.forwarder = forwarder
        self._database = database
        self._routes = routes.build(settings.servers)
        self._guard = Guard(listen=listening, public_url=public_url, inbound=settings.inbound)
        self._pages = self._build_pages()
        self._draining = False

    def try_fast_path(self, reply: ClientRequest) -> bool:
        """Send a request to an MCP endpoint on at once, if it is as usual; otherwise it is for ``__call__``."""
        if self._draining:
            # Clients that always have another request would keep the proxy from its end.
            reply.keep_alive = False
        if reply.method != b"POST" or not self._guard.knows(reply.host):
            return False
        route = self._routes.get(reply.path)
        return route is not None and self.forwarder.try_fast_path(route, reply)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path: bytes = scope["raw_path"]
        route = self._routes.get(path)
        refused = self._guard.refusal(
            path,
            scope["headers"],
            endpoint=route is not None,
            page_write=route is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"),
        )
        if refused is not None:
            await PlainTextResponse(refused[1], status_code=refused[0])(scope, receive, send)  # type: ignore[arg-type]
        elif route is not None:
            await self.forwarder.forward(route, scope, receive, send)
        elif not routes.is_canonical_path(path):
            await PlainTextResponse("The path is not plain.", status_code=400)(scope, receive, send)  # type: ignore[arg-type]
        else:
            await self._pages(scope, receive, send)  # type: ignore[arg-type]

    # Shutting down

    async def drain(self) -> None:
        """Become unready, let requests finish for a bounded time, then end what is left."""
        self._draining = True
        self.forwarder.drain()
        await self.forwarder.until_idle(DRAIN_SECONDS)
        self.end()

    def end(self) -> None:
        """End what is left of the requests under way, each stream with a final chunk."""
        self.forwarder.end_all()

    # Pages

    def _build_pages(self) -> Starlette:
        secure = self.public_url.startswith("https://")
        device = any(server.oauth.grant is GrantType.DEVICE_CODE for server in self.settings.servers.values())
        document = client_metadata_document(self.public_url, device=device) if secure else None

        async def on_connect(request: Request) -> Response:
            return await connect(request, self.broker, public_url=self.public_url)

        async def on_callback(request: Request) -> Response:
            return await callback(request, self.broker)

        async def client_metadata(request: Request) -> Response:
            if document is None:
                return message("Not found", "A client metadata document needs a public_url with https.", status=404)
            return JSONResponse(document, headers={"cache-control": "public, max-age=3600"})

        return Starlette(
            routes=[
                PageRoute("/", self._index),
                PageRoute("/healthz", self._healthz),
                PageRoute("/readyz", self._readyz),
                PageRoute("/connect/{server}", on_connect),
                PageRoute("/oauth/callback", on_callback),
                PageRoute("/oauth/client-metadata.json", client_metadata),
            ],
            exception_handlers={404: self._not_found, StoreError: _store_error},
        )

    async def _index(self, request: Request) -> Response:
        servers = [{"name": name, "address": f"{self.public_url}/{name}/mcp"} for name in self.settings.servers]
        return page("index.html", servers=servers, version=__version__)

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "service": "mcp-auth-proxy", "version": __version__})

    async def _readyz(self, request: Request) -> Response:
        if self._draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        try:
            await self._database.writable()
        except StoreError as error:
            return JSONResponse({"status": "store", "reason": str(error)}, status_code=503)
        return JSONResponse({"status": "ready"})

    async def _not_found(self, request: Request, error: Exception) -> Response:
        path: bytes = request.scope["raw_path"]
        if not routes.is_endpoint(path):
            return message("Not found", "There is no page at this address.", status=404)
        names = sorted(self.settings.servers)
        text = f"There is no server at {request.url.path}. Configured servers: {', '.join(names)}."
        return JSONResponse(
            {"jsonrpc": "2.0", "id": None, "error": {"code": -32004, "message": text, "data": {"servers": names}}},
            status_code=404,
        )


async def _store_error(request: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return message("The store can't be used now", str(error), status=503)
