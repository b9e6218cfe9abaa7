"""``/connect/{server}?flow=…``: the link that a user opens; it leads on to the authorization server."""

from html import escape
from urllib.parse import quote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mcp_auth_proxy.broker import Broker, DevicePrompt
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused
from mcp_auth_proxy.web.guard import is_loopback
from mcp_auth_proxy.web.pages import SECURITY_HEADERS, message, page

REFRESH = 5
"""Seconds after which a page that waits looks again."""


LED_HERE = "led_here"
"""The query parameter of a link that was opened under another name first: it is not led on again."""


async def connect(request: Request, broker: Broker, *, public_url: str) -> Response:
    """Bind this browser to the flow by a cookie, and send it on (RFC 6749 §4.1.1).

    The cookie comes back at the callback only: ``Lax``, for that is a navigation from another site.
    """
    server = request.path_params["server"]
    if _under_another_name(request, public_url):
        query = urlencode([*request.query_params.multi_items(), (LED_HERE, "1")])
        return _onward(f"{public_url}/connect/{quote(server)}?{query}", "Go on")
    try:
        visit = await broker.open_link(server, request.query_params.get("flow", ""))
    except CallbackRefused as refused:
        return message("This link can't be used", str(refused), status=refused.status)
    except AuthorizationError as error:
        return message("The authorization can't begin", str(error), status=502)
    if isinstance(visit, DevicePrompt):
        return _device_page(visit)
    response = _onward(visit.authorization_url, "Go on to the authorization server")
    response.set_cookie(
        visit.cookie_name,
        visit.cookie_value,
        max_age=visit.max_age,
        path="/oauth/callback",
        secure=public_url.startswith("https://"),
        httponly=True,
        samesite="lax",
    )
    return response


def _under_another_name(request: Request, public_url: str) -> bool:
    """Whether the cookie would not come back: to a browser, ``localhost`` and ``127.0.0.1`` are two hosts.

    Asked of loopback names alone, which lead to this machine whatever they are.
    """
    here, public = request.url.hostname or "", urlsplit(public_url).hostname or ""
    return (
        request.method == "GET"
        and here != public
        and is_loopback(here)
        and is_loopback(public)
        and LED_HERE not in request.query_params
    )


def _onward(url: str, text: str) -> Response:
    """A redirect; its page is for browsers and tools that do not follow it by themselves."""
    return HTMLResponse(
        f'<!doctype html><title>Authorize</title><p><a href="{escape(url, quote=True)}">{text}</a></p>',
        status_code=303,
        headers={**SECURITY_HEADERS, "location": url},
    )


def _device_page(visit: DevicePrompt) -> Response:
    """The code and where to enter it (RFC 8628 §3.3); the page turns by itself once that is done."""
    if visit.device is None:
        text = "Your MCP client goes on by itself. You can close this tab."
        return message(f"{visit.server} is connected", text, status=200)
    return page("device.html", server=visit.server, device=visit.device, refresh=REFRESH)
