"""Hold a request while a user authorizes: for how long, what the client sees meanwhile, and what it gets in the end."""

import asyncio
import contextlib

from mcp_auth_proxy.broker import Broker, PendingAuthorization
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.proxy.cold_start import ColdStart
from mcp_auth_proxy.proxy.declines import Declines
from mcp_auth_proxy.proxy.elicitations import Elicitations
from mcp_auth_proxy.proxy.own_sessions import OwnSession
from mcp_auth_proxy.proxy.responder import Responder
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.rpc import answers, events
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.messages import RequestBody

FOREVER = float("inf")

COMMENT_INTERVAL = 5.0
"""Seconds between comments on a held response: Python clients give up after 300 s of silence, others earlier."""

LOOK_INTERVAL = 0.5
"""Seconds between looks of a stream whose flow has failed for a later one."""

DISCOVER_WAIT = 8.0
"""Seconds that ``server/discover`` is held at most: clients probe with a time-out of 10 s."""

_WAITING = b"waiting for the user to authorize"

RETRY_WAIT = 45.0
"""Seconds that a retry after ``input_required`` is held at least: if it were answered at once, clients would spin."""


class ConsentWait:
    """Hold requests until the user has authorized. Each costs a timer and, if it may be an event stream, comments."""

    def __init__(
        self,
        *,
        broker: Broker,
        sessions: Sessions,
        draining: asyncio.Future[None],
        wait: float,
        cold_start: ColdStart,
        elicitations: Elicitations,
    ) -> None:
        """``draining`` is done when the proxy begins to shut down; ``wait`` is in seconds.

        ``cold_start`` answers in place of the server what can't wait.
        """
        self._cold_start = cold_start
        self._elicitations = elicitations
        self._declines = Declines()
        self._broker = broker
        self._sessions = sessions
        self._draining = draining
        self._wait = wait

    async def token(
        self,
        pending: PendingAuthorization,
        request: ClientRequest,
        body: RequestBody,
        responder: Responder,
        route: Route,
        *,
        session: OwnSession | None = None,
        at_once: bool = False,
        elapsed: float = 0.0,
    ) -> AccessToken | None:
        """Return the token once the user has authorized; None if the request was answered instead.

        ``session``: the one of the proxy's own that the request belongs to. ``at_once``: answer without waiting,
        because too many requests wait already. ``elapsed``: the seconds since the server's challenge.
        Raises AuthorizationError if the authorization failed or the user declined, and StoreError.
        """
        if not body.messages and body.error is not None and _should_be_json(request):
            # The request stays invalid whatever the user decides.
            code, text = body.error
            await responder.fail(body, 400, text, code)
            return None
        if body.consent_action in ("decline", "cancel"):
            self._declines.add(route.principal, route.server.name)
        limit = 0.0 if at_once else self._limit(request, body, session, elapsed)
        if not pending.done and limit != FOREVER and await self._answer_declined(body, responder, route):
            return None
        may_stream = _may_stream(request, body)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        refused = self._broker.token_nowait(route.account)[1]
        opening = self._cold_start.opening(request, body)
        if opening is not None and not at_once:
            await responder.send_event(encode(opening))
        elif limit == FOREVER and may_stream:
            # So that the client knows at once that its stream is open.
            await responder.keep_alive(_WAITING)
            if session is not None:
                self._note_stream(request, session, route)
        while True:
            left = deadline - loop.time()
            if deadline == FOREVER and not body.requests:
                pending, token = await self._listen(pending, refused, route)
            else:
                token = await pending.wait(min(COMMENT_INTERVAL, left), self._draining)
                if token is None and deadline == FOREVER:
                    # Its flow may have been dropped, and the user have consented to a later one.
                    pending, token = self._broker.pending(route.account) or pending, self._newer(route, refused)
            if token is not None:
                return token
            if deadline <= loop.time() or self._draining.done():
                await self._answer_with_link(await self._broker.fresh_link(pending), request, body, responder, route)
                return None
            if may_stream:
                await responder.keep_alive(_WAITING)

    def _note_stream(self, request: ClientRequest, session: OwnSession, route: Route) -> None:
        """Let the end of an elicitation be told on a held stream: the server may have no stream to go on with."""
        if session.elicits:
            self._elicitations.listens(route.account, session.client_id(route.rules), request)

    def _newer(self, route: Route, refused: AccessToken | None) -> AccessToken | None:
        """Return the token that is there now, unless it is the one that the server does not take."""
        token = self._broker.token_nowait(route.account)[1]
        return None if token is None or (refused and token.generation == refused.generation) else token

    async def _listen(
        self, pending: PendingAuthorization, refused: AccessToken | None, route: Route
    ) -> tuple[PendingAuthorization, AccessToken | None]:
        """Wait for ``COMMENT_INTERVAL`` at most; return what to wait for then, and the token if there is one.

        A stream outlives its flow: the user may decline, and consent to a later one. It begins none itself.
        ``refused``: the token that the server does not take.
        """
        token: AccessToken | None = None
        if not pending.done:
            with contextlib.suppress(AuthorizationError):
                token = await pending.wait(COMMENT_INTERVAL, self._draining)
            if token is not None:
                return pending, token
        loop = asyncio.get_running_loop()
        deadline = loop.time() + COMMENT_INTERVAL
        while True:
            pending = self._broker.pending(route.account) or pending
            token = await self._broker.token(route.account)
            if token is not None and (refused is None or token.generation != refused.generation):
                return pending, token
            if not pending.done or loop.time() > deadline or self._draining.done():
                return pending, None
            await asyncio.wait([self._draining], timeout=LOOK_INTERVAL)

    def _limit(self, request: ClientRequest, body: RequestBody, session: OwnSession | None, elapsed: float) -> float:
        cold = self._cold_start.wait(request, body, session, elapsed)
        if cold is not None:
            return cold if cold == FOREVER else min(cold, self._wait)
        limit = max(self._wait, RETRY_WAIT) if body.consent_action else self._wait
        return min(limit, DISCOVER_WAIT) if body.has_method("server/discover") else limit

    async def answer_unread(
        self, pending: PendingAuthorization, request: ClientRequest, responder: Responder, route: Route
    ) -> None:
        """Answer a request whose body there is no memory for. Raises AuthorizationError and StoreError."""
        newest = await self._broker.fresh_link(pending)
        await self._answer_with_link(newest, request, RequestBody(b""), responder, route)

    async def _answer_with_link(
        self,
        pending: PendingAuthorization,
        request: ClientRequest,
        body: RequestBody,
        responder: Responder,
        route: Route,
    ) -> None:
        link, server, name = pending.link, responder.server, route.account.shown
        if await self._cold_start.answer(link, body, responder, route):
            return
        if not route.may_authorize:
            await _answer_without_link(body, responder, name)
            return
        if not body.requests:
            text = answers.authorization_text(name, link)
            await responder.fail(body, 503, text, answers.AUTHORIZATION_REQUIRED, retry_after=5.0, link=link)
            return
        session = next((value for name, value in request.headers if name == b"mcp-session-id"), None)
        elicits = self._sessions.elicits(route.account, session)
        if elicits and session is not None and not any(message.modern for message in body.requests):
            self._elicitations.asked(route.account, session, pending.flow.id)
        document = answers.answer_all(
            body,
            lambda message: answers.authorization_needed(
                message,
                server=server,
                name=name,
                link=link,
                elicitation_id=pending.flow.id,
                session_elicits=elicits,
                trace_id=responder.trace_id,
            ),
            lambda: answers.failure(
                None,
                answers.authorization_text(name, link),
                code=answers.AUTHORIZATION_REQUIRED,
                server=server,
                link=link,
                trace_id=responder.trace_id,
            ),
        )
        await responder.answer(200, document)

    async def _answer_declined(self, body: RequestBody, responder: Responder, route: Route) -> bool:
        """Answer a request of a user who has just declined; return whether that was done.

        What cold start answers goes on: it asks for nothing.
        """
        server, name = route.server.name, route.account.shown
        if not self._declines.has(route.principal, server) or self._cold_start.stands_in(body):
            return False
        document = answers.answer_all(
            body,
            lambda message: answers.declined(message, name, server=server, trace_id=responder.trace_id),
            lambda: answers.failure(
                None,
                answers.declined_text(name),
                code=answers.AUTHORIZATION_REQUIRED,
                server=server,
                trace_id=responder.trace_id,
            ),
        )
        await responder.answer(200 if body.requests else 503, document)
        return True


async def _answer_without_link(body: RequestBody, responder: Responder, name: str) -> None:
    """Answer a caller who can't authorize: an admin has to."""
    server, text = responder.server, answers.ask_admin_text(name)
    if not body.requests:
        await responder.fail(body, 503, text, answers.AUTHORIZATION_REQUIRED, retry_after=5.0)
        return
    document = answers.answer_all(
        body,
        lambda message: answers.admin_needed(message, server=server, name=name, trace_id=responder.trace_id),
        lambda: answers.failure(
            None, text, code=answers.AUTHORIZATION_REQUIRED, server=server, trace_id=responder.trace_id
        ),
    )
    await responder.answer(200, document)


def _should_be_json(request: ClientRequest) -> bool:
    """Return whether the body should be JSON; False if it has a content coding, which only the server undoes."""
    if request.method != b"POST":
        return False
    return not any(n == b"content-encoding" and v.lower() != b"identity" for n, v in request.headers)


def _may_stream(request: ClientRequest, body: RequestBody) -> bool:
    """Return whether the response may begin as an event stream before the upstream has answered.

    The response to ``initialize`` may not: its head has the session id, which comes from the upstream.
    """
    accepts = any(events.CONTENT_TYPE in value for name, value in request.headers if name == b"accept")
    if request.method == b"GET":
        return accepts
    requests = body.requests
    return accepts and bool(requests) and all(message.method != "initialize" for message in requests)
