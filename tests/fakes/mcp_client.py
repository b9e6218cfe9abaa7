"""A plain MCP client over real sockets, without OAuth and without the SDK; responses are kept as they came."""

import itertools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2

MODERN = "2026-07-28"
META = "io.modelcontextprotocol"
ACCEPT = "application/json, text/event-stream"
NAMED_BY = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}


@dataclass
class McpResponse:
    """An HTTP response and its JSON-RPC messages: one if it is JSON, any number if it is an event stream."""

    status: int
    headers: httpx2.Headers
    body: bytes = field(repr=False)
    messages: list[dict[str, Any]]

    @property
    def message(self) -> dict[str, Any]:
        """Return the last message, which is the response; empty if there is none."""
        return self.messages[-1] if self.messages else {}

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = self.message["result"]
        return found

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.message["error"]
        return found

    @property
    def text(self) -> str:
        """Return the text of a tool's result."""
        return "".join(part.get("text", "") for part in self.result["content"])


class PlainClient:
    """Speaks one protocol revision to one URL; with 2026-07-28 each request has its ``_meta`` and headers."""

    def __init__(
        self,
        url: str,
        *,
        version: str = "2025-11-25",
        capabilities: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.url = url
        self.version = version
        self.capabilities = dict(capabilities or {})
        self.session: str | None = None
        self.http = httpx2.AsyncClient(
            trust_env=False,
            timeout=60,
            headers=headers,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def initialize(self) -> McpResponse:
        """Do the handshake of the 2025 revisions, and keep the session id."""
        params = {
            "protocolVersion": self.version,
            "capabilities": self.capabilities,
            "clientInfo": {"name": "plain", "version": "1"},
        }
        reply = await self.post("initialize", params)
        self.session = reply.headers.get("mcp-session-id")
        if "result" in reply.message:
            await self.notify("notifications/initialized")
        return reply

    async def post(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        *,
        id: int | str | None = None,
        headers: Mapping[str, str] | None = None,
        session: str | None = None,
    ) -> McpResponse:
        """Send one request and return the whole response."""
        message = self.message(method, params, id=next(self._ids) if id is None else id)
        response = await self.http.post(
            self.url, content=json.dumps(message), headers=self.headers(message, headers, session)
        )
        return read(response)

    async def call(self, tool: str, /, **arguments: object) -> McpResponse:
        """Call a tool (``tools/call``)."""
        return await self.post("tools/call", {"name": tool, "arguments": arguments})

    async def notify(self, method: str, params: Mapping[str, object] | None = None) -> McpResponse:
        """Send one notification."""
        message = self.message(method, params)
        return read(await self.http.post(self.url, content=json.dumps(message), headers=self.headers(message)))

    async def delete(self) -> McpResponse:
        """End the session."""
        return read(await self.http.delete(self.url, headers=self.headers({})))

    @asynccontextmanager
    async def stream(
        self, method: str | None = None, params: Mapping[str, object] | None = None
    ) -> AsyncIterator[tuple[httpx2.Response, AsyncIterator[dict[str, Any]]]]:
        """Yield a response while it is received, and its events; a GET stream if no method is given."""
        if method is None:
            request = self.http.build_request("GET", self.url, headers=self.headers({}))
        else:
            message = self.message(method, params, id=next(self._ids))
            request = self.http.build_request(
                "POST", self.url, content=json.dumps(message), headers=self.headers(message)
            )
        response = await self.http.send(request, stream=True)
        try:
            yield response, events(response)
        finally:
            await response.aclose()

    def message(
        self, method: str, params: Mapping[str, object] | None = None, *, id: int | str | None = None
    ) -> dict[str, Any]:
        """Return the JSON-RPC message in the form of this revision."""
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
        if id is not None:
            message["id"] = id
        if params is not None:
            message["params"] = dict(params)
        if self.version == MODERN:
            inner = message.setdefault("params", {})
            inner["_meta"] = {
                f"{META}/protocolVersion": self.version,
                f"{META}/clientInfo": {"name": "plain", "version": "1"},
                f"{META}/clientCapabilities": self.capabilities,
                **inner.get("_meta", {}),
            }
        return message

    def headers(
        self, message: Mapping[str, Any], more: Mapping[str, str] | None = None, session: str | None = None
    ) -> dict[str, str]:
        """Return the header fields for a message."""
        method = message.get("method", "")
        headers = {"accept": ACCEPT, "content-type": "application/json"}
        if method != "initialize":
            headers["mcp-protocol-version"] = self.version
        if self.version == MODERN and method:
            headers["mcp-method"] = method
            if method in NAMED_BY:
                headers["mcp-name"] = str(message.get("params", {}).get(NAMED_BY[method], ""))
        if session or self.session:
            headers["mcp-session-id"] = session or self.session or ""
        return headers | dict(more or {})


def read(response: httpx2.Response) -> McpResponse:
    """Read the messages of a complete response."""
    kind = response.headers.get("content-type", "").partition(";")[0]
    messages: list[dict[str, Any]] = []
    if kind == "text/event-stream":
        messages = [found for line in response.text.splitlines() if (found := _data(line)) is not None]
    elif kind == "application/json" and response.content:
        messages = [response.json()]
    return McpResponse(response.status_code, response.headers, response.content, messages)


async def events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON-RPC messages of an event stream as they are received, without comments."""
    async for line in response.aiter_lines():
        found = _data(line)
        if found is not None:
            yield found


def _data(line: str) -> dict[str, Any] | None:
    """Read the message on one data line: the fakes and the SDK write no message on more than one."""
    if not line.startswith("data:") or not line[5:].strip():
        return None
    found: dict[str, Any] = json.loads(line[5:])
    return found
