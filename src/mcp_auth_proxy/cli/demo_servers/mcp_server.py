"""The demo's protected MCP server: the MCP SDK's server behind a bearer token check (RFC 6750, RFC 9728)."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mcp_auth_proxy.cli.demo_servers.authorization_server import Announce, silent
from mcp_auth_proxy.cli.demo_servers.ledger import Token

FindToken = Callable[[str], Token | None]
"""Look up an access token at the authorization server, in the same process; None if it is not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """What the protected resource publishes and requires. ``resource`` is its URL and the audience of its tokens."""

    resource: str
    issuer: str
    find_token: FindToken
    scopes: tuple[str, ...] = ("notes:read",)
    tool_scopes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"write_note": ("notes:write",)})
    announce: Announce = silent

    @property
    def metadata_path(self) -> str:
        """The well-known path with the resource's path inserted (RFC 9728 §3.1)."""
        return f"/.well-known/oauth-protected-resource{urlsplit(self.resource).path}"

    @property
    def metadata_url(self) -> str:
        """The URL of the metadata, for challenges (RFC 9728 §5.1)."""
        parts = urlsplit(self.resource)
        return f"{parts.scheme}://{parts.netloc}{self.metadata_path}"


class ProtectedMcpServer:
    """An ASGI application: metadata for everyone, the MCP endpoint for requests with a valid token.

    Its lifespan is the MCP server's: run it with ``lifespan="on"``.
    """

    def __init__(self, protection: Protection) -> None:
        self.protection = protection
        self._refused = False
        self._mcp = make_mcp_app(urlsplit(protection.resource).path, protection.find_token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._mcp(scope, receive, send)
            return
        request = Request(scope, receive)
        if scope["path"] == self.protection.metadata_path:
            await self._metadata()(scope, receive, send)
            return
        body = await request.body()
        refusal = self._refusal(request, body)
        if refusal is not None:
            self._refused = True
            await refusal(scope, receive, send)
            return
        if self._refused:
            self._refused = False
            self.protection.announce("retry", "the same request came again, with a valid token")
        await self._mcp(scope, _replay(body, receive), send)

    def _metadata(self) -> Response:
        """Return the protected resource metadata (RFC 9728 §2)."""
        it = self.protection
        it.announce("resource-metadata", f"protected resource metadata read at {it.metadata_path}")
        scopes = dict.fromkeys([*it.scopes, *(scope for more in it.tool_scopes.values() for scope in more)])
        return JSONResponse(
            {
                "resource": it.resource,
                "authorization_servers": [it.issuer],
                "scopes_supported": list(scopes),
                "bearer_methods_supported": ["header"],
            }
        )

    def _refusal(self, request: Request, body: bytes) -> Response | None:
        """Return a challenge if the request is not authorized (RFC 6750 §3), else None."""
        it = self.protection
        bearer = bearer_token(request.headers.get("authorization", ""))
        token = it.find_token(bearer) if bearer else None
        # A token for another audience must be refused (RFC 9068 §4, RFC 8707 §2).
        if token is None or token.resource != it.resource:
            it.announce("challenge", "401: " + ("the token is not valid" if bearer else "no token"))
            return _challenge(401, "invalid_token" if bearer else "", it.scopes, it.metadata_url)
        needed = it.scopes + it.tool_scopes.get(called_tool(body), ())
        if not set(needed) <= set(token.scopes):
            it.announce("challenge", f"403: the token lacks {' '.join(s for s in needed if s not in token.scopes)}")
            return _challenge(403, "insufficient_scope", needed, it.metadata_url)
        return None


def make_mcp_app(path: str, find_token: FindToken) -> ASGIApp:
    """Return the MCP SDK's server with a few tools, for both protocol eras, at ``path``.

    The only function of the demo servers that imports ``mcp``, which costs 0.6 s and 40 MB: a running proxy does
    without it (docs/architecture.md).
    """
    from mcp.server.mcpserver import Context, MCPServer

    server = MCPServer("demo-notes", version="1.0.0", log_level="ERROR")
    notes: list[str] = []

    @server.tool()
    def echo(text: str) -> str:
        """Return the text."""
        return text

    @server.tool()
    def add(a: int, b: int) -> int:
        """Return the sum."""
        return a + b

    @server.tool()
    def whoami(ctx: Context[Any, Any]) -> str:
        """Return the client and scopes of the token."""
        headers = ctx.headers or {}
        token = find_token(bearer_token(headers.get("authorization", "")))
        return "nobody" if token is None else f"{token.client_id} with {' '.join(token.scopes)}"

    @server.tool()
    async def count(ctx: Context[Any, Any], to: int = 3, seconds: float = 0.1) -> str:
        """Count slowly, with a progress event at each step; ``seconds`` is the pause between steps."""
        for number in range(1, to + 1):
            await ctx.report_progress(number, to, f"{number} of {to}")
            await asyncio.sleep(seconds)
        return f"counted to {to}"

    @server.tool()
    def large(size: int = 1_000_000) -> str:
        """Return this many characters."""
        return "x" * size

    @server.tool()
    def write_note(text: str) -> str:
        """Store a note; needs an additional scope."""
        notes.append(text)
        return f"{len(notes)} notes"

    return server.streamable_http_app(streamable_http_path=path)


def bearer_token(authorization: str) -> str:
    """Return the token of an Authorization header (RFC 6750 §2.1); empty if there is none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def called_tool(body: bytes) -> str:
    """Return the tool that a JSON-RPC request calls; empty for other requests."""
    try:
        message = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(message, dict) or message.get("method") != "tools/call":
        return ""
    params = message.get("params")
    return str(params.get("name", "")) if isinstance(params, dict) else ""


def _challenge(status: int, error: str, scopes: tuple[str, ...], metadata_url: str) -> Response:
    parts = [f'error="{error}"'] if error else []
    parts += [f'scope="{" ".join(scopes)}"', f'resource_metadata="{metadata_url}"']
    answer = {"error": error or "unauthorized"}
    return JSONResponse(answer, status, headers={"www-authenticate": f"Bearer {', '.join(parts)}"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that yields the body already read, then the messages of the connection."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
