"""Answer in place of a server while its user has not authorized (``authorization.cold_start``).

``cold_answers`` builds the answers; this module decides which request gets one, and begins sessions.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import Account, Catalog
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_head import Fields, Headers
from mcp_auth_proxy.proxy import cold_answers, session_ids
from mcp_auth_proxy.proxy.cold_answers import LISTS
from mcp_auth_proxy.proxy.own_sessions import MAX_INITIALIZE, OwnSession, OwnSessions
from mcp_auth_proxy.proxy.responder import Responder
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.sessions import Sessions
from mcp_auth_proxy.rpc import answers, events, mirrored_fields
from mcp_auth_proxy.rpc.encoding import decode, encode
from mcp_auth_proxy.rpc.messages import Json, Message, RequestBody

LINK_SECONDS = {"initialize": 2.0, "server/discover": 1.0, "tools/list": 3.0}
"""Seconds after the challenge within which these requests are answered, with or without a link."""

LIST_SECONDS = 1.5
"""Seconds that lists of tools wait for consent: some clients give a server 5 seconds in all to start."""

_CONSENT_SECONDS = {"server/discover": 0.5, "tools/list": LIST_SECONDS}
"""Seconds that these requests wait for consent, within the time above. Some authorization servers don't ask a user
again; and a client that gets an error for ``server/discover`` goes on with ``initialize``, which its server may not
know."""


class Catalogs(Protocol):
    """What is remembered of servers."""

    async def get(self, server: ServerSettings, account: Account) -> Catalog | None:
        """Return what is remembered of a server."""

    async def fetched(self, server: ServerSettings, account: Account) -> Catalog | None:
        """Return what is remembered of a server once it was asked after a consent; waits for that, bounded."""


class ColdStart:
    """Answer requests that can't wait for consent."""

    def __init__(self, *, catalogs: Catalogs, sessions: OwnSessions, elicits: Sessions, public_url: str) -> None:
        self.enabled = True
        """Whether new clients get such answers; sessions that were begun go on in any case."""
        self._catalogs = catalogs
        self._sessions = sessions
        self._elicits = elicits
        self._public_url = public_url

    # Before consent

    def link_deadline(self, body: RequestBody, route: Route) -> float | None:
        """Return the seconds after which a request is answered even if there is no link yet; None: it waits."""
        message = _only(body) if self.enabled and not route.server.oauth.grant.unattended else None
        return None if message is None else LINK_SECONDS.get(message.method)

    def wait(
        self, request: ClientRequest, body: RequestBody, session: OwnSession | None, elapsed: float
    ) -> float | None:
        """Return the seconds that a request waits for consent at most; None: as long as any other.

        ``elapsed``: the seconds since its challenge.
        """
        if self.enabled and request.method == b"GET" and _declines_events(request):
            # It is no stream but a probe, as mcp-use makes before it connects.
            return 0.0
        if session is not None and request.method == b"GET":
            return float("inf") if _accepts_events(request) else None
        if self.enabled and _is_batch_of_lists(body):
            return LIST_SECONDS
        message = _only(body) if self.enabled or session is not None else None
        if message is None:
            return None
        if message.method == "subscriptions/listen" and message.modern and _accepts_events(request):
            return float("inf")
        if message.method in _CONSENT_SECONDS:
            return max(0.0, min(_CONSENT_SECONDS[message.method], LINK_SECONDS[message.method] - elapsed))
        return 0.0 if self.stands_in(body) else None

    def stands_in(self, body: RequestBody) -> bool:
        """Return whether a request is one that is answered in place of the server."""
        message = _only(body) if self.enabled else None
        if message is None:
            return self.enabled and _is_batch_of_lists(body)
        return message.method in ("initialize", "server/discover", *LISTS)

    def opening(self, request: ClientRequest, body: RequestBody) -> Json | None:
        """Return the message that is sent at once to a request that waits: the acknowledgment of a subscription."""
        message = _only(body) if self.enabled else None
        if message is None or message.method != "subscriptions/listen" or not message.modern:
            return None
        return cold_answers.acknowledgment(message, _filter(message)) if _accepts_events(request) else None

    async def answer_at_once(
        self, request: ClientRequest, body: RequestBody, responder: Responder, route: Route, session: OwnSession
    ) -> bool:
        """Answer what needs neither the server nor a link, in a session of the proxy's own; return whether it did."""
        if request.method != b"POST" or not body.messages:
            return False
        if not body.requests:
            request.respond(202, [], b"")
            return True
        if not all(message.method in _AT_ONCE for message in body.requests):
            return False
        catalog = await self._catalogs.get(route.server, route.account)
        levels = [message.params.get("level") for message in body.requests if message.method == "logging/setLevel"]
        known = [level for level in levels if isinstance(level, str) and level in _LOG_LEVELS]
        # Once, however many there are: it is a write to the store.
        if known and known[-1] != session.state.log_level:
            await self._sessions.set_log_level(session, known[-1])

        def answer(message: Message) -> Json:
            result: Json = {}
            if message.method in LISTS:
                result = cold_answers.list_result(message, route.account, catalog, None)
            return cold_answers.response(message, result)

        await responder.answer(200, answers.answer_all(body, answer, lambda: answer(body.requests[0])))
        return True

    async def answer(self, link: str | None, body: RequestBody, responder: Responder, route: Route) -> bool:
        """Answer a request in place of the server, if it is one of those; return whether it did.

        ``link``: where its user authorizes; None if there is none yet. Raises StoreUnavailable.
        """
        if not self.stands_in(body):
            return False
        address = link or self._address(route.account)
        shown = address if route.may_authorize else None
        account = route.account
        headers: Headers = []
        result: Json | None = None
        catalog = await self._catalogs.get(route.server, route.account)
        message = _only(body)
        if message is None:

            def listed(each: Message) -> Json:
                found = cold_answers.list_result(each, account, catalog, shown) if each.method in LISTS else {}
                return cold_answers.response(each, found)

            await responder.answer(200, answers.answer_all(body, listed, lambda: listed(body.requests[0])))
            return True
        match message.method:
            case "initialize" if len(body.content) <= MAX_INITIALIZE:
                result, session = await self._begin(message, body, route, catalog, shown)
                headers.append((session_ids.FIELD, session.client_id(route.rules)))
            case "server/discover":
                result = cold_answers.discover_result(account, catalog, shown)
            case method if method in LISTS:
                result = cold_answers.list_result(message, account, catalog, shown)
        if result is None and (link is not None or message.method != "server/discover"):
            return False
        document = cold_answers.response(message, result) if result is not None else None
        if document is None:
            # A client that probes goes on with `initialize` only once it has an answer.
            text, server = cold_answers.link_text(account, shown), route.server.name
            document = answers.failure(message, text, code=answers.AUTHORIZATION_REQUIRED, server=server)
        await responder.answer(200, encode(document), headers)
        return True

    async def _begin(
        self, message: Message, body: RequestBody, route: Route, catalog: Catalog | None, link: str | None
    ) -> tuple[Json, OwnSession]:
        version = cold_answers.announced_version(catalog, message.params.get("protocolVersion"))
        session = await self._sessions.begin(route, message, body.content, announced=version)
        if message.url_elicitation:
            self._elicits.remember(route.account, session.client_id(route.rules))
        return cold_answers.initialize_result(route.account, version, catalog, link), session

    def _address(self, account: Account) -> str:
        """Return the page at which a user can authorize without a link."""
        return f"{self._public_url}/{account.shown}/mcp"

    # After consent

    async def own_tool(self, body: RequestBody, route: Route, session: OwnSession | None) -> Message | None:
        """Return the call of one of the proxy's own tools; None if it is none, or if the server has such a tool."""
        listed = session is not None or (self.enabled and not route.server.oauth.grant.unattended)
        message = _only(body) if listed else None
        if message is None or message.method != "tools/call":
            return None
        name, server = message.params.get("name"), route.server.name
        if name not in (cold_answers.authorize_tool(server), cold_answers.call_tool(server)):
            return None
        catalog = await self._catalogs.get(route.server, route.account)
        tools = catalog.lists.get("tools", ()) if catalog is not None else ()
        return None if any(tool.get("name") == name for tool in tools) else message

    async def answer_connected(self, message: Message, responder: Responder, route: Route) -> None:
        """Answer the tool that waits for consent."""
        catalog = await self._catalogs.fetched(route.server, route.account)
        tools = catalog.lists.get("tools") if catalog is not None else None
        count = None if tools is None else len(tools)
        result = cold_answers.connected_result(message, route.account, count)
        await responder.answer(200, encode(cold_answers.response(message, result)))

    async def unwrapped(
        self, message: Message, body: RequestBody, fields: Fields, route: Route
    ) -> tuple[RequestBody, Fields] | None:
        """Return the call that a call of ``call_{server}`` stands for; None if it names no tool, or can't be sent."""
        wanted = message.params.get("arguments")
        name = wanted.get("name") if isinstance(wanted, Mapping) else None
        if not isinstance(name, str) or not isinstance(wanted, Mapping):
            return None
        arguments = wanted.get("arguments")
        document = decode(body.content)
        document["params"] = {**document["params"], "name": name, "arguments": arguments}
        if not isinstance(arguments, Mapping):
            del document["params"]["arguments"]
        if message.modern:
            catalog = await self._catalogs.fetched(route.server, route.account)
            fields = Fields(_mirrored(fields.headers, document["params"], _find_tool(catalog, name)))
        try:
            return RequestBody(encode(document)), fields
        except (ValueError, RecursionError):
            # It could be read, but not written: a number that is too large was read as infinity.
            return None

    async def list_changes(self, session: OwnSession) -> bytes:
        """Return the events that tell a client that its lists have changed; empty if it was told before."""
        if not await self._sessions.take_list_changes(session):
            return b""
        return b"".join(events.message_event(encode(message)) for message in cold_answers.list_changes())

    def subscribed_changes(self, body: RequestBody) -> bytes:
        """Return the events that tell a subscriber that the lists have changed that it asked for."""
        message = body.requests[0]
        changes = cold_answers.subscribed_changes(message, _filter(message))
        return b"".join(events.message_event(encode(change)) for change in changes)


_AT_ONCE = frozenset({"ping", "logging/setLevel", *LISTS} - {"tools/list"})
"""What is answered in a session of the proxy's own without asking anybody."""

_LOG_LEVELS = frozenset({"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"})
"""MCP, server/utilities/logging. Others are not kept."""


def _is_batch_of_lists(body: RequestBody) -> bool:
    """Return whether a batch (MCP 2025-03-26) asks for lists, and for nothing that has to wait."""
    methods = {message.method for message in body.requests} if body.is_batch else set()
    return bool(methods.intersection(LISTS)) and methods <= {"ping", *LISTS}


def missing_list(body: RequestBody, session: OwnSession) -> Message | None:
    """Return a request for a list that the server of an opened session does not have."""
    message = _only(body)
    if message is None or message.method not in LISTS or not session.state.opened:
        return None
    capability = cold_answers.CAPABILITIES[LISTS[message.method]]
    return None if capability in session.state.lists else message


def _only(body: RequestBody) -> Message | None:
    """Return the only request of a body; None if there is none, or if it is a batch."""
    requests = body.requests
    return requests[0] if len(requests) == 1 and not body.is_batch else None


def _filter(message: Message) -> Mapping[str, Any]:
    wanted = message.params.get("notifications")
    return wanted if isinstance(wanted, Mapping) else {}


def _find_tool(catalog: Catalog | None, name: str) -> Mapping[str, Any] | None:
    tools = catalog.lists.get("tools", ()) if catalog is not None else ()
    return next((tool for tool in tools if tool.get("name") == name), None)


def _mirrored(headers: Headers, params: Mapping[str, Any], tool: Mapping[str, Any] | None) -> Headers:
    """Return the fields of a call of another tool than the client named (MCP 2026-07-28, Streamable HTTP)."""
    try:
        annotations = mirrored_fields.annotations_of(tool.get("inputSchema") if tool is not None else None)
    except ValueError:
        annotations = {}
    new = mirrored_fields.request_fields("tools/call", params, "", annotations)
    replaced = {name for name, _ in new}
    kept = [field for field in headers if field[0] not in replaced and not field[0].startswith(b"mcp-param-")]
    return [*kept, *new]


def _accepts_events(request: ClientRequest) -> bool:
    return any(events.CONTENT_TYPE in value for name, value in request.headers if name == b"accept")


def _declines_events(request: ClientRequest) -> bool:
    accepted = [value for name, value in request.headers if name == b"accept"]
    return bool(accepted) and not any(kind in value for value in accepted for kind in (events.CONTENT_TYPE, b"*/*"))
