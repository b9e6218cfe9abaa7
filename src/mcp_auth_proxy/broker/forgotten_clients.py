"""Register again for a link that is opened a second time: perhaps its authorization server has forgotten the client.

Such a server shows an error page instead of redirecting back (RFC 6749 §4.1.2.1), so the proxy never hears of it. The
second visit therefore gets a flow of its own with a new registration. What the first visit began stays good: the server
may know the client after all.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from mcp_auth_proxy.broker.flows import clone_flow
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, excerpt
from mcp_auth_proxy.models import Flow, FlowStatus, Registration, RegistrationKind
from mcp_auth_proxy.store.flows import Flows

logger = logging.getLogger(__name__)


class ForgottenClients:
    """The flows that followed others with a new registration, at most one for each link. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        flows: Flows,
        register: Callable[[Flow], Awaitable[Registration]],
        start: Callable[[Flow], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        """``servers`` may change at any time. ``register`` makes a new registration for a flow, ``start`` stores the
        flow that has it.
        """
        self._servers = servers
        self._flows = flows
        self._register = register
        self._start = start
        self._clock = clock
        self._followed: dict[str, Flow] = {}
        """By flow id: the flow that follows it, or itself if no registration could be made or it follows another."""
        self._first: dict[str, Flow] = {}
        """By the id of a flow that follows another: that other one."""
        self._running: SingleFlight[str, Flow] = SingleFlight()

    async def aclose(self) -> None:
        await self._running.aclose()

    async def newest(self, flow: Flow) -> Flow:
        """Return the flow that a link stands for now. Raises StoreError."""
        follower = self._followed.get(flow.id, flow)
        if flow.status is not FlowStatus.PENDING or follower.id == flow.id:
            return flow
        return await self._flows.get(follower.id) or flow

    def other(self, flow: Flow) -> Flow | None:
        """Return the other flow of the same link: if one ends, so does the other. None if there is none."""
        followed = self._followed.get(flow.id, flow)
        return self._first.get(flow.id) if followed.id == flow.id else followed

    async def was_visited(self, flow: Flow) -> bool:
        """Return whether a browser was sent to sign in with a registration that may be forgotten. Raises StoreError."""
        return flow.registration.kind is RegistrationKind.DYNAMIC and await self._flows.was_visited(flow.id)

    async def follow(self, flow: Flow) -> Flow:
        """Return the flow to send a browser to sign in with: another one at the second visit. Raises StoreError."""
        if flow.id in self._followed or not await self.was_visited(flow):
            return await self.newest(flow)
        return await self._running.run(flow.id, lambda: self._follow(flow))

    async def _follow(self, flow: Flow) -> Flow:
        if flow.id in self._followed:
            # Another visit was faster.
            return await self.newest(flow)
        now, server = self._clock(), flow.key.account.server
        for flow_id in [flow_id for flow_id, followed in self._followed.items() if followed.expires_at <= now]:
            del self._followed[flow_id]
            self._first.pop(flow_id, None)
        settings = self._servers.get(server)
        name = settings.command_name if settings is not None else server
        remedy = f"if its sign-in page does not know the client, run: mcp-auth-proxy logout {name} --forget-client"
        try:
            registration = await self._register(flow)
        except AuthorizationError as error:
            logger.warning("server %s: a link was opened again, and no new client was registered: %s", server, error)
            logger.warning("server %s: %s", server, remedy)
            self._followed[flow.id] = flow
            return flow
        follower = replace(clone_flow(flow, now=now), registration=registration, expires_at=flow.expires_at)
        await self._start(follower)
        self._followed[flow.id] = self._followed[follower.id] = follower
        self._first[follower.id] = flow
        logger.warning(
            "server %s: a link was opened again before anybody authorized, so its client was dropped, and a new one "
            "was registered at %s; %s",
            server,
            excerpt(flow.key.issuer),
            remedy,
        )
        return follower
