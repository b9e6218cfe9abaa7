"""Flows that are finished on another device: polls until the user has decided (RFC 8628 §3.4 and §3.5)."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from mcp_auth_proxy.broker.planning import Authorizer
from mcp_auth_proxy.broker.renewal import SAVE_DELAYS
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationServerUnavailable, StoreUnavailable, TokenRefused
from mcp_auth_proxy.models import Flow, FlowStatus, Grant
from mcp_auth_proxy.oauth.device_authorization import INTERVAL_MAX, SLOW_DOWN_STEP, Poll
from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

DENIALS = {
    "access_denied": "The user declined on the other device.",
    "expired_token": "The code was not used in time. Ask again: a new one is made.",
}
"""What the errors that end a flow mean (RFC 8628 §3.5)."""


class DeviceFlows:
    """Polls for flows, one process for each; what a poll brings is stored before anything else is done."""

    def __init__(self, *, authorizer: Authorizer, flows: Flows, grants: Grants, clock: Callable[[], float]) -> None:
        self._authorizer = authorizer
        self._flows = flows
        self._grants = grants
        self._clock = clock
        self._owner = lease.new_owner()
        self._polls: SingleFlight[str, Poll | Grant | None] = SingleFlight()

    async def wait_for_decision(self, server: ServerSettings, flow: Flow) -> Grant | None:
        """Return the stored grant once the user has authorized; None where the flow was ended by someone else.

        Raises AuthorizationDenied where the user, or the authorization server, said no or nothing in time.
        """
        if flow.device is None:
            raise ValueError("the flow is not for another device")
        interval = pause = flow.device.interval
        while True:
            await asyncio.sleep(pause)
            if self._clock() >= flow.expires_at:
                raise AuthorizationDenied(DENIALS["expired_token"], "expired_token")
            try:
                # A shutdown lets it end: what it brings can't be asked for twice.
                answer = await self._polls.run(flow.id, partial(self._poll, server, flow, interval))
            except (AuthorizationServerUnavailable, StoreUnavailable) as failure:
                # RFC 8628 §3.5: a server that does not answer is asked less and less often.
                asked = failure.retry_after if isinstance(failure, AuthorizationServerUnavailable) else 0.0
                pause = min(max(2 * pause, asked), INTERVAL_MAX)
                logger.debug("polling for server %s: %s", server.name, failure)
                continue
            if not isinstance(answer, Poll):
                return answer
            if answer is Poll.SLOW_DOWN:
                interval = min(interval + SLOW_DOWN_STEP, INTERVAL_MAX)
            pause = interval

    async def settle(self) -> None:
        """Let the polls that are under way end, bounded."""
        await self._polls.settle(timeout=10.0)
        await self._polls.aclose()

    async def _poll(self, server: ServerSettings, flow: Flow, interval: float) -> Poll | Grant | None:
        """One poll. None: the flow is not pending any more."""
        now = self._clock()
        stored = await self._grants.current(flow.key.account)
        if stored is not None and stored.granted_at > flow.created_at:
            # Another authorization came first, or this one's code is spent already: polling on might end its grant.
            await self._flows.finish(flow.id, FlowStatus.DONE)
            return stored
        if not await self._flows.claim_poll(flow.id, owner=self._owner, now=now, next_poll_at=now + interval):
            current = await self._flows.get(flow.id)
            return Poll.PENDING if current is not None and current.status is FlowStatus.PENDING else None
        try:
            answer = await self._authorizer.poll(server, flow)
        except TokenRefused as refused:
            if refused.error == "invalid_client":
                await self._authorizer.forget_client(flow.registration)
            raise AuthorizationDenied(DENIALS.get(refused.error, str(refused)), refused.error) from None
        if isinstance(answer, Poll):
            return answer
        stored = await self._save_with_retry(flow, answer)
        if stored is None:
            await self._authorizer.discard(server, answer)
        return stored

    async def _save_with_retry(self, flow: Flow, grant: Grant) -> Grant | None:
        for delay in SAVE_DELAYS:
            try:
                return await self._grants.add_from(grant, flow.id)
            except StoreUnavailable as failure:
                logger.error("the tokens of server %s can't be stored yet: %s", flow.key.account.server, failure)
                await asyncio.sleep(delay)
        return await self._grants.add_from(grant, flow.id)
