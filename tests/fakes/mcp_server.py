"""A protected MCP server in plain ASGI that speaks all protocol revisions, with options that tests set."""

import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from fakes.http_exchange import Channel, FakeResponse, FakeResponses, RecordedRequest, RequestLog, changed, resolve, sse
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationServer
from mcp_auth_proxy.cli.demo_servers.ledger import Token
from mcp_auth_proxy.cli.demo_servers.local_server import LocalServer, serve

MODERN = "2026-07-28"
WELL_KNOWN = "/.well-known/oauth-protected-resource"
CHUNK = b"x" * 65536
JSON = (("content-type", "application/json"),)


@dataclass
class Session:
    """One ``Mcp-Session-Id`` and its open GET streams."""

    id: str
    streams: list[Channel] = field(default_factory=list)


class FakeMcpServer:
    """Serves a few tools, and whatever its attributes say; a test may change them at any time.

    ``answers`` replaces the response to requests whose token is valid, by ``tools/call:NAME``, JSON-RPC method or HTTP
    method; ``script`` does so for a few requests only. ``intercept`` is asked before any check.
    """

    def __init__(self, origin: str, authorization_servers: Sequence[AuthorizationServer], **options: Any) -> None:
        self.origin = origin
        self.authorization_servers = list(authorization_servers)
        """Named in the metadata, and asked in process whether a token is valid."""
        self.local: LocalServer
        self.log = RequestLog()
        self.path = "/mcp"
        self.protected = True
        self.checks_audience = True
        """False: a token for another resource, or for none, is accepted too."""
        self.scopes: tuple[str, ...] = ()
        """Scopes that every request needs."""
        self.step_up: dict[str, tuple[str, ...]] = {}
        """Scopes needed in addition, by ``tools/call:NAME`` or JSON-RPC method."""
        self.challenge_scopes: tuple[str, ...] | None = None
        """The ``scope`` of a 401; None: ``scopes``, omitted if there are none."""
        self.endless_401 = False
        self.endless_403: Literal["", "same", "growing"] = ""
        """Always answer ``insufficient_scope``: for the same scope, or for a new one each time."""
        self.challenges: dict[int, list[str]] = {}
        """Raw WWW-Authenticate values by status (401, 403), instead of the usual one; [] sends none."""
        self.challenge_names_metadata = True
        self.metadata_at: set[Literal["inserted", "root"]] = {"inserted"}
        self.metadata_changes: dict[str, object] = {}
        self.metadata_answer: FakeResponses | None = None
        self.answer_as: Literal["json", "sse"] = "json"
        self.sessions_on = False
        """True: ``initialize`` returns an Mcp-Session-Id, which later requests need (2025 revisions)."""
        self.get_stream = True
        self.modern = True
        """False: 2026-07-28 is not supported."""
        self.response_headers: tuple[tuple[str, str], ...] = ()
        """Fields added to every JSON-RPC response, such as Set-Cookie."""
        self.intercept: Callable[[RecordedRequest], FakeResponse | None] | None = None
        self.answers: dict[str, FakeResponses] = {}
        self.sessions: dict[str, Session] = {}
        self._scripts: dict[str, list[FakeResponse]] = {}
        self._refused = 0
        for name, value in options.items():
            if not hasattr(self, name):
                raise TypeError(f"no knob {name}")
            setattr(self, name, value)

    @classmethod
    @asynccontextmanager
    async def running(
        cls, *authorization_servers: AuthorizationServer, port: int = 0, **options: Any
    ) -> AsyncIterator[Self]:
        """Run a server on loopback until the block ends."""
        made: list[Self] = []

        def make(origin: str) -> ASGIApp:
            made.append(cls(origin, authorization_servers, **options))
            return made[0]

        async with serve(make, port=port) as local:
            made[0].local = local
            yield made[0]

    @property
    def url(self) -> str:
        """Return the URL of the MCP endpoint, which is the resource of its tokens."""
        return f"{self.origin}{self.path}"

    @property
    def requests(self) -> list[RecordedRequest]:
        return self.log.requests

    def calls(self, key: str = "") -> list[RecordedRequest]:
        """Return requests to the MCP endpoint, all or of one JSON-RPC method, ``tools/call:NAME`` or HTTP method."""
        return [r for r in self.requests if r.path == self.path and (not key or key in _keys(r))]

    @property
    def bearers(self) -> list[str | None]:
        """Return the bearer token of every request to the MCP endpoint, in order."""
        return [received.bearer for received in self.calls()]

    @property
    def metadata_requests(self) -> list[RecordedRequest]:
        return [received for received in self.requests if received.path.startswith(WELL_KNOWN)]

    def script(self, key: str, *answers: FakeResponse) -> None:
        """Answer the next requests of this kind with these responses, in order; then as usual."""
        self._scripts.setdefault(key, []).extend(answers)

    def push(self, message: Mapping[str, object]) -> int:
        """Send a server-sent event on every open GET stream; return their number."""
        streams = [stream for session in self.sessions.values() for stream in session.streams]
        for stream in streams:
            stream.event(message)
        return len(streams)

    def end_sessions(self) -> None:
        """End every session: a request with its id is answered 404."""
        for session in self.sessions.values():
            for stream in session.streams:
                stream.close()
        self.sessions.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = await RecordedRequest.read(scope, receive)
        self.log.add(received)
        answer = self._answer(received)
        await answer.deliver(received, receive, send, self.local.abort)

    def _answer(self, received: RecordedRequest) -> FakeResponse:
        if self.intercept is not None and (intercepted := self.intercept(received)) is not None:
            return intercepted
        if received.path.startswith(WELL_KNOWN):
            return self._metadata(received)
        if received.path != self.path:
            return FakeResponse.json({"error": "not found"}, 404)
        return self._challenge(received) or self._programmed(received) or self._speak(received)

    def _programmed(self, received: RecordedRequest) -> FakeResponse | None:
        for key in _keys(received):
            if self._scripts.get(key):
                return self._scripts[key].pop(0)
            answer = resolve(self.answers.get(key), received)
            if answer is not None:
                return answer
        return None

    # protection

    def _metadata(self, received: RecordedRequest) -> FakeResponse:
        """Serve the protected resource metadata (RFC 9728 §3)."""
        places = {"inserted": f"{WELL_KNOWN}{self.path}", "root": WELL_KNOWN}
        answer = resolve(self.metadata_answer, received)
        if answer is not None:
            return answer
        if received.path not in {places[place] for place in self.metadata_at}:
            return FakeResponse.json({"error": "not found"}, 404)
        document: dict[str, object] = {
            "resource": self.url,
            "authorization_servers": [server.issuer for server in self.authorization_servers],
        }
        return FakeResponse.json(changed(document, self.metadata_changes))

    def find_token(self, bearer: str | None) -> Token | None:
        """Return the token if one of the authorization servers finds it valid and it is for this resource."""
        for server in self.authorization_servers:
            token = server.ledger.token(bearer or "")
            if token is not None and (token.resource == self.url or not self.checks_audience):
                return token
        return None

    def _challenge(self, received: RecordedRequest) -> FakeResponse | None:
        if not self.protected:
            return None
        token = None if self.endless_401 else self.find_token(received.bearer)
        if token is None:
            scopes = self.scopes if self.challenge_scopes is None else self.challenge_scopes
            return self._refuse(401, "invalid_token" if received.bearer else "", scopes)
        needed = dict.fromkeys(self.scopes)
        for key in _keys(received):
            needed |= dict.fromkeys(self.step_up.get(key, ()))
        if self.endless_403:
            needed["more" if self.endless_403 == "same" else f"more:{self._refused}"] = None
        elif set(needed) <= set(token.scopes):
            return None
        return self._refuse(403, "insufficient_scope", tuple(needed))

    def _refuse(self, status: int, error: str, scopes: tuple[str, ...]) -> FakeResponse:
        self._refused += 1
        params = {"error": error, "scope": " ".join(scopes)}
        if self.challenge_names_metadata:
            place = f"{WELL_KNOWN}{self.path}" if "inserted" in self.metadata_at else WELL_KNOWN
            params["resource_metadata"] = f"{self.origin}{place}"
        ours = "Bearer " + ", ".join(f'{name}="{value}"' for name, value in params.items() if value)
        values = self.challenges.get(status, [ours.strip()])
        challenges = tuple(("www-authenticate", value) for value in values)
        return FakeResponse(status=status, headers=(*challenges, *JSON), body=b'{"error":"challenge of the upstream"}')

    # MCP

    def _speak(self, received: RecordedRequest) -> FakeResponse:
        if received.method == "GET":
            return self._open_stream(received)
        if received.method == "DELETE":
            return self._end_session(received)
        message = received.message
        if received.method != "POST" or not message:
            return FakeResponse.json(_error(None, -32700, "not a JSON-RPC message"), 400)
        modern = received.header("mcp-protocol-version") == MODERN
        if modern and not self.modern:
            return FakeResponse.json(
                _error(message.get("id"), -32000, "Bad Request: Unsupported protocol version"), 400
            )
        if self.sessions_on and not modern and received.rpc_method != "initialize":
            refusal = self._session_refusal(received)
            if refusal is not None:
                return refusal
        if "id" not in message or "method" not in message:
            return FakeResponse(status=202)
        return self._respond(received, modern=modern)

    def _session_refusal(self, received: RecordedRequest) -> FakeResponse | None:
        session = received.header("mcp-session-id")
        if session is None:
            return FakeResponse.json(_error(received.message.get("id"), -32600, "Bad Request: Missing session ID"), 400)
        if session not in self.sessions:
            return FakeResponse.json(_error(received.message.get("id"), -32600, "Session not found"), 404)
        return None

    def _open_stream(self, received: RecordedRequest) -> FakeResponse:
        session = self.sessions.get(received.header("mcp-session-id") or "")
        if not self.get_stream or not self.sessions_on:
            return FakeResponse(status=405, headers=(("allow", "POST"),))
        if session is None:
            return FakeResponse.json(_error(None, -32600, "Session not found"), 404)
        stream = Channel()
        session.streams.append(stream)

        async def until_left() -> AsyncIterator[bytes]:
            try:
                async for chunk in stream():
                    yield chunk
            finally:
                session.streams.remove(stream)

        return FakeResponse.events(until_left)

    def _end_session(self, received: RecordedRequest) -> FakeResponse:
        if not self.sessions_on:
            return FakeResponse(status=405, headers=(("allow", "POST"),))
        session = self.sessions.pop(received.header("mcp-session-id") or "", None)
        if session is None:
            return FakeResponse.json(_error(None, -32600, "Session not found"), 404)
        for stream in session.streams:
            stream.close()
        return FakeResponse()

    def _respond(self, received: RecordedRequest, *, modern: bool) -> FakeResponse:
        message = received.message
        extra = self.response_headers
        if received.rpc_method == "initialize" and self.sessions_on:
            session = Session(secrets.token_hex(16))
            self.sessions[session.id] = session
            extra = (*extra, ("mcp-session-id", session.id))
        result = self._result(received)
        if result is None:
            status = 404 if modern else 200
            return FakeResponse.json(_error(message["id"], -32601, f"Method not found: {received.rpc_method}"), status)
        if modern:
            result = {"resultType": "complete", **result}
        response = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        progress = self._progress(received)
        if self.answer_as == "sse" or progress:
            body = b"".join(sse(event) for event in (*progress, response))
            return FakeResponse(headers=(("content-type", "text/event-stream"), *extra), body=body)
        return FakeResponse(headers=(*JSON, *extra), body=json.dumps(response).encode())

    def _result(self, received: RecordedRequest) -> dict[str, object] | None:
        info = {"name": "fake", "version": "1"}
        match received.rpc_method:
            case "initialize":
                asked = received.message.get("params", {}).get("protocolVersion", "2025-11-25")
                return {"protocolVersion": asked, "capabilities": {"tools": {}}, "serverInfo": info}
            case "server/discover":
                return {
                    "supportedVersions": [MODERN],
                    "capabilities": {"tools": {}},
                    "ttlMs": 0,
                    "cacheScope": "public",
                    "_meta": {"io.modelcontextprotocol/serverInfo": info},
                }
            case "ping":
                return {}
            case "tools/list":
                tools = [{"name": name, "inputSchema": {"type": "object"}} for name in ("echo", "count", "whoami")]
                return {"tools": tools, "ttlMs": 0, "cacheScope": "public"}
            case "tools/call":
                return {"content": [{"type": "text", "text": self._call(received)}], "isError": False}
            case _:
                return None

    def _call(self, received: RecordedRequest) -> str:
        arguments = received.message["params"].get("arguments") or {}
        match received.tool:
            case "whoami":
                token = self.find_token(received.bearer)
                return "nobody" if token is None else f"{token.client_id} {' '.join(token.scopes)} {token.resource}"
            case "large":
                return "x" * int(arguments.get("size", 1_000_000))
            case _:
                return str(arguments.get("text", received.tool))

    def _progress(self, received: RecordedRequest) -> tuple[dict[str, object], ...]:
        """Return the progress notifications of the tool ``count``, if the client asked for them."""
        params = received.message.get("params") or {}
        token = (params.get("_meta") or {}).get("progressToken")
        if received.tool != "count" or token is None:
            return ()
        last = int((params.get("arguments") or {}).get("to", 3))
        return tuple(
            {
                "jsonrpc": "2.0",
                "method": "notifications/progress",
                "params": {"progressToken": token, "progress": number, "total": last},
            }
            for number in range(1, last + 1)
        )


def big(size: int, *, content_type: str = "application/octet-stream") -> FakeResponse:
    """Return a streamed, chunked response of ``size`` bytes."""

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, size, len(CHUNK)):
            yield CHUNK[: min(len(CHUNK), size - start)]

    return FakeResponse(headers=(("content-type", content_type),), stream=stream)


def endless(chunk: bytes = sse({"jsonrpc": "2.0", "method": "notifications/message"})) -> FakeResponse:
    """Return an event stream without an end, sent as fast as it is read."""

    async def stream() -> AsyncIterator[bytes]:
        while True:
            yield chunk

    return FakeResponse.events(stream)


def _keys(received: RecordedRequest) -> tuple[str, ...]:
    """Return the keys that match a request, the narrowest first."""
    keys = [f"tools/call:{received.tool}"] if received.tool else []
    return (*keys, *filter(None, [received.rpc_method]), received.method)


def _error(request_id: object, code: int, message: str) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}


def origin_of(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"
