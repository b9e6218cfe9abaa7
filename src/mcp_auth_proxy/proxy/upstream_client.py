"""Send requests to the upstream of a route: head, token and proof, and the redirects that may be followed."""

from urllib.parse import urljoin

from mcp_auth_proxy.errors import (
    UpstreamError,
    UpstreamPoolTimeout,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mcp_auth_proxy.models import AccessToken
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.http_connection import HttpConnection
from mcp_auth_proxy.net.http_head import Fields
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.headers import request_head
from mcp_auth_proxy.proxy.routes import Route

MAX_REDIRECTS = 3

_USUALLY_BODILESS = frozenset({b"GET", b"HEAD", b"DELETE", b"OPTIONS"})


class UpstreamClient:
    """Send requests to the upstreams of routes. The handler, the fast path and the probe share it."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    def idle_connection(self, route: Route) -> HttpConnection | None:
        """Return an idle connection to the upstream on which a request can be sent at once, or None."""
        return self._http.idle_connection(route.origin, route.policy)

    async def send(
        self,
        route: Route,
        *,
        method: bytes,
        fields: Fields,
        body: bytes,
        token: AccessToken | None = None,
        received: Response | None = None,
    ) -> Response:
        """Return the response once its head is here, after redirects that keep method, body and origin.

        ``received`` is the response to a request that the fast path has already sent; it is used as the first
        response. Raises UpstreamError.
        """
        target = route.target
        length = len(body) if body or method not in _USUALLY_BODILESS else None
        response = received
        for _ in range(MAX_REDIRECTS + 1):
            if response is None:
                head = build_head(route, method, target, fields, token, length)
                response = await self._http.send(
                    route.origin,
                    head,
                    body,
                    method=method,
                    head_timeout=route.server.upstream_timeout,
                    policy=route.policy,
                )
            note_nonce(token, response)
            if not is_redirect(response.status):
                return response
            try:
                target = _redirect_target(route, response)
            finally:
                response.close()
            response = None
        raise UpstreamProtocolError(f"it redirects more than {MAX_REDIRECTS} times.")


def build_head(
    route: Route,
    method: bytes,
    target: bytes,
    fields: Fields,
    token: AccessToken | None,
    content_length: int | None,
) -> bytes:
    """Return the head of an upstream request, with the token and, if it is bound to a key, a proof (RFC 9449 §7).

    Raises SessionNotFound.
    """
    if token is None:
        return request_head(method, target, route.host, fields, None, content_length, rules=route.rules)
    proof = token.signer.prove(method, target) if token.signer is not None else None
    return request_head(method, target, route.host, fields, token.header, content_length, proof, rules=route.rules)


def note_nonce(token: AccessToken | None, response: Response) -> None:
    """Remember the DPoP nonce of a response (RFC 9449 §8.2)."""
    if token is not None and token.signer is not None:
        token.signer.update_nonce(response.headers)


def is_redirect(status: int) -> bool:
    """Return whether a status sends the request elsewhere (RFC 9110 §15.4)."""
    return 300 <= status < 400 and status != 304


def failure_kind(error: UpstreamError) -> str:
    """Return the kind of a failure, as used in metrics."""
    match error:
        case UpstreamUnreachable():
            return "unreachable"
        case UpstreamTimeout():
            return "timeout"
        case UpstreamPoolTimeout():
            return "pool"
        case _:
            return "protocol"


def _redirect_target(route: Route, response: Response) -> bytes:
    """Return the request target that a redirect leads to (RFC 9110 §15.4.8, §15.4.9). Raises UpstreamProtocolError."""
    location = next((value for name, value in response.headers if name == b"location"), b"")
    try:
        if not location:
            # As a reference it would be this very URL (RFC 3986 §4.4): the request would be repeated, for nothing.
            raise ValueError("no Location")
        url = urls.parse(urljoin(route.server.url, location.decode("ascii")))
    except ValueError:
        raise UpstreamProtocolError(f"it answers {response.status} without a usable Location.") from None
    if response.status not in (307, 308) or url.origin != route.origin:
        raise UpstreamProtocolError(
            f"it answers {response.status}, a redirect to {url.origin}; a token is not sent there. If the server has "
            f"moved, put its new address in servers.{route.server.name}.url."
        )
    return url.target
