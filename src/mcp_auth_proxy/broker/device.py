"""Flows that the user completes on another device: poll until the user has decided (RFC 8628 §3.4, §3.5)."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial

from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.matching import configured_for
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationServerUnavailable, StoreUnavailable, TokenRefused
from mcp_auth_proxy.models import Flow, FlowStatus, Grant
from mcp_auth_proxy.oauth.device_authorization import INTERVAL_MAX, SLOW_DOWN_STEP, Poll
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

SAVE_DELAYS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to store tokens that have been issued."""

DENIALS = {
    "access_denied": "The user declined on the other device.",
    "expired_token": "The code was not used in time. Ask again: a new one is made.",
}
"""What the errors that end a flow mean (RFC 8628 §3.5)."""


class DevicePolls:
    """Poll for flows, in one process per flow. The grant that a poll brings is stored before anything else."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        token_client: TokenClient,
        registrar: ClientRegistrar,
        flows: Flows,
        grants: Grants,
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._token_client = token_client
        self._registrar = registrar
        self._flows = flows
        self._grants = grants
        self._clock = clock
        self._owner = grants.owners.new()
        self._polls: SingleFlight[str, Poll | Grant | None] = SingleFlight()

    async def wait_for_decision(self, flow: Flow) -> Grant | None:
        """Return the stored grant once the user has authorized; None if the flow was ended by someone else.

        Raises AuthorizationDenied if the user or the authorization server said no, or if time ran out;
        AuthorizationError if the server was removed or reconfigured.
        """
        if flow.device is None:
            raise ValueError("the flow is not for another device")
        interval = delay = flow.device.interval
        while True:
            await asyncio.sleep(delay)
            if self._clock() >= flow.expires_at:
                raise AuthorizationDenied(DENIALS["expired_token"], "expired_token")
            server = configured_for(self._servers, flow)
            try:
                # Cancelling the wait does not cancel the poll: a device code brings tokens only once.
                answer = await self._polls.run(flow.id, partial(self._poll, server, flow, interval))
            except (AuthorizationServerUnavailable, StoreUnavailable) as failure:
                # RFC 8628 §3.5: if the server does not answer, each wait is twice as long.
                asked = failure.server_retry_after if isinstance(failure, AuthorizationServerUnavailable) else 0.0
                delay = max(min(2 * delay, INTERVAL_MAX), asked)
                logger.debug("polling for server %s: %s", server.name, failure)
                continue
            if not isinstance(answer, Poll):
                return answer
            if answer is Poll.SLOW_DOWN:
                interval = min(interval + SLOW_DOWN_STEP, INTERVAL_MAX)
            delay = interval

    async def settle(self) -> None:
        """Wait at most 10 seconds for the polls in progress to end."""
        await self._polls.settle(timeout=10.0)
        await self._polls.aclose()

    async def _poll(self, server: ServerSettings, flow: Flow, interval: float) -> Poll | Grant | None:
        """Poll once. Return None if the flow is no longer pending."""
        now = self._clock()
        stored = await self._grants.current(flow.key.account)
        if stored is not None and stored.granted_at > flow.created_at:
            # Another authorization was faster, or this code is used up already: one more poll might end its grant.
            await self._flows.finish(flow.id, FlowStatus.DONE)
            return stored
        if not await self._flows.claim_poll(flow.id, owner=self._owner, now=now, next_poll_at=now + interval):
            current = await self._flows.get(flow.id)
            return Poll.PENDING if current is not None and current.status is FlowStatus.PENDING else None
        try:
            answer = await self._token_client.poll(server, flow)
        except TokenRefused as refused:
            if refused.error == "invalid_client":
                await self._registrar.forget(flow.registration)
            raise AuthorizationDenied(DENIALS.get(refused.error, str(refused)), refused.error) from None
        if isinstance(answer, Poll):
            return answer
        stored = await self._save_with_retry(flow, answer)
        if stored is None:
            await self._token_client.discard(server, answer)
        return stored

    async def _save_with_retry(self, flow: Flow, grant: Grant) -> Grant | None:
        for delay in SAVE_DELAYS:
            try:
                return await self._grants.add_from(grant, flow.id)
            except StoreUnavailable as failure:
                logger.error("the tokens of server %s can't be stored yet: %s", flow.key.account.server, failure)
                await asyncio.sleep(delay)
        return await self._grants.add_from(grant, flow.id)
