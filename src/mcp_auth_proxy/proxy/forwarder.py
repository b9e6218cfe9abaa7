"""Forward MCP requests, on the fast path or by a handler, and keep track of them so that they can be drained."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from mcp_auth_proxy.broker import Broker
from mcp_auth_proxy.config.settings import AuthorizationSettings, LimitSettings
from mcp_auth_proxy.errors import SessionNotFound, UpstreamError
from mcp_auth_proxy.models import Account, Caller, Principal
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_connection import BUSY_POLL_THRESHOLD
from mcp_auth_proxy.observability.access_log import AccessLog, Entry, method_of, method_token
from mcp_auth_proxy.observability.metrics import CLIENT_GONE
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.observability.trace import trace_id_of
from mcp_auth_proxy.proxy.cold_start import Catalogs, ColdStart
from mcp_auth_proxy.proxy.consent_wait import ConsentWait
from mcp_auth_proxy.proxy.elicitations import Elicitations
from mcp_auth_proxy.proxy.fast_path import End, FastPathRequest, is_eligible
from mcp_auth_proxy.proxy.handler import ProxyContext, RequestHandler
from mcp_auth_proxy.proxy.headers import is_in_loop
from mcp_auth_proxy.proxy.own_sessions import OwnSessions
from mcp_auth_proxy.proxy.pings import Pings
from mcp_auth_proxy.proxy.quota import MemoryBudget, Quota
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient, failure_kind
from mcp_auth_proxy.store.mcp_sessions import McpSessions


class Forwarder:
    """Forward requests, count them, and end them at shutdown or on a reload. Belongs to one event loop."""

    def __init__(
        self,
        *,
        broker: Broker,
        upstream: UpstreamClient,
        limits: LimitSettings,
        authorization: AuthorizationSettings,
        several: bool,
        store: McpSessions,
        catalogs: Catalogs,
        public_url: str,
        clock: Callable[[], float],
    ) -> None:
        """``several``: more than one server is configured. ``store`` has the sessions that the proxy began itself."""
        self._loop = asyncio.get_running_loop()
        self._broker = broker
        self._body_limit = limits.body
        self.memory = MemoryBudget(limits.memory, several=several)
        self.held = Quota(limits.held, several=several)
        self.pings = Pings(limits.sse_ping)
        self.elicitations = Elicitations(self.pings)
        self.upstream = upstream
        self._sessions = Sessions()
        self._own_sessions = OwnSessions(store, self.upstream, clock=clock)
        self._cold_start = ColdStart(
            catalogs=catalogs, sessions=self._own_sessions, elicits=self._sessions, public_url=public_url
        )
        self._outages = broker.outages
        self._overloads = OutageLog()
        self._draining: asyncio.Future[None] = self._loop.create_future()
        self._finishing: set[asyncio.Future[Any]] = set()
        self._context = self._make_context(authorization)
        self._access_log = AccessLog()
        self._idle: asyncio.Future[None] | None = None
        self.ended = False
        """Whether new requests are ended at once."""
        self.fast_requests: set[FastPathRequest] = set()
        self._handlers: set[RequestHandler] = set()

    def configure(self, *, limits: LimitSettings, authorization: AuthorizationSettings, several: bool) -> None:
        """Change the limits for requests that begin from now on; the parameters are those of the constructor."""
        self._body_limit = limits.body
        self.memory.configure(limits.memory, several=several)
        self.held.configure(limits.held, several=several)
        self.pings.configure(limits.sse_ping)
        self._context = self._make_context(authorization)

    def _make_context(self, authorization: AuthorizationSettings) -> ProxyContext:
        broker, sessions, draining, cold_start = self._broker, self._sessions, self._draining, self._cold_start
        cold_start.enabled = authorization.cold_start
        return ProxyContext(
            broker=broker,
            upstream=self.upstream,
            sessions=sessions,
            own_sessions=self._own_sessions,
            cold_start=cold_start,
            elicitations=self.elicitations,
            consent=ConsentWait(
                broker=broker,
                sessions=sessions,
                draining=draining,
                wait=authorization.wait,
                cold_start=cold_start,
                elicitations=self.elicitations,
            ),
            outages=self._outages,
            draining=draining,
            body_limit=self._body_limit,
            memory=self.memory,
            held=self.held,
            pings=self.pings,
            let_finish=self._let_finish,
            overloaded=self._warn_of_overload,
        )

    def _let_finish(self, server: str, asking: asyncio.Future[Any]) -> None:
        """Keep what goes on for a server after the request that began it was answered; log if it fails."""

        def finished(asking: asyncio.Future[Any]) -> None:
            self._finishing.discard(asking)
            if not asking.cancelled() and (error := asking.exception()) is not None:
                self._outages.warn(server, str(error))

        self._finishing.add(asking)
        asking.add_done_callback(finished)

    def connected(self, account: Account) -> None:
        """Tell the clients that were asked to show a link of an account that its user has authorized."""
        asked_elsewhere = self.elicitations.connected(account)
        if asked_elsewhere:
            telling = asyncio.ensure_future(self._tell_elsewhere(account, asked_elsewhere))
            self._let_finish(account.server, telling)

    async def _tell_elsewhere(self, account: Account, sessions: list[bytes]) -> None:
        finished = await self._broker.finished_flows(account)
        for session_id in sessions:
            self.elicitations.tell(account, session_id, finished)

    # Requests

    def try_fast_path(self, route: Route, request: ClientRequest, caller: Caller) -> bool:
        """Forward a request at once if nothing has to be awaited; return whether it was sent.

        The body must be complete. If True is returned, the response is handled as well.
        """
        content = request.peek_body()
        ready, token = self._broker.token_nowait(route.account)
        # Writing to a client that reads slowly has to be awaited.
        if not ready or not is_eligible(content, self._body_limit) or not request.may_write:
            return False
        if self._cold_start.enabled and content.find(route.marker) >= 0:
            return False
        if is_in_loop(request.fields):
            return False
        memory, size = self.memory, len(content)
        if memory.fast + size > memory.limit_of_fast:
            return False
        fast = FastPathRequest(self, route, request, caller, token)
        try:
            head = fast.head(size)
        except SessionNotFound:
            return False
        connection = self.upstream.idle_connection(route)
        if connection is None:
            return False
        fast.size = size
        memory.fast += size
        self.fast_requests.add(fast)
        fast.send(connection, head, content)
        if connection.head_latency < BUSY_POLL_THRESHOLD and self.active_requests == 1:
            self._busy_poll(fast, time.monotonic() + BUSY_POLL_THRESHOLD)
        return True

    def _busy_poll(self, fast: FastPathRequest, until: float) -> None:
        """Keep the event loop awake for a moment: to sleep and be woken up takes longer and costs as much CPU.

        This holds for a server on the same machine, while there is nothing else to do.
        """
        if fast.waiting and time.monotonic() < until:
            self._loop.call_soon(self._busy_poll, fast, until)

    def finished(self, fast: FastPathRequest) -> None:
        """Forget a request of the fast path."""
        self.fast_requests.discard(fast)
        self.release(fast)
        if self._idle is not None:
            self._check_idle()

    def keep(self, fast: FastPathRequest, size: int) -> bool:
        """Count bytes that wait for the client of a request on the fast path; log if there is no memory for them."""
        server = fast.route.server.name
        if not self.memory.take(server, size):
            self._warn_of_overload(server, "limits.memory")
            return False
        fast.kept += size
        return True

    def release(self, fast: FastPathRequest) -> None:
        """Give back the memory of a request on the fast path."""
        self.memory.fast -= fast.size
        fast.size = 0
        if fast.kept:
            self.memory.give_back(fast.route.server.name, fast.kept)
            fast.kept = 0

    def broke_off(self, fast: FastPathRequest, error: UpstreamError) -> None:
        """Count and log a response of the fast path that ended too early."""
        server = fast.route.server.name
        trace_id = trace_id_of(fast.request.headers)
        self._outages.warn(server, f"the response broke off: {error}", trace_id=trace_id)
        fast.route.metrics.upstream_failed(failure_kind(error))

    def _warn_of_overload(self, server: str, key: str) -> None:
        """Log that requests to a server are refused, and which client has most of what there are too many of."""
        if not self._overloads.is_due(server):
            return
        clients: Counter[str] = Counter()
        for handler in self._handlers:
            if handler.route.server.name == server:
                clients[handler.client] += handler.held if key == "limits.held" else handler.memory.size
        for fast in self.fast_requests:
            if fast.route.server.name == server and key == "limits.memory":
                clients[fast.request.client] += fast.size + fast.kept
        client, most = clients.most_common(1)[0] if clients else ("unknown", 0)
        unit = "requests" if key == "limits.held" else "bytes"
        reason = f"{key} is used up, and requests are refused. Client {client} uses most of it ({most} {unit})."
        self._overloads.warn(server, reason)

    def record(
        self,
        route: Route,
        request: ClientRequest,
        started_at: float,
        mcp_method: str | None = None,
        *,
        failed: bool = False,
    ) -> None:
        """Count and log a request whose response is complete, or whose client is gone.

        ``failed``: it was answered with an error of ours.
        """
        seconds = time.monotonic() - started_at
        # If a handler failed with an unexpected exception, the 500 is sent after this.
        status = request.status or (CLIENT_GONE if request.disconnected else 500)
        if self._outages.failing and status < 500 and not failed:
            self._outages.reached(route.server.name)
        metrics = route.metrics
        (metrics.post if request.method == b"POST" else metrics.of_method(request.method)).finished(status, seconds)
        if self._access_log.enabled:
            self._log_access(route, request, status, seconds, mcp_method)

    def _log_access(
        self, route: Route, request: ClientRequest, status: int, seconds: float, mcp_method: str | None
    ) -> None:
        account = route.account
        self._access_log.write(
            Entry(
                server=account.server,
                account=f"{route.principal}/{account.name}",
                method=request.method.decode("ascii"),
                mcp_method=method_token(mcp_method) if mcp_method is not None else method_of(request.headers),
                status=status,
                size=request.sent,
                seconds=seconds,
                trace_id=trace_id_of(request.headers),
            )
        )

    def fall_back(self, fast: FastPathRequest) -> None:
        """Continue a request of the fast path in a handler, which counts the body again when it reads it."""
        self.release(fast)

        async def serve(request: ClientRequest) -> None:
            self.fast_requests.discard(fast)
            await self.serve(fast.route, request, fast.caller, fast)

        fast.request.run(serve)

    async def serve(
        self, route: Route, request: ClientRequest, caller: Caller, sent: FastPathRequest | None = None
    ) -> None:
        """Answer one request. The client gets a response whatever happens, unless it goes away.

        ``route`` is that of the ``caller``. ``sent``: the fast path has sent the request already.
        """
        started_at = time.monotonic() if sent is None else sent.started_at
        handler = RequestHandler(self._context, route, request, caller, sent)
        self._handlers.add(handler)
        ending = "draining" if self.ended else sent.ending if sent is not None else None
        if ending is not None:
            handler.end(ending)
        try:
            if ending is not None:
                # Raises CancelledError: nothing may be sent to the upstream any more.
                await asyncio.sleep(0)
            await handler.run()
        except asyncio.CancelledError:
            if handler.ending is None:
                raise
            handler.task.uncancel()
            await handler.finish_early()
        finally:
            self._handlers.discard(handler)
            handler.close()
            self.record(route, request, started_at, handler.mcp_method, failed=handler.failed)
            self._check_idle()

    @property
    def active_requests(self) -> int:
        """The number of requests that are being answered now."""
        return len(self._handlers) + len(self.fast_requests)

    # Ending

    async def until_idle(self, timeout: float) -> None:
        """Wait until no request is active, at most ``timeout`` seconds."""
        if self.active_requests:
            self._idle = self._loop.create_future()
            await asyncio.wait({self._idle}, timeout=timeout)

    def drain(self) -> None:
        """Let requests finish, but end those that only wait: for messages of the server, or for consent."""
        if not self._draining.done():
            self._draining.set_result(None)
        for handler in list(self._handlers):
            if handler.listening:
                handler.end("draining")

    def end_all(self) -> None:
        """End every active request, each stream with a final chunk if possible, and every new request."""
        self.ended = True
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        for handler in list(self._handlers):
            handler.end("draining")
        for fast in list(self.fast_requests):
            fast.end("draining")

    def servers_changed(self, removed: Collection[str], changed: Collection[str]) -> None:
        """End every active request to servers that were removed; requests to changed servers continue as they began."""
        self._end_those(lambda active: active.route.server.name in removed, "removed")
        for name in (*removed, *changed):
            self._outages.forget(name)
            self._overloads.forget(name)

    def refuse(self, principal: str) -> None:
        """End every active request of a principal that may no longer call."""
        self._end_those(lambda active: active.route.principal == principal, "refused")

    def refuse_key(self, key: str) -> None:
        """End every active request that came with an API key, by its id, that may no longer be used."""
        self._end_those(lambda active: active.caller.key == key, "refused")

    def end_unless(self, admits: Callable[[str, Principal], bool]) -> None:
        """End every active request to a server that does not admit its caller any more: for them it was removed.

        ``admits`` is called with the server's name.
        """
        self._end_those(lambda active: not admits(active.route.server.name, active.caller.principal), "removed")

    def _end_those(self, concerned: Callable[[RequestHandler | FastPathRequest], bool], reason: End) -> None:
        for handler in list(self._handlers):
            if concerned(handler):
                handler.end(reason)
        for fast in list(self.fast_requests):
            if concerned(fast):
                fast.end(reason)

    def _check_idle(self) -> None:
        if self._idle is not None and not self.active_requests and not self._idle.done():
            self._idle.set_result(None)
