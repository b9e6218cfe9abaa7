"""Ask an upstream, without a token, whether it wants one; or with one, whether it accepts that."""

import asyncio
from collections.abc import Awaitable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError, UpstreamUnreachable
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net.http_head import Fields
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.proxy import session_ids
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.rpc.encoding import encode

T = TypeVar("T")

PROTOCOL_VERSION = "2025-11-25"
MODERN = "2026-07-28"
"""The revision without sessions: each request describes itself."""

MAX_BODY = 16 * 1024
"""Bytes of a response that are read: enough to show what it is."""

BODY_SECONDS = 5.0

_CLIENT = {"name": "mcp-auth-proxy", "version": "1"}
_META = "io.modelcontextprotocol"
_JSON = [(b"content-type", b"application/json"), (b"accept", b"application/json, text/event-stream")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResponse:
    """The response of a server to one MCP method. Header names are in lower case."""

    method: str
    status: int
    headers: Sequence[tuple[bytes, bytes]] = field(repr=False)
    body: bytes = field(default=b"", repr=False)
    """The first ``MAX_BODY`` bytes, still encoded."""

    def all(self, name: bytes) -> list[bytes]:
        return [value for field_name, value in self.headers if field_name == name]

    @property
    def challenge(self) -> list[bytes]:
        """The WWW-Authenticate fields."""
        return self.all(b"www-authenticate")


async def probe(upstream: UpstreamClient, route: Route) -> tuple[int, list[bytes]]:
    """Send an ``initialize`` without a token; return the status and the WWW-Authenticate fields of the answer.

    Raises UpstreamError.
    """
    answer = await ask(upstream, route, "initialize")
    await end_session(upstream, route, answer)
    return answer.status, answer.challenge


async def noting(outages: OutageLog, known: Container[str], server: ServerSettings, trial: Awaitable[T]) -> T:
    """Return what a trial of a server returns, and note whether the server could be reached, if its name is known.

    Raises what the trial raises.
    """
    try:
        result = await trial
    except UpstreamUnreachable:
        if server.name in known:
            outages.unreachable.add(server.name)
        raise
    outages.unreachable.discard(server.name)
    return result


async def ask(
    upstream: UpstreamClient,
    route: Route,
    method: str,
    *,
    session: bytes = b"",
    modern: bool = False,
    token: AccessToken | None = None,
) -> ProbeResponse:
    """Send one MCP request, without a token unless one is given, and return what comes back. Raises UpstreamError."""
    message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params_of(method, modern=modern)}
    response = await send_message(upstream, route, message, session=session, modern=modern, token=token)
    try:
        body = await _beginning(response)
    finally:
        response.close()
    return ProbeResponse(method=method, status=response.status, headers=response.headers, body=body)


async def send_message(
    upstream: UpstreamClient,
    route: Route,
    message: Mapping[str, object],
    *,
    session: bytes = b"",
    modern: bool = False,
    revision: str = PROTOCOL_VERSION,
    token: AccessToken | None = None,
) -> Response:
    """Send one MCP message and return the response, of which only the head has been read. Raises UpstreamError.

    ``revision``: what was negotiated for the session.
    """
    method = str(message["method"])
    headers = list(_JSON)
    if modern or method != "initialize":
        headers.append((b"mcp-protocol-version", (MODERN if modern else revision).encode()))
    if modern:
        headers.append((b"mcp-method", method.encode()))
    if session:
        headers.append((session_ids.FIELD, session_ids.of_server(session)))
    return await upstream.send(route, method=b"POST", fields=Fields(headers), body=encode(message), token=token)


async def end_session(
    upstream: UpstreamClient, route: Route, answer: ProbeResponse, *, token: AccessToken | None = None
) -> None:
    """End the session that an ``initialize`` began. If the server fails to, the session will expire there."""
    for session in answer.all(b"mcp-session-id")[:1]:
        await close_session(upstream, route, session, token=token)


async def close_session(
    upstream: UpstreamClient,
    route: Route,
    session: bytes,
    *,
    revision: str = PROTOCOL_VERSION,
    token: AccessToken | None = None,
) -> None:
    """End a session by its id. If the server fails to, the session will expire there."""
    headers = [(session_ids.FIELD, session_ids.of_server(session)), (b"mcp-protocol-version", revision.encode())]
    with suppress(UpstreamError):
        (await upstream.send(route, method=b"DELETE", fields=Fields(headers), body=b"", token=token)).close()


async def _beginning(response: Response) -> bytes:
    """Return the first bytes of the body. A stream that stays open or breaks off is not an error here."""
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while not response.complete and len(body) < MAX_BODY:
                body += await response.read()
    except (TimeoutError, UpstreamProtocolError):
        pass
    return body[:MAX_BODY]


def params_of(method: str, *, modern: bool) -> Mapping[str, object]:
    """Return the parameters of a request that names this client."""
    if modern:
        return {
            "_meta": {
                f"{_META}/protocolVersion": MODERN,
                f"{_META}/clientInfo": _CLIENT,
                f"{_META}/clientCapabilities": {},
            }
        }
    if method == "initialize":
        return {"protocolVersion": PROTOCOL_VERSION, "capabilities": {}, "clientInfo": _CLIENT}
    return {}
