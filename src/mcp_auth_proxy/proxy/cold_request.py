"""What cold start means for one request: its session, and what the proxy does in place of the server or before it."""

from mcp_auth_proxy.errors import OwnSession as OwnSessionId
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_head import Headers
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy import cold_answers, session_ids
from mcp_auth_proxy.proxy.cold_start import ColdStart, missing_list
from mcp_auth_proxy.proxy.headers import encoded_request_fields
from mcp_auth_proxy.proxy.own_sessions import OwnSession, OwnSessions
from mcp_auth_proxy.proxy.responder import Responder
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.messages import RequestBody


class ColdRequest:
    """One request, as far as cold start concerns it."""

    __slots__ = (
        "_cold_start",
        "_elicits",
        "_request",
        "_responder",
        "_route",
        "_sessions",
        "acknowledged",
        "body",
        "fields",
        "session",
    )

    def __init__(
        self,
        request: ClientRequest,
        responder: Responder,
        route: Route,
        *,
        cold_start: ColdStart,
        sessions: OwnSessions,
        elicits: Sessions,
    ) -> None:
        self._request = request
        self._responder = responder
        self._route = route
        self._cold_start = cold_start
        self._sessions = sessions
        self._elicits = elicits
        self.body = RequestBody(b"")
        """What is sent to the server."""
        self.fields = request.fields
        """What is forwarded of the request's fields."""
        self.session: OwnSession | None = None
        """The session of the proxy's own that the request belongs to."""
        self.acknowledged = False
        """Whether the proxy has acknowledged the subscription that the request asks for."""

    async def begin(self, body: RequestBody) -> None:
        """Find the session of the request. Raises SessionNotFound if it is not the caller's, and StoreUnavailable."""
        self.body = body
        try:
            encoded_request_fields(self._request.fields, self._route.rules)
        except OwnSessionId as own:
            self.session = session = await self._sessions.find(own.session_id, self._route)
            if session.elicits:
                self._elicits.remember(self._route.account, session.client_id(self._route.rules))

    @property
    def concerned(self) -> bool:
        """Whether the body has to be parsed: it may be for the proxy itself."""
        return self.session is not None or self._route.marker in self.body.content

    # Before there is a token

    async def answer_at_once(self) -> bool:
        """Answer a request that needs neither a token nor a link; return whether it was one."""
        session = self.session
        if session is None:
            return False
        if self._request.method == b"DELETE":
            await self._sessions.end(session)
            self._request.respond(204, [], b"")
            return True
        return await self._cold_start.answer_at_once(self._request, self.body, self._responder, self._route, session)

    @property
    def listens(self) -> bool:
        """Whether the request waits for consent however long it takes: a GET stream of a session, or a subscription."""
        return self._cold_start.wait(self._request, self.body, self.session, 0.0) == float("inf")

    # With a token

    async def open(self, token: AccessToken | None) -> Response | None:
        """Open the session at the server; return its response if that is a challenge. See ``OwnSessions.open``."""
        session = self.session
        if session is None:
            return None
        response = await self._sessions.open(session, self._route, token)
        if response is None:
            self.fields = session.fields(self._request.fields, self._route.rules)
        return response

    async def answer_instead(self) -> bool:
        """Answer what the server would not understand, now that it can be used; return whether that was done.

        Otherwise ``body`` and ``fields`` are what to send.
        """
        session, responder = self.session, self._responder
        if session is not None:
            await self._tell_changes(session)
            message = missing_list(self.body, session)
            if message is not None:
                await responder.answer(200, encode(cold_answers.response(message, cold_answers.empty_list(message))))
                return True
        if self._responder.started == "events" and self._cold_start.opening(self._request, self.body) is not None:
            self.acknowledged = True
            await responder.send_events(self._cold_start.subscribed_changes(self.body))
        if self._route.marker not in self.body.content:
            return False
        call = await self._cold_start.own_tool(self.body, self._route, session)
        if call is None:
            return False
        server = self._route.server.name
        if call.params.get("name") == cold_answers.authorize_tool(server):
            await self._cold_start.answer_connected(call, responder, self._route)
            return True
        unwrapped = await self._cold_start.unwrapped(call, self.body, self.fields, self._route)
        if unwrapped is None:
            await responder.answer(200, encode(cold_answers.response(call, cold_answers.refused_call(call, server))))
            return True
        self.body, self.fields = unwrapped
        return False

    async def _tell_changes(self, session: OwnSession) -> None:
        """Tell the client that its lists have changed, if this request has a stream that is the best one for it."""
        is_get = self._request.method == b"GET"
        if is_get or (self._responder.started == "events" and not session.listeners):
            told = await self._cold_start.list_changes(session)
            if told:
                await self._responder.send_events(told)

    # The response

    def response_headers(self, headers: Headers) -> Headers:
        """Return the response's fields with the client's session id in place of the server's."""
        if self.session is None:
            return headers
        own = self.session.client_id(self._route.rules)
        return [(name, own if name == session_ids.FIELD else value) for name, value in headers]

    async def responded(self, status: int) -> None:
        """Note the status of the server's response: its session, or that of the client, may have ended."""
        session, method = self.session, self._request.method
        if session is None:
            return
        # A server without session ids means something else by 404, and one without a GET stream may mean that.
        is_gone = status == 404 and method == b"POST" and session.state.upstream_id
        if is_gone or method == b"DELETE":
            await self._sessions.end(session)
