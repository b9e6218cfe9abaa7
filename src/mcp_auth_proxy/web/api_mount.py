"""Where the API hangs in the site. Its modules take some megabytes, so they are imported with the first request."""

import importlib

from starlette.types import ASGIApp, Receive, Scope, Send

from mcp_auth_proxy.web.api.context import ApiContext

_APPLICATION = "mcp_auth_proxy.web.api.application"


class ApiMount:
    """The ASGI application that makes the API when it is first used."""

    def __init__(self, context: ApiContext) -> None:
        self.context = context
        self._api: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api is None:
            self._api = importlib.import_module(_APPLICATION).Api(self.context)
        await self._api(scope, receive, send)
