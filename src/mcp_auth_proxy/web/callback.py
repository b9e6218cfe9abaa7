"""``/oauth/callback``: the redirect URI. It leads to the last page, or shows what went wrong."""

import logging
from collections.abc import Awaitable, Callable
from math import ceil
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from mcp_auth_proxy.broker import Broker, cookie_name
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused, CopyAddress, StoreError
from mcp_auth_proxy.models import Account, Caller, Flow
from mcp_auth_proxy.store.events import OK
from mcp_auth_proxy.web.audit import CONSENT, REFUSE
from mcp_auth_proxy.web.connect import OfferStart, link_refused, offer_nothing
from mcp_auth_proxy.web.cookies import read_cookies
from mcp_auth_proxy.web.pages import Restart, message, redirect
from mcp_auth_proxy.web.popup import Popups, keep_opener
from mcp_auth_proxy.web.session import Visitors

logger = logging.getLogger(__name__)

RETRY_HINT = "You can close this tab. Repeat the request in your MCP client to get a new link."


def connected_path(account: Account) -> str:
    """Return the path of the last page, which says that an account is connected."""
    return f"/oauth/connected/{quote(account.shown, safe='@')}"


Ended = Callable[[Caller | None, Flow | None, str, str], Awaitable[None]]
"""Called with who has come back, to which flow, what that was in the audit trail, and its outcome."""


async def nobody_hears(caller: Caller | None, flow: Flow | None, action: str, outcome: str) -> None:
    """Leave no event."""


async def callback(
    request: Request,
    broker: Broker,
    visitors: Visitors,
    popups: Popups,
    *,
    ended: Ended = nobody_hears,
    offer_start: OfferStart = offer_nothing,
) -> Response:
    """Complete the flow that the authorization response belongs to (RFC 6749 §4.1.2).

    Its principal must still be signed in with this browser (T52). Raises CallerRefused and StoreError.
    """
    caller = await visitors.caller(request)
    params: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        params.setdefault(name, []).append(value)
    flow = await popups.flow_of_state(params)
    opened = flow if flow is not None and flow.return_origin else None
    restart = offer_start(caller, flow)

    async def end(action: str, outcome: str = OK) -> None:
        await ended(caller, flow, action, outcome)

    response = await _complete(request, broker, visitors, params, caller, popups, opened, end, restart)
    return response if opened is None else keep_opener(response)


async def _complete(
    request: Request,
    broker: Broker,
    visitors: Visitors,
    params: dict[str, list[str]],
    caller: Caller | None,
    popups: Popups,
    opened: Flow | None,
    end: Callable[..., Awaitable[None]],
    restart: Restart | None,
) -> Response:
    try:
        flow = await broker.complete(params, read_cookies(request), visitors.may_open(caller))
    except CopyAddress as copied:
        # The address stays as it is: a redirect would take from the user what they have to copy.
        return message("Copy the address of this page", str(copied), status=copied.status)
    except CallbackRefused as refused:
        await end(CONSENT, "callback-refused")
        # If the flow has not ended, somebody else may still end it, and nobody hears of this.
        popup, name = await popups.ended(opened), visitors.name(caller)
        title = "This authorization was not accepted"
        return link_refused(title, refused, name=name, onward="/", popup=popup, restart=restart)
    except AuthorizationDenied as denied:
        await end(REFUSE)
        popup = await popups.ended(opened)
        return message("Not authorized", str(denied), status=400, hint=RETRY_HINT, popup=popup, restart=restart)
    except AuthorizationError as error:
        await end(CONSENT, "authorization-failed")
        logger.warning("an authorization failed: %s", error)
        wait = "" if error.pause is None else f" The server asks to wait {ceil(error.retry_after or 0)} s."
        popup = await popups.ended(opened)
        title, hint = "The authorization failed", RETRY_HINT + wait
        return message(title, str(error), status=502, hint=hint, popup=popup, restart=restart)
    except StoreError as error:
        logger.error("a grant could not be stored: %s", error)
        title = "The authorization could not be stored"
        return message(title, str(error), status=503, hint=RETRY_HINT, restart=restart)
    await end(CONSENT)
    # The address of the last page must not have the code in it: it is in the history, and can be loaded again.
    account = flow.key.account
    last = connected_path(account) if opened is None else f"{connected_path(account)}?flow={quote(opened.id)}"
    response = redirect(last, f"{account.server} is connected")
    response.delete_cookie(cookie_name(params["state"][0]), path="/oauth/callback")
    return response
