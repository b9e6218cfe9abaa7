"""List the tools of a server as an MCP client would: ``initialize``, then ``tools/list``, with the account's token.

This shows that a server can be used, to whoever has just authorized it.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from mcp_auth_proxy.broker import Broker, ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import NotConnected, UpstreamProtocolError, UpstreamTimeout, excerpt
from mcp_auth_proxy.models import AccessToken, Account, Tool
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.decoding import decoded
from mcp_auth_proxy.proxy.probe import close_session, params_of, send_message
from mcp_auth_proxy.proxy.routes import Route, route_to
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.rpc import encoding, events

DEADLINE = 30.0
"""Seconds for everything."""

MAX_BODY = 1024 * 1024
"""Bytes of one response."""

MAX_PAGES = 20
MAX_TOOLS = 1000
MAX_TRIES = 3
"""Requests that are begun again with another token, at most."""


class _Challenged(Exception):
    """The server wants a token, or another one. ``challenge`` and ``nonce`` are fields of its response."""

    def __init__(self, status: int, challenge: list[bytes], nonce: list[bytes]) -> None:
        self.status = status
        self.challenge = challenge
        self.nonce = nonce
        super().__init__(status)


async def list_tools(broker: Broker, upstream: UpstreamClient, server: ServerSettings, account: Account) -> list[Tool]:
    """Return the tools that an account sees.

    Raises NotConnected if its user has to authorize first, AuthorizationError, UpstreamError and StoreError.
    """
    route, history = route_to(server), ChallengeHistory()
    token = await broker.token(account)
    try:
        async with asyncio.timeout(DEADLINE):
            for _ in range(MAX_TRIES):
                try:
                    tools = await _Client(upstream, route, token).tools()
                except _Challenged as challenged:
                    token = await _another_token(broker, server, account, challenged, token, history)
                else:
                    broker.accepted(account)
                    return tools
    except TimeoutError:
        raise UpstreamTimeout(f"{server.name} did not list its tools within {DEADLINE:.0f} s.") from None
    raise UpstreamProtocolError("it refuses each token that its authorization server issues.")


async def _another_token(
    broker: Broker,
    server: ServerSettings,
    account: Account,
    challenged: _Challenged,
    used: AccessToken | None,
    history: ChallengeHistory,
) -> AccessToken:
    """Return another token than the one that was refused. Raises NotConnected and AuthorizationError."""
    needed = NotConnected(f"{server.name} is not authorized yet.")
    if used is None and not server.oauth.grant.unattended:
        raise needed
    outcome = await broker.challenged(
        account,
        sent_to=server,
        status=challenged.status,
        challenge=challenged.challenge,
        used=used,
        history=history,
        nonce=challenged.nonce,
    )
    if outcome is None:
        raise UpstreamProtocolError(f"it answers {challenged.status}.")
    if isinstance(outcome, PendingAuthorization):
        raise needed
    broker.check_origin(server)
    return outcome


class _Client:
    """One MCP client of a server: with a session, or of the revision without sessions."""

    def __init__(self, upstream: UpstreamClient, route: Route, token: AccessToken | None) -> None:
        self._upstream = upstream
        self._route = route
        self._token = token
        self._session = b""
        self._modern = False
        self._last_id = 0

    async def tools(self) -> list[Tool]:
        """Return the tools. Raises _Challenged and UpstreamError."""
        try:
            await self._request("initialize", {})
        except UpstreamProtocolError as refused:
            # Servers of the revision without sessions know no initialize.
            self._modern = True
            try:
                return await self._list()
            except UpstreamProtocolError:
                raise refused from None
        try:
            await self._notify("notifications/initialized")
            return await self._list()
        finally:
            await self._end_session()

    async def _list(self) -> list[Tool]:
        tools: list[Tool] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            result = await self._request("tools/list", {} if cursor is None else {"cursor": cursor})
            listed = result.get("tools")
            if not isinstance(listed, list):
                raise UpstreamProtocolError("its answer to tools/list has no tools.")
            tools += [tool for each in listed if (tool := _read_tool(each)) is not None]
            following = result.get("nextCursor")
            if not isinstance(following, str) or len(tools) >= MAX_TOOLS:
                break
            cursor = following
        return tools[:MAX_TOOLS]

    async def _request(self, method: str, params: Mapping[str, object]) -> Mapping[str, Any]:
        self._last_id += 1
        everything = {**params_of(method, modern=self._modern), **params}
        message = {"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": everything}
        response = await self._send(message)
        try:
            _check_status(response)
            answer = await read_answer(response, self._last_id)
        finally:
            response.close()
        if method == "initialize":
            self._session = next((value for name, value in response.headers if name == b"mcp-session-id"), b"")
        result = answer.get("result")
        if isinstance(result, Mapping):
            return result
        error = answer.get("error")
        said = error.get("message") if isinstance(error, Mapping) else ""
        raise UpstreamProtocolError(f"it refuses {method}: {excerpt(str(said or 'without a reason'))}")

    async def _notify(self, method: str) -> None:
        (await self._send({"jsonrpc": "2.0", "method": method})).close()

    async def _send(self, message: Mapping[str, object]) -> Response:
        return await send_message(
            self._upstream, self._route, message, session=self._session, modern=self._modern, token=self._token
        )

    async def _end_session(self) -> None:
        if self._session:
            await close_session(self._upstream, self._route, self._session, token=self._token)


def _check_status(response: Response) -> None:
    if response.status in (401, 403):
        fields = response.headers
        raise _Challenged(
            response.status,
            [value for name, value in fields if name == b"www-authenticate"],
            [value for name, value in fields if name == b"dpop-nonce"],
        )
    if not 200 <= response.status < 300:
        raise UpstreamProtocolError(f"it answers {response.status}.")


async def read_answer(response: Response, request_id: object) -> Mapping[str, Any]:
    """Return the JSON-RPC response to a request, from a JSON document or an event stream."""
    if events.is_stream(response.headers):
        async for message in _messages(response):
            if message.get("id") == request_id and ("result" in message or "error" in message):
                return message
        raise UpstreamProtocolError("its event stream ended without an answer.")
    body = bytearray()
    async for part in decoded(response):
        body += part
        _check_size(body)
    return _parse(bytes(body))


async def _messages(response: Response) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the JSON-RPC messages of an event stream (WHATWG HTML §9.2)."""
    rest, data = b"", bytearray()
    async for part in decoded(response):
        *lines, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n")
        _check_size(rest)
        for line in lines:
            if line.startswith(b"data:"):
                data += line[5:].removeprefix(b" ") + b"\n"
                _check_size(data)
            elif not line and data:
                yield _parse(bytes(data))
                data.clear()


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


def _read_tool(value: object) -> Tool | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    description = value.get("description")
    return Tool(value["name"], description if isinstance(description, str) else "")
