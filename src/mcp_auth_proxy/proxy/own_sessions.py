"""The MCP sessions that the proxy began itself, because a client could not wait until its user had authorized.

After consent the proxy opens the session at the server with the client's own ``initialize``. From then on requests are
forwarded with the server's session id in place of the client's. Sessions are rows of the store, so any process on it
can go on with one.
"""

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from mcp_auth_proxy.broker.matching import upstream_of
from mcp_auth_proxy.errors import SessionNotFound, UpstreamError, UpstreamProtocolError
from mcp_auth_proxy.models import AccessToken, Account
from mcp_auth_proxy.net.http_head import Fields, Headers
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy import cold_answers, session_ids
from mcp_auth_proxy.proxy.headers import FieldRules
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.server_client import bounded, read_answer
from mcp_auth_proxy.proxy.session_ids import OWN_PREFIX
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.rpc.encoding import encode
from mcp_auth_proxy.rpc.messages import Message, RequestBody, is_revision
from mcp_auth_proxy.store.mcp_sessions import McpSessions, SessionState

SESSIONS_KEPT = 1_000
"""Sessions that are kept in memory; others are read from the store again."""

MAX_INITIALIZE = 64 * 1024
"""Bytes of the longest ``initialize`` that a session is begun with."""

OPEN_SECONDS = 30.0
"""Seconds that a server may take to send its answer to ``initialize``."""

Field = tuple[bytes, bytes]

_VERSION = b"mcp-protocol-version"
_JSON: Headers = [(b"content-type", b"application/json"), (b"accept", b"application/json, text/event-stream")]


class OwnSession:
    """One session. ``id`` is the proxy's, without the signature that the client's has if callers are identified."""

    def __init__(self, session_id: str, account: Account, upstream: str, state: SessionState) -> None:
        self.id = session_id
        self.account = account
        self.upstream = upstream
        """The URL of the server that it is a session with."""
        self.state = state
        self.lock = asyncio.Lock()
        self.listeners = 0
        """GET streams of the client that wait for consent in this process."""
        self._fields: tuple[Fields, SessionState, Fields] | None = None
        self.elicits = any(message.url_elicitation for message in RequestBody(state.initialize).messages)
        """Whether the client declared that it can show URLs to the user."""

    def client_id(self, rules: FieldRules) -> bytes:
        """Return the session's id as its client has it."""
        own = self.id.encode("ascii")
        return own if rules.sessions is None else rules.sessions.sign(own)

    def fields(self, fields: Fields, rules: FieldRules) -> Fields:
        """Return a request's fields with the server's session id and revision in place of the client's."""
        known = self._fields
        if known is None or known[0] is not fields or known[1] is not self.state:
            self._fields = known = (fields, self.state, Fields(self._replaced(fields.headers, rules)))
        return known[2]

    def _replaced(self, headers: Headers, rules: FieldRules) -> Headers:
        state = self.state
        older = state.negotiated and state.negotiated != state.announced
        kept: Headers = []
        for name, value in headers:
            if name == session_ids.FIELD:
                upstream_id = state.upstream_id.encode("latin-1")
                if upstream_id:
                    kept.append((name, session_ids.for_client(upstream_id, rules.sessions)))
            elif name != _VERSION or not older:
                kept.append((name, value))
        if older:
            kept.append((_VERSION, state.negotiated.encode("latin-1")))
        return kept


class OwnSessions:
    """The sessions that this process uses. Belongs to one event loop."""

    def __init__(self, store: McpSessions, upstream: UpstreamClient, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._upstream = upstream
        self._clock = clock
        self._sessions: OrderedDict[str, OwnSession] = OrderedDict()

    async def begin(self, route: Route, message: Message, content: bytes, *, announced: str) -> OwnSession:
        """Begin a session for a client that has sent ``initialize``, and store it. Raises StoreUnavailable."""
        session_id = OWN_PREFIX.decode() + secrets.token_urlsafe(24)
        state = SessionState(initialize=content, announced=announced)
        upstream = upstream_of(route.server)
        await self._store.add(session_id, route.account, state, upstream=upstream, now=self._clock())
        return self._keep(OwnSession(session_id, route.account, upstream, state))

    async def find(self, session_id: bytes, route: Route) -> OwnSession:
        """Return the session of an account. Raises SessionNotFound and StoreUnavailable."""
        name, upstream = session_id.decode("latin-1"), upstream_of(route.server)
        session = self._sessions.get(name)
        if session is None:
            state = await self._store.find(name, route.account, upstream=upstream)
            if state is None:
                raise SessionNotFound
            session = self._sessions.get(name) or self._keep(OwnSession(name, route.account, upstream, state))
        if session.account != route.account or session.upstream != upstream:
            raise SessionNotFound
        self._sessions.move_to_end(name)
        return session

    async def end(self, session: OwnSession) -> None:
        """Forget a session. Raises StoreUnavailable."""
        self._sessions.pop(session.id, None)
        await self._store.end(session.id)

    async def set_log_level(self, session: OwnSession, level: str) -> None:
        """Remember what to ask the server for when the session is opened. Raises StoreUnavailable."""
        await self._change(session, lambda state: replace(state, log_level=level))

    async def take_list_changes(self, session: OwnSession) -> bool:
        """Return whether the client has still to be told that the lists have changed; True only once.

        Raises StoreUnavailable.
        """
        taken = False

        def take(state: SessionState) -> SessionState:
            nonlocal taken
            taken = state.announce_lists
            return replace(state, announce_lists=False)

        if session.state.announce_lists:
            await self._change(session, take)
        return taken

    async def open(self, session: OwnSession, route: Route, token: AccessToken | None) -> Response | None:
        """Open a session at its server, if no process has done so.

        Returns the server's response if that is a challenge. Raises SessionNotFound if the server refuses
        ``initialize``: the session has ended then. Raises UpstreamError and StoreUnavailable.
        """
        async with session.lock:
            if session.state.opened:
                return None
            stored = await self._store.find(session.id, session.account, upstream=upstream_of(route.server))
            if stored is None:
                raise SessionNotFound
            session.state = stored
            if stored.opened:
                return None
            return await self._open(session, route, token)

    async def _open(self, session: OwnSession, route: Route, token: AccessToken | None) -> Response | None:
        message = RequestBody(session.state.initialize).messages[0]
        response = await self._send(route, session.state.initialize, token)
        if response.status in (401, 403):
            return response
        try:
            result = await self._read_result(session, message, response)
        finally:
            response.close()
        upstream_id = next((value for name, value in response.headers if name == session_ids.FIELD), b"")
        version = result.get("protocolVersion")
        opened = replace(
            session.state,
            opened=True,
            upstream_id=upstream_id.decode("latin-1"),
            negotiated=version if is_revision(version) else "",
            lists=cold_answers.lists_of(result),
        )

        # The server has to know before anybody uses the session: other processes do so as soon as it is stored.
        await self._notify(opened, route, token, {"method": "notifications/initialized"})
        level = opened.log_level
        if level and "logging" in (result.get("capabilities") or {}):
            message_id = "mcp-auth-proxy-1"
            params = {"level": level}
            await self._notify(opened, route, token, {"id": message_id, "method": "logging/setLevel", "params": params})
        is_first = False

        def keep_first(state: SessionState) -> SessionState:
            nonlocal is_first
            is_first = not state.opened
            return opened if is_first else state

        await self._change(session, keep_first)
        if not is_first and upstream_id:
            await self._end_superfluous(opened, route, token)
        return None

    async def _end_superfluous(self, opened: SessionState, route: Route, token: AccessToken | None) -> None:
        """End a session at the server that another process was faster to open; otherwise it would expire there."""
        fields = self._fields(opened, route)
        with contextlib.suppress(UpstreamError):
            response = await self._upstream.send(route, method=b"DELETE", fields=Fields(fields), body=b"", token=token)
            response.close()

    async def _read_result(self, session: OwnSession, message: Message, response: Response) -> Mapping[str, Any]:
        if response.status >= 500 or response.status in (408, 429):
            raise UpstreamProtocolError(f"it answers {response.status} to initialize.")
        result = None
        if 200 <= response.status < 300:
            response.expire_after(OPEN_SECONDS)
            answer = await read_answer(response, message.id, bounded(response))
            result = answer.get("result")
        if not isinstance(result, Mapping):
            # It may speak revisions without sessions alone. The client finds out when it begins a new one.
            await self.end(session)
            raise SessionNotFound
        return result

    async def _notify(
        self, state: SessionState, route: Route, token: AccessToken | None, message: Mapping[str, object]
    ) -> None:
        fields = self._fields(state, route)
        response = await self._send(route, encode({"jsonrpc": "2.0", **message}), token, fields)
        response.close()

    @staticmethod
    def _fields(state: SessionState, route: Route) -> Headers:
        """Return what names a session at its server."""
        fields = [(_VERSION, (state.negotiated or state.announced).encode("latin-1"))]
        if state.upstream_id:
            upstream_id = state.upstream_id.encode("latin-1")
            fields.append((session_ids.FIELD, session_ids.for_client(upstream_id, route.rules.sessions)))
        return fields

    async def _send(self, route: Route, body: bytes, token: AccessToken | None, more: Iterable[Field] = ()) -> Response:
        fields = Fields([*_JSON, *more])
        return await self._upstream.send(route, method=b"POST", fields=fields, body=body, token=token)

    async def _change(self, session: OwnSession, change: Callable[[SessionState], SessionState]) -> None:
        changed = await self._store.change(session.id, session.account, change, now=self._clock())
        if changed is None:
            self._sessions.pop(session.id, None)
            raise SessionNotFound
        session.state = changed

    def _keep(self, session: OwnSession) -> OwnSession:
        self._sessions[session.id] = session
        if len(self._sessions) > SESSIONS_KEPT:
            self._sessions.popitem(last=False)
        return session
