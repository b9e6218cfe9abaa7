"""A client for what the proxy itself asks of a server: with a session, or of the revision without sessions.

Nothing that passes between MCP clients and the server is read here.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from mcp_auth_proxy.errors import MethodRefused, UpstreamProtocolError, excerpt
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.decoding import decoded
from mcp_auth_proxy.proxy.probe import PROTOCOL_VERSION, close_session, params_of, send_message
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.rpc import encoding, events
from mcp_auth_proxy.rpc.event_parser import EventParser
from mcp_auth_proxy.rpc.messages import is_revision

MAX_BODY = 1024 * 1024
"""Bytes of one response."""

MAX_TOTAL = 4 * MAX_BODY
"""Bytes of all responses to one client."""

MAX_PAGES = 20
"""Pages of one list. What follows is left out, as is what follows ``MAX_ITEMS``."""

MAX_ITEMS = 1000

CLOSE_SECONDS = 2.0
"""Seconds that the end of a session is waited for."""


class Challenged(Exception):
    """Signal: the server wants a token, or another one. ``challenge`` and ``nonce`` are fields of its response."""

    def __init__(self, status: int, challenge: list[bytes], nonce: list[bytes]) -> None:
        self.status = status
        self.challenge = challenge
        self.nonce = nonce
        super().__init__(status)


class ServerClient:
    """One MCP client of a server. Every method raises Challenged and UpstreamError."""

    def __init__(self, upstream: UpstreamClient, route: Route, token: AccessToken | None) -> None:
        self._upstream = upstream
        self._route = route
        self._token = token
        self._session = b""
        self._revision = PROTOCOL_VERSION
        self._last_id = 0
        self._received = 0
        self.has_begun = False
        """Whether ``initialize`` has been answered."""
        self.modern = False
        """Whether requests are of the revision without sessions, in which each describes itself."""

    async def initialize(self, revision: str = PROTOCOL_VERSION) -> Mapping[str, Any]:
        """Begin a session, unless the server has none, and return what the server says of itself.

        ``revision`` is the one to ask for. Call ``aclose`` afterwards, also if this raises an error.
        """
        result = await self.request("initialize", {"protocolVersion": revision})
        self.has_begun = True
        negotiated = result.get("protocolVersion")
        if is_revision(negotiated):
            self._revision = negotiated
        return result

    async def initialized(self) -> None:
        """Tell the server that the session can be used."""
        response = await self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        response.close()

    async def list(self, method: str, member: str) -> list[Mapping[str, Any]]:
        """Return a list, all pages of it up to the bounds; ``member`` of the results has its items."""
        items: list[Mapping[str, Any]] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            result = await self.request(method, {} if cursor is None else {"cursor": cursor})
            listed = result.get(member)
            if not isinstance(listed, list):
                raise MethodRefused(f"its answer to {method} has no {member}.")
            items += [each for each in listed if isinstance(each, Mapping)]
            following = result.get("nextCursor")
            if not isinstance(following, str) or len(items) >= MAX_ITEMS:
                break
            cursor = following
        return items[:MAX_ITEMS]

    async def request(self, method: str, params: Mapping[str, object]) -> Mapping[str, Any]:
        """Return the result of a request. Raises MethodRefused if the server answers with an error."""
        self._last_id += 1
        everything = {**params_of(method, modern=self.modern), **params}
        message = {"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": everything}
        response = await self._send(message)
        try:
            _check_status(response)
            if method == "initialize":
                self._session = next((value for name, value in response.headers if name == b"mcp-session-id"), b"")
            answer = await read_answer(response, self._last_id, self._parts(response))
        finally:
            response.close()
        result = answer.get("result")
        if isinstance(result, Mapping):
            return result
        error = answer.get("error")
        said = error.get("message") if isinstance(error, Mapping) else ""
        raise MethodRefused(f"it refuses {method}: {excerpt(str(said or 'without a reason'))}")

    async def aclose(self) -> None:
        """End the session, if there is one."""
        session, self._session = self._session, b""
        self.has_begun = False
        if session:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await close_session(
                        self._upstream, self._route, session, revision=self._revision, token=self._token
                    )

    async def _send(self, message: Mapping[str, object]) -> Response:
        return await send_message(
            self._upstream,
            self._route,
            message,
            session=self._session,
            modern=self.modern,
            revision=self._revision,
            token=self._token,
        )

    async def _parts(self, response: Response) -> AsyncIterator[bytes]:
        """Yield the body in parts, as long as the server has not sent too much in all."""
        async for part in bounded(response, MAX_TOTAL - self._received):
            self._received += len(part)
            yield part


async def bounded(response: Response, left: int = MAX_TOTAL) -> AsyncIterator[bytes]:
    """Yield the decoded body in parts, as long as it has not more than ``left`` bytes. Raises UpstreamProtocolError."""
    async for part in decoded(response):
        left -= len(part)
        if left < 0:
            raise UpstreamProtocolError(f"its answers are longer than {MAX_TOTAL // 1024} KiB in all.")
        yield part


async def read_answer(response: Response, request_id: object, parts: AsyncIterator[bytes]) -> Mapping[str, Any]:
    """Return the JSON-RPC response to a request, from a JSON document or an event stream.

    ``parts`` are those of the response's decoded body. Raises UpstreamProtocolError.
    """
    if events.is_stream(response.headers):
        async for message in _messages(parts):
            if message.get("id") == request_id and ("result" in message or "error" in message):
                return message
        raise UpstreamProtocolError("its event stream ended without an answer.")
    body = bytearray()
    async for part in parts:
        body += part
        _check_size(body)
    return _parse(bytes(body))


async def _messages(parts: AsyncIterator[bytes]) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the JSON-RPC messages of an event stream."""
    parser = EventParser(limit=MAX_BODY)
    async for part in parts:
        try:
            found = parser.feed(part)
        except ValueError as error:
            raise UpstreamProtocolError(f"{error}.") from None
        for message in found:
            yield _parse(message)


def _check_status(response: Response) -> None:
    if response.status in (401, 403):
        fields = response.headers
        raise Challenged(
            response.status,
            [value for name, value in fields if name == b"www-authenticate"],
            [value for name, value in fields if name == b"dpop-nonce"],
        )
    if 400 <= response.status < 500:
        raise MethodRefused(f"it answers {response.status}.")
    if not 200 <= response.status < 300:
        raise UpstreamProtocolError(f"it answers {response.status}.")


def _check_size(data: bytes | bytearray) -> None:
    if len(data) > MAX_BODY:
        raise UpstreamProtocolError(f"its answer is longer than {MAX_BODY // 1024} KiB.")


def _parse(data: bytes) -> Mapping[str, Any]:
    try:
        if not encoding.is_cheap(data):
            raise ValueError
        message = encoding.decode(data)
    except (ValueError, RecursionError):
        raise UpstreamProtocolError("its answer is not JSON that can be read.") from None
    if not isinstance(message, Mapping):
        raise UpstreamProtocolError("its answer is not a JSON-RPC message.")
    return message
