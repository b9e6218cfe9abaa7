"""Carries requests to upstreams; knows those under way, so that they can be watched and drained."""

import asyncio
import time
from typing import Any

from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.models import LOCAL
from mcp_auth_proxy.proxy.connection import BRIEF
from mcp_auth_proxy.proxy.exchange import Exchange, Means, Receive, Send
from mcp_auth_proxy.proxy.passage import Passage, is_plain
from mcp_auth_proxy.proxy.reply import Reply
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.proxy.troubles import Troubles
from mcp_auth_proxy.proxy.upstream import Upstream


class Forwarder:
    """See the module. Belongs to one event loop."""

    def __init__(self, *, broker: Broker, upstream: Upstream, body_limit: int, wait: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._broker = broker
        self.upstream = upstream
        self._means = Means(
            broker=broker,
            upstream=upstream,
            sessions=Sessions(),
            troubles=Troubles(),
            draining=self._loop.create_future(),
            body_limit=body_limit,
            wait=wait,
        )
        self._idle: asyncio.Future[None] | None = None
        self._ended = False
        self._passages: set[Passage] = set()
        self._active: set[Exchange] = set()

    def begin(self, route: Route, reply: Reply) -> bool:
        """Send a request on at once, where it has only to be passed on and nothing has to be waited for.

        Returns whether it was sent: the answer is then seen to. The body must have come.
        """
        body = reply.body()
        settled, token = self._broker.at_hand(LOCAL, route.server.name)
        # A client that does not take its answers has to be waited for.
        if not settled or not is_plain(body, self._means.body_limit) or not reply.may_write:
            return False
        passage = Passage(self, route, reply, token)
        head = passage.head(len(body))
        connection = self.upstream.idle_connection(route.origin)
        if connection is None:
            return False
        self._passages.add(passage)
        passage.begin(connection, head, body)
        if connection.pace < BRIEF and self.under_way == 1:
            self._stay_awake(passage, time.monotonic() + BRIEF)
        return True

    def _stay_awake(self, passage: Passage, until: float) -> None:
        """Look for an answer again and again for a moment: to sleep and be woken would take longer, and cost as much.

        That is so with servers on the same machine, while there is nothing else to do.
        """
        if passage.outcome is None and time.monotonic() < until:
            self._loop.call_soon(self._stay_awake, passage, until)

    def passed(self, passage: Passage) -> None:
        self._passages.discard(passage)
        if self._idle is not None:
            self._look_whether_idle()

    def go_on(self, passage: Passage) -> None:
        async def forward(scope: dict[str, Any], receive: Receive, send: Send) -> None:
            self._passages.discard(passage)
            await self.forward(passage.route, scope, receive, send, passage)

        passage.reply.go_on_with(forward)

    async def forward(
        self, route: Route, scope: dict[str, Any], receive: Receive, send: Send, sent: Passage | None = None
    ) -> None:
        """Answer one request. The client gets an answer whatever happens, unless it goes away.

        ``sent``: the request has been sent once already, with this outcome.
        """
        exchange = Exchange(self._means, route, scope, receive, send, sent)
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
        if self._idle is not None and not self.under_way and not self._idle.done():
            self._idle.set_result(None)

    @property
    def under_way(self) -> int:
        """How many requests are being answered now."""
        return len(self._active) + len(self._passages)

    async def until_idle(self, timeout: float) -> None:
        """Wait until no request is under way, at most ``timeout`` seconds."""
        if self.under_way:
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
