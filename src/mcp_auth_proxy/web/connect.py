"""``/connect/{server}?flow=…``: the link that a user opens. It leads to the authorization server."""

from collections.abc import Awaitable, Callable
from math import ceil
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy.broker import AuthorizationRedirect, Broker, ConfirmationPrompt, ConnectedServer, DevicePrompt
from mcp_auth_proxy.errors import AuthorizationError, CallbackRefused, excerpt
from mcp_auth_proxy.models import Caller, Flow
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.confirm import confirmation_page, is_confirmed
from mcp_auth_proxy.web.pages import Popup, Restart, ScopeList, message, page, redirect
from mcp_auth_proxy.web.paths import path_of, sign_in_path
from mcp_auth_proxy.web.popup import Popups
from mcp_auth_proxy.web.session import Visitors

REFRESH = 5
"""Seconds between reloads of a page that waits."""

REDIRECTED = "redirected"
"""Query parameter of a link that was redirected to another host name, so that this happens only once."""

MAX_LINK = 500
"""Characters of the path and query of a link that is redirected, which repeats them. Ours are shorter."""

NOT_CONFIRMED = (
    "This was not sent by the page of this link in this browser, or the browser keeps no cookies. Open the link again, "
    "and continue from there."
)

OfferStart = Callable[[Caller | None, Flow | None], Restart | None]
"""Return the button that begins an authorization in place of a flow that can't be used; None if the user may not.

Without the flow it is one for the server that the page is about, if that is known.
"""


def offer_nothing(caller: Caller | None, flow: Flow | None) -> None:
    """Offer no button: only a running proxy begins authorizations for its pages."""


async def connect(
    request: Request,
    broker: Broker,
    visitors: Visitors,
    popups: Popups,
    *,
    public_url: str,
    command_name: str,
    warn: Callable[[str, str], None],
    confirmed: Callable[[Caller], Awaitable[None]] | None = None,
    offer_start: OfferStart = offer_nothing,
) -> Response:
    """Redirect a browser to the authorization server, or ask its user first, or let them sign in.

    A POST is the form with which the user confirms (``web.confirm``). ``command_name`` is what commands call the
    server. ``warn`` is called with the server and the reason if a form is forged, ``confirmed`` with who has confirmed.
    Raises SignInNeeded and CallerRefused.
    """
    server, flow_id = request.path_params["server"], request.query_params.get("flow", "")
    if is_other_loopback_name(request, public_url):
        return to_public_url(request, public_url)
    caller = await visitors.require(request)
    may_open = visitors.may_open(caller)
    opened: AuthorizationRedirect | ConfirmationPrompt | DevicePrompt | ConnectedServer
    try:
        if request.method != "POST":
            opened = await broker.open_link(server, flow_id, may_open)
        elif await is_confirmed(request, flow_id):
            opened = await broker.confirm_link(server, flow_id, may_open)
            if confirmed is not None:
                await confirmed(caller)
        else:
            warn(server, "a form to continue its sign-in was refused: it was not sent by our page in the same browser")
            raise CallbackRefused(NOT_CONFIRMED, 403)
    except CallbackRefused as refused:
        restart, name = offer_start(caller, await broker.flow(flow_id)), visitors.name(caller)
        return link_refused("This link can't be used", refused, name=name, onward=path_of(request), restart=restart)
    except AuthorizationError as error:
        return cannot_start(error, offer_start(caller, await broker.flow(flow_id)))
    if isinstance(opened, ConnectedServer):
        flow = await popups.flow(flow_id)
        return connected_page(opened, await popups.ended(flow))
    if isinstance(opened, DevicePrompt):
        return _device_page(opened)
    if isinstance(opened, ConfirmationPrompt):
        return confirmation_page(request, opened, secure=_is_https(public_url), command_name=command_name)
    return _authorization_redirect(opened, secure=_is_https(public_url))


def _authorization_redirect(opened: AuthorizationRedirect, *, secure: bool) -> Response:
    """Bind this browser to the flow with a cookie, and redirect it to the authorization server (RFC 6749 §4.1.1).

    The cookie is for the callback only. It is ``Lax`` because the callback is a navigation from another site.
    """
    response = redirect(opened.authorization_url, "Continue to the authorization server")
    response.set_cookie(
        opened.cookie_name,
        opened.cookie_value,
        max_age=opened.max_age,
        path="/oauth/callback",
        secure=secure,
        httponly=True,
        samesite="lax",
    )
    return response


def _is_https(public_url: str) -> bool:
    return public_url.startswith("https://")


def is_other_loopback_name(request: Request, public_url: str) -> bool:
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
        and len(request.url.path) + len(request.url.query) <= MAX_LINK
    )


def to_public_url(request: Request, public_url: str) -> Response:
    """Redirect a browser to the same page under the name of ``public_url``, once."""
    query = urlencode([*request.query_params.multi_items(), (REDIRECTED, "1")])
    path = quote(request.scope["path"], safe="/@")
    return redirect(f"{public_url}{path}?{query}", "Continue")


def link_refused(
    title: str,
    refused: CallbackRefused,
    *,
    name: str | None,
    onward: str,
    popup: Popup | None = None,
    restart: Restart | None = None,
) -> Response:
    """Return the page that says why a link or a callback is refused.

    ``name``: who is signed in, empty for nobody, None if callers are not identified. ``onward``: the path to open
    again after a sign-in.
    """
    if refused.status != 403 or name is None:
        return message(title, str(refused), status=refused.status, popup=popup, restart=restart)
    hint = f"You are signed in as {name}." if name else "Nobody is signed in."
    sign_in = ("Sign in", sign_in_path(onward))
    return message(title, str(refused), status=403, hint=hint, onward=sign_in, restart=restart)


def cannot_start(error: AuthorizationError, restart: Restart | None = None) -> Response:
    """Return the page that says why an authorization can't start, or when it can."""
    if error.retry_after is None:
        return message("The authorization can't start", str(error), status=502, restart=restart)
    later = message("The authorization can't start yet", str(error), status=503, restart=restart)
    later.headers["retry-after"] = str(max(1, ceil(error.retry_after)))
    return later


def connected_page(connected: ConnectedServer, popup: Popup | None = None) -> Response:
    """Return the last page of an authorization. It has no form: there is nothing left to do."""
    account = f"You are connected as {excerpt(connected.label)}. " if connected.label else ""
    return message(
        f"{connected.server} is connected",
        f"{account}Your MCP client continues automatically. You can close this tab.",
        status=200,
        hint=f"Authorized by {excerpt(connected.issuer)}.",
        popup=popup,
    )


def _device_page(opened: DevicePrompt) -> Response:
    """Return the page with the code and where to enter it (RFC 8628 §3.3). It changes once the user is done."""
    return page(
        "device.html",
        server=opened.server,
        device=opened.device,
        sign_in=opened.sign_in,
        scopes=ScopeList.of(opened.sign_in.scopes),
        refresh=REFRESH,
    )
