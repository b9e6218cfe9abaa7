"""Where the API hangs in the site. Its modules take some megabytes, so they are imported with the first request."""

import importlib
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.wire_errors import COMPLETE_CLIENT, COMPLETE_TOOL

if TYPE_CHECKING:
    from mcp_auth_proxy.web.api.application import Api
    from mcp_auth_proxy.web.api.wires import Wires

_APPLICATION = "mcp_auth_proxy.web.api.application"
_WIRES = "mcp_auth_proxy.web.api.wires"

WIRES = (
    "/api/mcp/oauth/discover",
    "/v1/customers/{customer_id}/projects/{project_id}/mcp-oauth-clients",
    "/v1/customers/{customer_id}/projects/{project_id}/mcp-oauth-clients/{id}",
    COMPLETE_CLIENT,
    COMPLETE_TOOL,
)
"""The paths of the calls that the API takes in the form of other systems (``web.api.wires``)."""


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


class WireMount:
    """The ASGI application of the wires, made when one is first used."""

    def __init__(self, mount: ApiMount) -> None:
        self._mount = mount
        self._wires: Wires | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._wires is None:
            self._wires = importlib.import_module(_WIRES).Wires(self._mount.application())
        await self._wires(scope, receive, send)
