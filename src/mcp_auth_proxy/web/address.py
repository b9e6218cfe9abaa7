"""Answer a browser that opens an MCP address: with a page, and a button on it that starts an authorization.

Many people try an address in a browser first. The server is asked only if the button is pressed.
"""

from typing import Protocol

from starlette.responses import Response

from mcp_auth_proxy.broker import Broker, PendingAuthorization
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, UpstreamError, excerpt
from mcp_auth_proxy.models import AccessToken, Account
from mcp_auth_proxy.web.callback import connected_path
from mcp_auth_proxy.web.connect import cannot_start
from mcp_auth_proxy.web.pages import Restart, form_headers, message, page, redirect


class Start(Protocol):
    """Authorize an account of a server because a user in a browser wants it, whether or not it is connected."""

    async def __call__(
        self, server: ServerSettings, account: Account, *, popup: bool = False
    ) -> AccessToken | PendingAuthorization | None:
        """Return the flow to wait for, or a token; None if the server asks for no authorization.

        ``popup``: whether the pages on the way are in a popup of the dashboard, which hears how it ends. Raises
        AuthorizationError, UpstreamError and StoreError.
        """


async def address_page(
    server: ServerSettings, account: Account, broker: Broker, *, public_url: str, may_authorize: bool
) -> Response:
    """Return the page of a server's address. Raises StoreError.

    ``may_authorize``: whether the page has a button; an account that is shared is authorized by admins.
    """
    secure = public_url.startswith("https://") and server.url.startswith("https://")
    connected = await broker.connected(account)
    name = account.shown
    return page(
        "address.html",
        server=name,
        command_name=server.command_name,
        address=f"{public_url}/{name}/mcp",
        issuer=excerpt(connected.issuer) if connected is not None else "",
        may_authorize=may_authorize,
        headers=form_headers(http=not secure),
    )


async def start_page(server: ServerSettings, account: Account, start: Start, restart: Restart | None) -> Response:
    """Start an authorization, and redirect the browser to its link. Raises StoreError.

    ``restart``: the button to try it again.
    """
    try:
        outcome = await start(server, account, popup=restart is not None and restart.popup)
    except AuthorizationError as error:
        return cannot_start(error, restart)
    except UpstreamError as error:
        return message(f"{server.name} can't be reached", excerpt(str(error)), status=502, restart=restart)
    if isinstance(outcome, PendingAuthorization):
        return redirect(outcome.link, f"Authorize {server.name}")
    if outcome is None:
        text = "It answers without a token, so there is nothing to do."
        return message(f"{server.name} asks for no authorization", text, status=200)
    return redirect(connected_path(account), f"{server.name} is connected")
