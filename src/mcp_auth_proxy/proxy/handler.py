"""Handle one request of a client, from its body to the last byte of its response.

The handler sends the request; on a 401 or 403 it asks the broker, and sends the request again. It holds the request
while a user authorizes, and relays the response unchanged.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.broker import Broker, ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    BodyTooLarge,
    ClientDisconnected,
    LoopDetected,
    McpAuthProxyError,
    Overloaded,
    SessionNotFound,
    StoreError,
    StoreMigrated,
    UpstreamError,
    UpstreamPoolTimeout,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mcp_auth_proxy.models import AccessToken, Caller
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_head import HOPS, MAX_HOPS, Fields
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.observability import trace
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.proxy.cold_request import ColdRequest
from mcp_auth_proxy.proxy.cold_start import ColdStart
from mcp_auth_proxy.proxy.consent_wait import ConsentWait
from mcp_auth_proxy.proxy.elicitations import Elicitations
from mcp_auth_proxy.proxy.fast_path import MAX_BODY, End, FastPathRequest
from mcp_auth_proxy.proxy.headers import is_in_loop, response_headers, without_cors
from mcp_auth_proxy.proxy.own_sessions import OwnSessions
from mcp_auth_proxy.proxy.pings import Pings, may_be_pinged
from mcp_auth_proxy.proxy.quota import MemoryBudget, Quota, RequestMemory
from mcp_auth_proxy.proxy.responder import Responder
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient, failure_kind
from mcp_auth_proxy.rpc import answers, events
from mcp_auth_proxy.rpc.messages import RequestBody, needs_inspection

logger = logging.getLogger(__name__)

MAX_SENDS = 10
"""Maximum number of times that one request is sent, whatever the other bounds allow."""

_END_TEXTS = {
    "draining": "the proxy is shutting down",
    "removed": "it is no longer configured",
    "refused": "whoever called may no longer do so",
}


class _Answered(Exception):
    """The request was answered by the proxy, before it could be sent."""


@dataclass(frozen=True, slots=True)
class ProxyContext:
    """The objects and limits that all request handlers share."""

    broker: Broker
    upstream: UpstreamClient
    sessions: Sessions
    own_sessions: OwnSessions
    cold_start: ColdStart
    elicitations: Elicitations
    consent: ConsentWait
    outages: OutageLog
    draining: asyncio.Future[None]
    """Done when the proxy begins to shut down."""
    body_limit: int
    """Bytes."""
    memory: MemoryBudget
    held: Quota
    """Requests that wait."""
    pings: Pings
    let_finish: Callable[[str, asyncio.Future[Any]], None]
    """Called with a server and what goes on for it after the request was answered."""
    overloaded: Callable[[str, str], None]
    """Called with a server and ``limits.memory`` or ``limits.held`` when that is used up: logs the client to blame."""


class RequestHandler:
    """The state of one active request. Create it in the task that runs it."""

    __slots__ = (
        "__weakref__",
        "_body",
        "_cold",
        "_context",
        "_request",
        "_responder",
        "_response",
        "_sent",
        "caller",
        "ending",
        "failed",
        "held",
        "listening",
        "memory",
        "route",
        "task",
    )

    def __init__(
        self,
        context: ProxyContext,
        route: Route,
        request: ClientRequest,
        caller: Caller,
        sent: FastPathRequest | None = None,
    ) -> None:
        """``sent``: the fast path has sent the request already, with this outcome."""
        self._context = context
        self._request = request
        self.caller = caller
        trace_id = trace.trace_id_of(request.headers)
        self.memory = RequestMemory(context.memory, route.server.name)
        self._responder = Responder(request, server=route.server.name, memory=self.memory, trace_id=trace_id or "")
        self._cold = ColdRequest(
            request,
            self._responder,
            route,
            cold_start=context.cold_start,
            sessions=context.own_sessions,
            elicits=context.sessions,
        )
        self.held = False
        """Whether the request waits, and counts towards ``limits.held``."""
        self._body = RequestBody(b"")
        self._sent = sent
        self._response = sent.response if sent is not None else None
        self.route = route
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.ending: End | None = None
        self.failed = False
        """Whether it was answered with an error of ours."""
        self.listening = False
        """Whether the request only waits for messages of the server: at shutdown it is ended at once."""
        request.when_disconnected(lambda: self.end("disconnected"))

    @property
    def client(self) -> str:
        """Whose request it is, for a log."""
        return self._request.client

    @property
    def mcp_method(self) -> str | None:
        """The MCP method, if the body was parsed."""
        return self._body.method_if_parsed

    async def run(self) -> None:
        """Forward the request and answer it; the kind of an error decides how it is answered."""
        try:
            if await self._read_body():
                await self._forward()
        except (ClientDisconnected, _Answered):
            return
        except (UpstreamProtocolError, Overloaded) as error:
            if self._responder.relaying:
                # The head was sent before. Without a final chunk the client notices that the response is incomplete.
                self._note_break(error)
            else:
                await self._fail(error)
        except McpAuthProxyError as error:
            await self._fail(error)

    def _note_break(self, error: McpAuthProxyError) -> None:
        server = self.route.server.name
        if isinstance(error, UpstreamError):
            reason = f"the response broke off: {error}"
            self._context.outages.warn(server, reason, trace_id=self._responder.trace_id)
            self.route.metrics.upstream_failed(failure_kind(error))
        elif isinstance(error, Overloaded):
            self._context.overloaded(server, error.key)

    async def _read_body(self) -> bool:
        """Read the body; return False if there is no memory for it and the request was answered with a link.

        Raises BodyTooLarge, Overloaded if a link would not help, and what a link's authorization raises.
        """
        context, account = self._context, self.route.account
        limit = min(context.body_limit, context.memory.largest)
        try:
            self._body = RequestBody(await self._request.body(limit, self.memory.take))
        except BodyTooLarge as error:
            self._body = RequestBody.of_start(error.start)
            raise BodyTooLarge(limit, "limits.body" if limit == context.body_limit else "limits.memory") from None
        except Overloaded:
            _, token = context.broker.token_nowait(account)
            pending = context.broker.pending(account) if token is None else None
            if pending is None:
                raise
            context.overloaded(account.server, "limits.memory")
            await context.consent.answer_unread(pending, self._request, self._responder, self.route)
            return False
        return True

    async def _forward(self) -> None:
        broker, account = self._context.broker, self.route.account
        if is_in_loop(self._request.fields):
            raise LoopDetected(
                f"The request is in a loop: it has come through {MAX_HOPS} proxies already ({HOPS.decode()}). "
                f"Check where servers.{account.server}.url leads."
            )
        # Nothing else is done for a session that is not the caller's.
        await self._cold.begin(self._body)
        if self._cold.concerned or needs_inspection(self._body.content):
            # The user's answer in a retry is for the proxy alone: reading it removes it from the forwarded body.
            self._body.parse()
        if self._sent is not None:
            token = self._sent.token
        else:
            ready, _ = broker.token_nowait(account)
            with nullcontext() if ready else self._hold():
                token = await broker.token(account)
            if token is None and await self._cold.answer_at_once():
                return
            pending = broker.pending(account) if token is None else None
            if pending is not None:
                token = await self._wait_for_consent(pending)
                if token is None:
                    return
        history = ChallengeHistory()
        for _ in range(MAX_SENDS):
            response = await self._cold.open(token)
            if response is None:
                if token is not None and await self._cold.answer_instead():
                    return
                self._body = self._cold.body
                response = await self._send(token)
            if response.status != 401 and response.status != 403:
                if token is not None:
                    broker.accepted(account)
                await self._relay(response)
                return
            challenged_at = time.monotonic()
            with self._hold():
                verdict = await self._challenged(response, token, history)
            if verdict is None:
                await self._relay(response)
                return
            response.close()
            if isinstance(verdict, PendingAuthorization):
                token = await self._wait_for_consent(verdict, time.monotonic() - challenged_at)
            else:
                token = verdict
            if token is None:
                return
        raise AuthorizationError(f"Server {account.server} refuses every token that is renewed for it.")

    async def _challenged(
        self, response: Response, used: AccessToken | None, history: ChallengeHistory
    ) -> AccessToken | PendingAuthorization | None:
        """Ask the broker how to continue. Raises _Answered if that takes longer than the client can wait."""
        work = self._context.broker.challenged(
            self.route.account,
            sent_to=self.route.server,
            status=response.status,
            challenge=_fields(response, b"www-authenticate"),
            nonce=_fields(response, b"dpop-nonce"),
            used=used,
            history=history,
            subject=self.caller.jwt,
        )
        cold_start = self._context.cold_start
        deadline = cold_start.link_deadline(self._body, self.route) if used is None else None
        if deadline is None:
            return await work
        asking = asyncio.ensure_future(work)
        try:
            await asyncio.wait({asking}, timeout=deadline)
        except asyncio.CancelledError:
            asking.cancel()
            raise
        if not asking.done():
            # It goes on for the requests that follow, which get its link or its error.
            self._context.let_finish(self.route.account.server, asking)
            if await cold_start.answer(None, self._body, self._responder, self.route):
                raise _Answered
        return await asking

    async def _wait_for_consent(self, pending: PendingAuthorization, elapsed: float = 0.0) -> AccessToken | None:
        waiting, session = self.route.metrics.waiting_for_consent, self._cold.session
        listens = session is not None and self._request.method == b"GET"
        waiting.inc()
        if session is not None:
            session.listeners += listens
        try:
            with self._hold(or_refuse=False):
                self.listening = self._cold.listens
                crowded = self.listening and self._context.held.is_crowded(self.route.server.name)
                return await self._context.consent.token(
                    pending,
                    self._request,
                    self._body,
                    self._responder,
                    self.route,
                    session=session,
                    at_once=crowded or not self.held,
                    elapsed=elapsed,
                )
        finally:
            self.listening = False
            waiting.dec()
            if session is not None:
                session.listeners -= listens

    @contextmanager
    def _hold(self, *, or_refuse: bool = True) -> Iterator[None]:
        """Count the request as held, if ``limits.held`` allows that.

        Otherwise raise Overloaded, unless not ``or_refuse``, or a link will be the answer.
        """
        held, account = self._context.held, self.route.account
        self.held = held.take(account.server, 1)
        if not self.held:
            if or_refuse and self._context.broker.pending(account) is None:
                raise Overloaded("limits.held")
            self._context.overloaded(account.server, "limits.held")
        try:
            yield
        finally:
            if self.held:
                self.held = False
                held.give_back(account.server, 1)

    async def _send(self, token: AccessToken | None) -> Response:
        """Send the request, or take over what the fast path has sent. Raises UpstreamError."""
        sent, self._sent = self._sent, None
        if sent is not None and sent.error is not None:
            raise sent.error
        if token is not None and sent is None:
            # The token is for the server as it is configured now, and the route was found when the request began.
            self._context.broker.check_origin(self.route.server)
        request, fields = self._request, self._cold.fields
        if self._responder.started == "events":
            # The head of the response is out already, without a Content-Encoding.
            kept = [field for field in fields.headers if field[0] != b"accept-encoding"]
            fields = Fields([*kept, (b"accept-encoding", b"identity")])
            self._context.pings.watch(request)
        self.listening = request.method == b"GET"
        self._response = response = await self._context.upstream.send(
            self.route,
            method=request.method,
            fields=fields,
            body=self._body.content,
            token=token,
            received=sent.response if sent is not None else None,
        )
        self.listening = False
        return response

    async def _relay(self, response: Response) -> None:
        await self._cold.responded(response.status)
        if not _is_event_stream(response):
            # Events may be far apart; any other body must be complete in time.
            response.expire_after(self.route.server.upstream_timeout)
            await self._relay_as_started(response, is_events=False)
            return
        if may_be_pinged(response):
            self._context.pings.watch(self._request)
            self._listen()
        open_streams = self.route.metrics.open_streams
        open_streams.inc()
        try:
            await self._relay_as_started(response, is_events=True)
        finally:
            open_streams.dec()

    async def _relay_as_started(self, response: Response, *, is_events: bool) -> None:
        if self._responder.started == "events":
            self.listening = response.status == 200 and is_events and self._listens()
            await self._responder.relay_as_events(
                response, is_events=is_events, body=self._body, acknowledged=self._cold.acknowledged
            )
            return
        headers = self._cold.response_headers(response_headers(response.headers, self.route.rules))
        if self._request.added_fields:
            headers = without_cors(headers)
        self._remember_session(headers)
        self._responder.streaming = b"content-length" not in dict(headers)
        self.listening = self._responder.streaming and self._listens()
        if self.listening and self._context.draining.done():
            self.end("draining")
        await self._responder.relay(response, headers, self._body)

    def _listen(self) -> None:
        """Let the proxy's own messages for a session come on this stream, if it is one for messages."""
        session_id = next((value for name, value in self._request.headers if name == b"mcp-session-id"), None)
        account = self.route.account
        if self._request.method == b"GET" and session_id and self._context.sessions.elicits(account, session_id):
            self._context.elicitations.listens(account, session_id, self._request)

    def _listens(self) -> bool:
        """Return whether the request opens a stream for messages of the server.

        That is a GET or, in MCP 2026-07-28, ``subscriptions/listen``.
        """
        if self._request.method == b"GET":
            return True
        return needs_inspection(self._body.content) and self._body.has_method("subscriptions/listen")

    def _remember_session(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Remember, when a session begins, whether its client can show URLs to the user."""
        if not needs_inspection(self._body.content):
            return
        if any(message.method == "initialize" and message.url_elicitation for message in self._body.messages):
            for name, value in headers:
                if name == b"mcp-session-id":
                    self._context.sessions.remember(self.route.account, value)

    async def _fail(self, error: McpAuthProxyError) -> None:
        """Answer with the error, and log it."""
        server, journal = self.route.server.name, self._context.broker.journal
        self.failed = True
        if isinstance(error, AuthorizationError) and not isinstance(error, AuthorizationServerUnavailable):
            text = f"Server {server} can't be authorized: {error}"
            self._context.outages.warn(server, str(error), trace_id=self._responder.trace_id)
            journal.request_failed(self.route.account, str(error))
            # HTTP 200, because a 4xx means other things to MCP clients.
            status = 200 if self._body.requests else 502
            code, retry_after = answers.AUTHORIZATION_REQUIRED, error.retry_after
            await self._responder.fail(self._body, status, text, code, retry_after=retry_after)
            return
        if isinstance(error, StoreMigrated):
            # Logged once, when it was noticed: it does not pass.
            logger.debug("server %s: %s", server, error, extra=self._log_extra)
        elif isinstance(error, StoreError):
            self._context.outages.warn(server, str(error), trace_id=self._responder.trace_id, level=logging.ERROR)
        elif isinstance(error, Overloaded):
            self._context.overloaded(server, error.key)
        elif not isinstance(error, BodyTooLarge | SessionNotFound):
            # The others are about the server.
            peer = f" It came from {self._request.client}." if isinstance(error, LoopDetected) else ""
            self._context.outages.warn(server, f"{error}{peer}", trace_id=self._responder.trace_id)
        if isinstance(error, UpstreamError):
            self.route.metrics.upstream_failed(failure_kind(error))
        if isinstance(error, UpstreamUnreachable):
            self._context.outages.note_unreachable(server, str(error))
            journal.request_failed(self.route.account, str(error), unreachable=True)
        elif isinstance(error, UpstreamTimeout | UpstreamProtocolError):
            journal.request_failed(self.route.account, str(error))
        status, retry_after = _status_of(error)
        text = str(error) if isinstance(error, BodyTooLarge) else f"Server {server}: {error}"
        code = answers.NOT_FOUND if isinstance(error, SessionNotFound) else answers.UPSTREAM_FAILED
        await self._responder.fail(self._body, status, text, code, retry_after=retry_after)

    @property
    def _log_extra(self) -> dict[str, Any]:
        return trace.log_extra(self._responder.trace_id)

    # Ending early

    def end(self, reason: End) -> None:
        """Stop the request; its upstream connection is closed at once."""
        if self.ending is None:
            self.ending = reason
            self.task.cancel()

    async def finish_early(self) -> None:
        """Answer a request that was ended, if its client is still there."""
        if self.ending in _END_TEXTS:
            if not self._body.content:
                # It may have been ended before its body was read: the answer should have its id.
                self._body = RequestBody(self._request.peek_body()[:MAX_BODY])
            text = f"Server {self.route.server.name}: {_END_TEXTS[self.ending]}."
            if self.ending == "refused":
                self._request.keep_alive = False
            await self._responder.finish_early(self._body, text, refused=self.ending == "refused")

    def close(self) -> None:
        """Release the upstream's response. Idempotent."""
        self.memory.release()
        self._context.pings.forget(self._request)
        self._context.elicitations.gone(self._request)
        if self._response is not None:
            self._response.close()


def _status_of(error: McpAuthProxyError) -> tuple[int, float | None]:
    """Return the HTTP status that an error is answered with, and the seconds for Retry-After."""
    match error:
        case BodyTooLarge():
            return 413, None
        case SessionNotFound():
            return 404, None
        case LoopDetected():
            return 508, None
        case Overloaded():
            return 503, 5.0
        case AuthorizationServerUnavailable():
            return 503, error.retry_after
        case StoreError():
            return 503, 5.0
        case UpstreamPoolTimeout():
            return 503, 1.0
        case UpstreamTimeout():
            return 504, None
        case _:
            return 502, None


def _fields(response: Response, name: bytes) -> list[bytes]:
    return [value for field, value in response.headers if field == name]


def _is_event_stream(response: Response) -> bool:
    return events.is_stream(response.fields.headers)
