"""Authorizations in a popup: the last page tells the page that opened it how it ended, and nobody else (T71).

All pages on the way keep the tie to their opener (Cross-Origin-Opener-Policy), but only for flows that have an origin
to tell: for others it is cut.
"""

import json
from collections.abc import Mapping, Sequence

from starlette.responses import Response

from mcp_auth_proxy.broker import Broker, FlowState
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import Flow
from mcp_auth_proxy.web.pages import Popup

TYPE = "mcp-auth-proxy.oauth"
"""The ``type`` of the message, and the name of the BroadcastChannel."""

STARTS = ("/oauth/start", "/api/v1/oauth/start", "/api/mcp/oauth/start")
"""Where an authorization is begun by URL alone; the last one is a wire (``web.api.wires``), as is this callback."""
WIRE_CALLBACK = "/api/mcp/oauth/callback"
CONFIRM = "confirm"
"""Query parameter of ``STARTS``: the user is asked, wherever the request comes from."""

_STARTS = tuple(f"{path}?" for path in STARTS)


class Popups:
    """Find out who hears of the end of a flow. Raises StoreError."""

    def __init__(self, broker: Broker, servers: Mapping[str, ServerSettings]) -> None:
        self._broker = broker
        self._servers = servers

    async def flow(self, flow_id: str) -> Flow | None:
        """Return the flow of a link, if a popup may have opened it."""
        flow = await self._broker.flow(flow_id) if flow_id else None
        return flow if flow is not None and flow.return_origin else None

    async def flow_of_state(self, params: Mapping[str, Sequence[str]]) -> Flow | None:
        """Return the flow of an authorization response. Nothing is used up."""
        states = params.get("state", ())
        return await self._broker.flow_of_state(states[0]) if len(states) == 1 and states[0] else None

    async def ended(self, flow: Flow | None) -> Popup | None:
        """Return what the last page tells whom; None if the flow has not ended, or if it has nobody to tell."""
        now = await self.flow(flow.id) if flow is not None else None
        if now is None or now.return_origin is None:
            return None
        state = self._broker.flow_state(now)
        if state is FlowState.PENDING:
            return None
        name = now.key.account.server
        server = self._servers.get(name)
        return told(now.return_origin, state, flow=now.id, server=server.server_id if server is not None else name)


def told(origin: str, state: FlowState, *, flow: str | None, server: str | None) -> Popup:
    """Return what a last page tells an origin; ``flow`` is None if none was begun."""
    message = {"type": TYPE, "status": state.value, "flow": flow, "server": server}
    return Popup(origin=origin, message=json.dumps(message))


def keep_opener(response: Response) -> Response:
    """Let the page that opened this one keep its reference, and this one hear of its opener."""
    response.headers["cross-origin-opener-policy"] = "unsafe-none"
    return response


def signed_in(response: Response, onward: str) -> Response:
    """Return the answer of the sign-in; if it leads on to ``/oauth/start``, the tie to the opener is kept.

    The browser then comes from a page of ours. But any page can have led it to the sign-in, so the user is asked.
    """
    location = response.headers.get("location", "")
    if location.startswith(_STARTS):
        response.headers["location"] = f"{location}&{CONFIRM}=1"
    elif not onward.startswith(_STARTS):
        return response
    return keep_opener(response)
