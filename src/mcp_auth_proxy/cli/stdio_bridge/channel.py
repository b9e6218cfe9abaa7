"""HTTP requests to the proxy, whichever process that is now."""

from collections.abc import AsyncIterator

from mcp_auth_proxy import __version__
from mcp_auth_proxy.cli.stdio_bridge.endpoint import Endpoint, ProxySource
from mcp_auth_proxy.errors import UpstreamProtocolError, UpstreamUnreachable
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.decoding import decoded
from mcp_auth_proxy.rpc import events
from mcp_auth_proxy.rpc.event_parser import EventParser
from mcp_auth_proxy.rpc.mirrored_fields import Fields

MAX_CONNECTIONS = 4096

HEAD_TIMEOUT = 24 * 3600.0
"""Seconds: the proxy has its own limit (upstream_timeout), and a call may take long."""

MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes of one message of the server."""

MAX_SENDS = 4
"""Proxies that a request is offered to before the bridge gives up."""

_COMMON: Fields = [
    (b"accept", b"application/json, text/event-stream"),
    (b"accept-encoding", b"identity"),
    (b"user-agent", f"mcp-auth-proxy/{__version__} (stdio)".encode()),
]


class Channel:
    """Sends requests to the server's address at the proxy. Belongs to one event loop."""

    def __init__(self, proxies: ProxySource, dialer: Dialer, *, key: str | None = None) -> None:
        """``key`` is sent as bearer token."""
        self._proxies = proxies
        self._http = HttpClient(dialer, connections_per_origin=MAX_CONNECTIONS)
        self._common = _COMMON if key is None else [*_COMMON, (b"authorization", f"Bearer {key}".encode())]

    async def send(
        self, method: bytes, fields: Fields, body: bytes = b"", *, harmless: bool = False, urgent: bool = True
    ) -> Response:
        """Return the response once its head is here. Cancelling closes the connection.

        If the proxy has ended without reading it, the request goes to the next proxy. ``harmless``: it may also be
        sent again, once, if the connection broke before the response. ``urgent``: as for the ``ProxySource``. Raises
        McpAuthProxyError.
        """
        for left in reversed(range(MAX_SENDS)):
            endpoint = await self._proxies.endpoint(urgent=urgent)
            try:
                return await self._http.send(
                    endpoint.origin,
                    self._head(method, endpoint, fields, body),
                    body,
                    method=method,
                    head_timeout=HEAD_TIMEOUT,
                )
            except UpstreamUnreachable:
                if not left or not await self._proxies.replace(endpoint):
                    raise
            except UpstreamProtocolError as error:
                # The system resets a connection if its process ended with bytes in it that nobody had read. The proxy
                # reads all of a request before it sends any of it on.
                unread = error.reset and self._proxies.is_local
                if not (harmless or unread) or not left:
                    raise
                harmless = harmless and unread
        raise AssertionError("the last attempt returns or raises")

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    def _head(self, method: bytes, endpoint: Endpoint, fields: Fields, body: bytes) -> bytes:
        lines = [
            b"%s %s HTTP/1.1" % (method, endpoint.target),
            b"host: " + endpoint.origin.authority.encode(),
            *(b"%s: %s" % field for field in (*self._common, *fields)),
        ]
        if method == b"POST":
            lines += [b"content-type: application/json", b"content-length: %d" % len(body)]
        return b"\r\n".join([*lines, b"", b""])


async def read_messages(response: Response, parser: EventParser) -> AsyncIterator[bytes]:
    """Yield the messages of a response: the events of a stream as they arrive, or the body if it has one.

    Raises UpstreamProtocolError.
    """
    if events.is_stream(response.headers):
        async for part in decoded(response):
            try:
                found = parser.feed(part)
            except ValueError as error:
                raise UpstreamProtocolError(f"The stream of the server is not read any further: {error}.") from None
            for message in found:
                yield message
        return
    body = bytearray()
    async for part in decoded(response):
        body += part
        if len(body) > MAX_MESSAGE:
            raise UpstreamProtocolError(f"its answer is longer than {MAX_MESSAGE // 1024} KiB.")
    if body.strip():
        yield bytes(body)


def field(response: Response, name: bytes) -> bytes:
    """Return a field of a response, empty if it has none."""
    return next((value for each, value in response.headers if each == name), b"")
