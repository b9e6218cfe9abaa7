"""``/connect/{server}?flow=…``: the link that a user opens; it leads on to the authorization server."""

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.broker.visits import DeviceVisit
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused
from mcp_auth_proxy.web.pages import SECURITY_HEADERS, message, page

REFRESH = 5
"""Seconds after which a page that waits looks again."""


async def connect(request: Request, broker: Broker, *, secure: bool) -> Response:
    """Bind this browser to the flow by a cookie, and send it on (RFC 6749 §4.1.1).

    The cookie comes back at the callback only: ``Lax``, for that is a navigation from another site.
    """
    server = request.path_params["server"]
    try:
        visit = await broker.visit(server, request.query_params.get("flow", ""))
    except CallbackRefused as refused:
        return message("This link can't be used", str(refused), status=refused.status)
    except AuthorizationError as error:
        return message("The authorization can't begin", str(error), status=502)
    if isinstance(visit, DeviceVisit):
        return _device_page(visit)
    # The page is for browsers and tools that do not follow the redirect by themselves.
    target = escape(visit.authorization_url, quote=True)
    response = HTMLResponse(
        f'<!doctype html><title>Authorize</title><p><a href="{target}">Go on to the authorization server</a></p>',
        status_code=303,
        headers={**SECURITY_HEADERS, "location": visit.authorization_url},
    )
    response.set_cookie(
        visit.cookie_name,
        visit.cookie_value,
        max_age=visit.max_age,
        path="/oauth/callback",
        secure=secure,
        httponly=True,
        samesite="lax",
    )
    return response


def _device_page(visit: DeviceVisit) -> Response:
    """The code and where to enter it (RFC 8628 §3.3); the page turns by itself once that is done."""
    if visit.device is None:
        text = "Your MCP client goes on by itself. You can close this tab."
        return message(f"{visit.server} is connected", text, status=200)
    return page("device.html", server=visit.server, device=visit.device, refresh=REFRESH)
