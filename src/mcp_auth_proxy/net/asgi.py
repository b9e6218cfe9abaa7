"""Let an ASGI application answer requests of the listener: the pages are one."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from mcp_auth_proxy.errors import ClientDisconnected
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.net.http_head import Headers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def run_asgi(app: App, request: ClientRequest) -> None:
    """Let an ASGI 3 application answer a request. Raises what the application raises."""
    bridge = _Bridge(request)
    await app(scope_of(request), bridge.receive, bridge.send)


def scope_of(request: ClientRequest) -> dict[str, Any]:
    """Return the scope of a request (ASGI, HTTP connection scope).

    The host of ``client`` is ``ClientRequest.client``: it may name a client behind a trusted proxy.
    """
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.http_version,
        "scheme": "http",
        "method": request.method.decode("ascii"),
        "path": unquote(request.path.decode("ascii")),
        "raw_path": request.path,
        "query_string": request.query,
        "client": (request.client, 0),
        "headers": _headers(request),
    }


def _headers(request: ClientRequest) -> Headers:
    if request.content_length is None:
        return request.headers
    return [*request.headers, (b"content-length", b"%d" % request.content_length)]


class _Bridge:
    __slots__ = ("_body_read", "_request")

    def __init__(self, request: ClientRequest) -> None:
        self._request = request
        self._body_read = False

    async def receive(self) -> Message:
        """Return the next part of the body; after the last, wait for the end of the response or of the connection."""
        request = self._request
        if self._body_read or request.complete:
            await request.wait_closed()
            return {"type": "http.disconnect"}
        try:
            data = await request.read()
        except ClientDisconnected:
            return {"type": "http.disconnect"}
        self._body_read = request.received
        return {"type": "http.request", "body": data, "more_body": not self._body_read}

    async def send(self, message: Message) -> None:
        """Send a head or a part of the body; waits while the client is slow to read.

        Raises RuntimeError on messages out of order, and on a body that is not as long as Content-Length says.
        """
        if message["type"] == "http.response.start":
            await self._request.start(message["status"], message.get("headers", ()))
        elif message["type"] == "http.response.body":
            await self._request.write(message.get("body", b""), last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"unknown ASGI message: {message['type']}")
