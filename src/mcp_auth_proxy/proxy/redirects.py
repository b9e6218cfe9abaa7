"""Redirects of an upstream: followed where they keep method, body and origin, and nowhere else."""

from urllib.parse import urljoin

from mcp_auth_proxy.errors import UpstreamProtocolError
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.routes import Route

MAX_REDIRECTS = 3


def is_redirect(response: Response) -> bool:
    """Whether an answer sends the request elsewhere (RFC 9110 §15.4)."""
    return 300 <= response.status < 400 and response.status != 304


def target(route: Route, response: Response) -> bytes:
    """Return the request target that a redirect leads to (RFC 9110 §15.4.8, §15.4.9). Raises UpstreamBroken."""
    location = next((value for name, value in response.headers if name.lower() == b"location"), b"")
    try:
        found = urls.parse(urljoin(route.server.url, location.decode("ascii")))
    except ValueError:
        raise UpstreamProtocolError(f"it answers {response.status} without a usable Location.") from None
    if response.status not in (307, 308) or found.origin != route.origin:
        raise UpstreamProtocolError(
            f"it answers {response.status}, a redirect to {found.origin}; a token is not carried along there. If the "
            f"server has moved, put its new address in servers.{route.server.name}.url."
        )
    return found.target
