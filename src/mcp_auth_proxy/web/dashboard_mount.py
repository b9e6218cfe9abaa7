"""Where the dashboard hangs in the site. Its modules are imported when it is first opened."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mcp_auth_proxy.broker import ownership
from mcp_auth_proxy.errors import CallbackRefused
from mcp_auth_proxy.web.accounts import PageAccounts
from mcp_auth_proxy.web.pages import message
from mcp_auth_proxy.web.session import Visitors

if TYPE_CHECKING:
    from mcp_auth_proxy.web.dashboard.pages import Dashboard

STREAM = "/static/live"
"""The path of the stream of changes. No server's path begins like it."""


class DashboardMount:
    """The routes of the dashboard."""

    def __init__(
        self, make: "Callable[[type[Dashboard]], Dashboard]", visitors: Visitors, accounts: PageAccounts
    ) -> None:
        """``make`` makes the dashboard when it is first needed."""
        self._make = make
        self._visitors = visitors
        self._accounts = accounts
        self._pages: Dashboard | None = None

    def routes(self) -> list[Route]:
        """Return the routes of the page, of its stream, and of its buttons but those that connect."""
        return [
            Route("/", self._show),
            Route(STREAM, self._stream),
            Route("/connect/{server}/disconnect", self._disconnect, methods=["POST"]),
            Route("/connect/{server}/forget", self._forget_client, methods=["POST"]),
        ]

    def _dashboard(self) -> "Dashboard":
        if self._pages is None:
            module = importlib.import_module("mcp_auth_proxy.web.dashboard.pages")
            self._pages = self._make(module.Dashboard)
        return self._pages

    async def _show(self, request: Request) -> Response:
        return await self._dashboard().show(request)

    async def _stream(self, request: Request) -> Response:
        return await self._dashboard().stream(request)

    async def _disconnect(self, request: Request) -> Response:
        return await self._disconnect_account(request, forget_client=False)

    async def _forget_client(self, request: Request) -> Response:
        return await self._disconnect_account(request, forget_client=True)

    async def _disconnect_account(self, request: Request, *, forget_client: bool) -> Response:
        caller = await self._visitors.require(request)
        found = self._accounts.find(caller, request.path_params["server"])
        if found is None:
            return message("Not found", "There is no server of this name for you.", status=404)
        try:
            ownership.require(self._visitors.may_open(caller), found[1])
        except CallbackRefused as refused:
            return message("You can't disconnect this server", str(refused), status=refused.status)
        return await self._dashboard().disconnect(request, found[1], forget_client=forget_client)
