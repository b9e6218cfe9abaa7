"""``/connect/{server}?flow=…``: the link that a user opens; it leads on to the authorization server."""

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mcp_auth_proxy.broker.broker import Broker
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused
from mcp_auth_proxy.web.pages import SECURITY_HEADERS, message


async def connect(request: Request, broker: Broker, *, secure: bool) -> Response:
    """Bind this browser to the flow by a cookie, and send it on (RFC 6749 §4.1.1).

    The cookie comes back at the callback only: ``Lax``, for that is a navigation from another site.
    """
    server = request.path_params["server"]
    try:
        visit = await broker.visit(server, request.query_params.get("flow", ""))
    except CallbackRefused as refused:
        return message("This link leads nowhere", str(refused), status=refused.status)
    except AuthorizationError as error:
        return message("The authorization can't begin", str(error), status=502)
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
