"""Carries requests to upstreams; knows those under way, so that they can be watched and drained."""

import asyncio
import time
from typing import Any

from mcp_auth_proxy.broker import Broker
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_connection import BUSY_POLL_THRESHOLD
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.proxy.fast_path import FastPathRequest, is_fast_path_eligible
from mcp_auth_proxy.proxy.handler import ProxyContext, Receive, RequestHandler, Send
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions


class Forwarder:
    """See the module. Belongs to one event loop."""

    def __init__(self, *, broker: Broker, upstream: HttpClient, body_limit: int, wait: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._broker = broker
        self.upstream = upstream
        self._means = ProxyContext(
            broker=broker,
            upstream=upstream,
            sessions=Sessions(),
            troubles=OutageLog(),
            draining=self._loop.create_future(),
            body_limit=body_limit,
            wait=wait,
        )
        self._idle: asyncio.Future[None] | None = None
        self._ended = False
        self._passages: set[FastPathRequest] = set()
        self._active: set[RequestHandler] = set()

    def try_fast_path(self, route: Route, reply: ClientRequest) -> bool:
        """Send a request on at once, where it has only to be passed on and nothing has to be waited for.

        Returns whether it was sent: the answer is then seen to. The body must have come.
        """
        body = reply.body()
        settled, token = self._broker.token_nowait(route.account)
        # A client that does not take its answers has to be waited for.
        if not settled or not is_fast_path_eligible(body, self._means.body_limit) or not reply.may_write:
            return False
        passage = FastPathRequest(self, route, reply, token)
        head = passage.head(len(body))
        connection = self.upstream.idle_connection(route.origin)
        if connection is None:
            return False
        self._passages.add(passage)
        passage.begin(connection, head, body)
        if connection.head_latency < BUSY_POLL_THRESHOLD and self.active_requests == 1:
            self._busy_poll(passage, time.monotonic() + BUSY_POLL_THRESHOLD)
        return True

    def _busy_poll(self, passage: FastPathRequest, until: float) -> None:
        """Look for an answer again and again for a moment: to sleep and be woken would take longer, and cost as much.

        That is so with servers on the same machine, while there is nothing else to do.
        """
        if passage.outcome is None and time.monotonic() < until:
            self._loop.call_soon(self._busy_poll, passage, until)

    def finished(self, passage: FastPathRequest) -> None:
        self._passages.discard(passage)
        if self._idle is not None:
            self._look_whether_idle()

    def fall_back(self, passage: FastPathRequest) -> None:
        async def forward(scope: dict[str, Any], receive: Receive, send: Send) -> None:
            self._passages.discard(passage)
            await self.forward(passage.route, scope, receive, send, passage)

        passage.reply.run_app(forward)

    async def forward(
        self, route: Route, scope: dict[str, Any], receive: Receive, send: Send, sent: FastPathRequest | None = None
    ) -> None:
        """Answer one request. The client gets an answer whatever happens, unless it goes away.

        ``sent``: the request has been sent once already, with this outcome.
        """
        exchange = RequestHandler(self._means, route, scope, receive, send, sent)
        self._active.add(exchange)
        if self._ended:
            exchange.end("draining")
        try:
            await exchange.run()
        except asyncio.CancelledError:
            if exchange.ending is None:
                raise
            exchange.task.uncancel()
            if exchange.ending == "draining":
                await exchange.finish_early()
        finally:
            self._active.discard(exchange)
            exchange.close()
            self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if self._idle is not None and not self.active_requests and not self._idle.done():
            self._idle.set_result(None)

    @property
    def active_requests(self) -> int:
        """How many requests are being answered now."""
        return len(self._active) + len(self._passages)

    async def until_idle(self, timeout: float) -> None:
        """Wait until no request is under way, at most ``timeout`` seconds."""
        if self.active_requests:
            self._idle = self._loop.create_future()
            await asyncio.wait({self._idle}, timeout=timeout)

    def drain(self) -> None:
        """Let requests finish, but end what only waits: event streams without a request, and held requests."""
        if not self._means.draining.done():
            self._means.draining.set_result(None)
        for exchange in list(self._active):
            if exchange.listening:
                exchange.end("draining")

    def end_all(self) -> None:
        """End every request under way, each stream with a final chunk where it can have one, and every new one."""
        self._ended = True
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        for exchange in list(self._active):
            exchange.end("draining")
        for passage in list(self._passages):
            passage.end()
