"""``/connect/{server}?flow=…``: the link that a user opens. It redirects to the authorization server."""

from html import escape
from math import ceil
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from mcp_auth_proxy.broker import Broker, DevicePrompt
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.pages import SECURITY_HEADERS, message, page

REFRESH = 5
"""Seconds between reloads of a page that waits."""

REDIRECTED = "redirected"
"""Query parameter of a link that was redirected to another host name, so that this happens only once."""


async def connect(request: Request, broker: Broker, *, public_url: str) -> Response:
    """Bind this browser to the flow with a cookie, and redirect it to the authorization server (RFC 6749 §4.1.1).

    The cookie is for the callback only. It is ``Lax`` because the callback is a navigation from another site.
    """
    server = request.path_params["server"]
    if _is_other_loopback_name(request, public_url):
        query = urlencode([*request.query_params.multi_items(), (REDIRECTED, "1")])
        return _redirect(f"{public_url}/connect/{quote(server)}?{query}", "Continue")
    try:
        opened = await broker.open_link(server, request.query_params.get("flow", ""))
    except CallbackRefused as refused:
        return message("This link can't be used", str(refused), status=refused.status)
    except AuthorizationError as error:
        if error.retry_after is None:
            return message("The authorization can't start", str(error), status=502)
        later = message("The authorization can't start yet", str(error), status=503)
        later.headers["retry-after"] = str(max(1, ceil(error.retry_after)))
        return later
    if isinstance(opened, DevicePrompt):
        return _device_page(opened)
    response = _redirect(opened.authorization_url, "Continue to the authorization server")
    response.set_cookie(
        opened.cookie_name,
        opened.cookie_value,
        max_age=opened.max_age,
        path="/oauth/callback",
        secure=public_url.startswith("https://"),
        httponly=True,
        samesite="lax",
    )
    return response


def _is_other_loopback_name(request: Request, public_url: str) -> bool:
    """Return whether the link was opened under another loopback name than the host of ``public_url``.

    The callback would then not get the cookie: to a browser, ``localhost`` and ``127.0.0.1`` are two hosts. Other
    names are not redirected: only loopback names are sure to be this machine.
    """
    here, public = request.url.hostname or "", urls.parse(public_url).origin.host
    return (
        request.method == "GET"
        and here != public
        and urls.is_loopback(here)
        and urls.is_loopback(public)
        and REDIRECTED not in request.query_params
    )


def _redirect(url: str, text: str) -> Response:
    """Return a redirect with a page for browsers and tools that do not follow redirects."""
    return HTMLResponse(
        f'<!doctype html><title>Authorize</title><p><a href="{escape(url, quote=True)}">{text}</a></p>',
        status_code=303,
        headers={**SECURITY_HEADERS, "location": url},
    )


def _device_page(opened: DevicePrompt) -> Response:
    """Return the page with the code and where to enter it (RFC 8628 §3.3). It changes once the user is done."""
    if opened.device is None:
        text = "Your MCP client continues automatically. You can close this tab."
        return message(f"{opened.server} is connected", text, status=200)
    return page("device.html", server=opened.server, device=opened.device, refresh=REFRESH)
