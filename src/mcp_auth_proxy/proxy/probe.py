"""Asks an upstream, without a token, whether it wants one."""

from mcp_auth_proxy.proxy.consent import encode
from mcp_auth_proxy.proxy.headers import request_head
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.upstream import Upstream

PROTOCOL_VERSION = "2025-11-25"


async def probe(upstream: Upstream, route: Route) -> tuple[int, list[bytes]]:
    """Send an ``initialize`` without a token; return the status and the WWW-Authenticate fields of the answer.

    Raises UpstreamError.
    """
    body = encode(
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {
                "protocolVersion": PROTOCOL_VERSION,
                "capabilities": {},
                "clientInfo": {"name": "mcp-auth-proxy", "version": "1"},
            },
        }
    )
    headers = [(b"content-type", b"application/json"), (b"accept", b"application/json, text/event-stream")]
    head = request_head(b"POST", route.target, route.host, headers, None, len(body))
    response = await upstream.send(route.origin, head, body, method=b"POST", head_timeout=route.server.upstream_timeout)
    response.close()
    return response.status, [value for name, value in response.headers if name.lower() == b"www-authenticate"]
