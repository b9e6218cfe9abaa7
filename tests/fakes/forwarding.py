"""The data plane alone: its listener and its upstream are real sockets, its broker is scripted."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from uvicorn import Config
from uvicorn.server import ServerState

from mcp_auth_proxy.broker import Broker, PendingAuthorization
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal
from mcp_auth_proxy.config.settings import AuthorizationSettings, LimitSettings, ServerSettings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.models import (
    LOCAL_CALLER,
    AccessToken,
    Account,
    ClientAuth,
    Endpoints,
    Flow,
    GrantKey,
    Registration,
    RegistrationKind,
)
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_server import HttpServerConnection
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.cold_start import Catalogs
from mcp_auth_proxy.proxy.forwarder import Forwarder
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.store.mcp_sessions import McpSessions

Verdict = AccessToken | PendingAuthorization | McpAuthProxyError | None


def access_token(generation: int) -> AccessToken:
    return AccessToken(b"Bearer token-%d" % generation, generation)


def pending_authorization(link: str = "http://127.0.0.1:8787/connect/notes?flow=F1") -> PendingAuthorization:
    """A flow whose user has not decided yet."""
    registration = Registration(
        server="notes",
        issuer="https://as.example",
        client_id="c",
        client_auth=ClientAuth.NONE,
        kind=RegistrationKind.DYNAMIC,
    )
    flow = Flow(
        id="F1",
        key=GrantKey(account=Account("local", "notes"), resource="https://notes.example", issuer="https://as.example"),
        registration=registration,
        endpoints=Endpoints(authorization="https://as.example/authorize", token="https://as.example/token"),
        scopes=(),
        redirect_uri="",
        iss_supported=False,
        created_at=0.0,
        expires_at=600.0,
    )
    return PendingAuthorization(flow, link, asyncio.get_running_loop().create_future())


class ScriptedBroker:
    """Has ``current`` as the token, and answers each challenge with the next of ``verdicts``."""

    def __init__(self, current: Verdict = None, verdicts: Sequence[Verdict] = ()) -> None:
        self.current = current
        self.verdicts = list(verdicts)
        self.challenges: list[dict[str, Any]] = []
        self.waiting: PendingAuthorization | None = None
        self.outages = OutageLog()
        self.journal = ConnectionJournal(clock=time.time)
        self.accepted_by: list[Account] = []
        """The accounts whose token was accepted in a handler."""

    def accepted(self, account: Account) -> None:
        self.accepted_by.append(account)

    async def token(self, account: Account) -> AccessToken | None:
        if isinstance(self.current, McpAuthProxyError):
            raise self.current
        return cast("AccessToken | None", self.current)

    def token_nowait(self, account: Account) -> tuple[bool, AccessToken | None]:
        ready = self.waiting is None and not isinstance(self.current, McpAuthProxyError)
        return ready, cast("AccessToken | None", self.current if ready else None)

    def check_origin(self, sent_to: ServerSettings) -> None:
        """No server moves."""

    def pending(self, account: Account) -> PendingAuthorization | None:
        return self.waiting

    async def fresh_link(self, pending: PendingAuthorization) -> PendingAuthorization:
        return pending

    async def challenged(self, account: Account, **challenge: Any) -> AccessToken | PendingAuthorization | None:
        self.challenges.append(challenge)
        verdict = self.verdicts.pop(0)
        if isinstance(verdict, McpAuthProxyError):
            raise verdict
        if isinstance(verdict, AccessToken):
            self.current = verdict
        return verdict


class ForwardingServer:
    """A listener with one MCP endpoint, ``/notes/mcp``."""

    def __init__(self, forwarder: Forwarder, route: routes.Route) -> None:
        self.forwarder = forwarder
        self.origin = ""
        self._route = route

    def try_fast_path(self, request: ClientRequest) -> bool:
        return request.method == b"POST" and self.forwarder.try_fast_path(self._route, request, LOCAL_CALLER)

    async def serve(self, request: ClientRequest) -> None:
        await self.forwarder.serve(self._route, request, LOCAL_CALLER)


@asynccontextmanager
async def forwarding(
    broker: ScriptedBroker,
    url: str,
    *,
    wait: float = 5.0,
    body_limit: int = 1 << 20,
    timeout: float = 5.0,
    sse_ping: float = 15.0,
) -> AsyncIterator[ForwardingServer]:
    """Run the data plane before the upstream at ``url``."""
    http = HttpClient(Dialer(environ={}), connections_per_origin=4)
    limits = LimitSettings(body=body_limit, sse_ping=sse_ping)
    forwarder = Forwarder(
        broker=cast(Broker, broker),
        upstream=UpstreamClient(http),
        limits=limits,
        authorization=AuthorizationSettings(wait=wait, cold_start=False),
        several=False,
        # Used by cold start only.
        store=cast(McpSessions, None),
        catalogs=cast(Catalogs, None),
        public_url="http://127.0.0.1",
        clock=time.time,
    )
    server = ServerSettings(name="notes", url=url, upstream_timeout=timeout)
    running = ForwardingServer(forwarder, routes.build({"notes": server})[b"/notes/mcp"])
    config, state = Config(cast(Any, running), interface="asgi3", log_config=None), ServerState()
    listener = await asyncio.get_running_loop().create_server(
        lambda: HttpServerConnection(config, state, {}), "127.0.0.1", 0
    )
    running.origin = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield running
    finally:
        listener.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await http.aclose()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        await listener.wait_closed()
