"""Where the API hangs in the site. Its modules take some megabytes, so they are imported with the first request."""

import importlib
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from mcp_auth_proxy.web.api.context import ApiContext

if TYPE_CHECKING:
    from mcp_auth_proxy.web.api.application import Api

_APPLICATION = "mcp_auth_proxy.web.api.application"


class ApiMount:
    """The ASGI application that makes the API when it is first used."""

    def __init__(self, context: ApiContext) -> None:
        self.context = context
        self._api: Api | None = None

    def application(self) -> "Api":
        """Return the API, which is made now if this is its first use."""
        if self._api is None:
            self._api = importlib.import_module(_APPLICATION).Api(self.context)
        return self._api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.application()(scope, receive, send)
