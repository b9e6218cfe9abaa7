"""Headless flows: a program shows the authorization server's address, and brings the code that it got back.

No browser is bound to such a flow. What protects it is that only its own principal can bring the code, and that the
state was given to nobody else. The state is not stored: it is derived from the verifier, which is sealed.
"""

import base64
import hmac
from collections.abc import Callable

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.broker.attempts import AcceptedCallback, digest
from mcp_auth_proxy.errors import CallbackRefused, IssuerMissing, StateRefused, excerpt
from mcp_auth_proxy.models import HEADLESS_ATTEMPT, Attempt, Flow, FlowMode, FlowStatus
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.store.flows import Flows

_TAG_LENGTH = 16


class HeadlessAttempts:
    """Give out the addresses of headless flows, and accept the codes. Raises StoreError."""

    def __init__(self, *, flows: Flows, clock: Callable[[], float]) -> None:
        self._flows = flows
        self._clock = clock

    async def authorization_url(self, flow: Flow) -> str | None:
        """Return where the user authorizes: the same address each time, until it is used. None if it was.

        Raises AuthorizationError if the authorization server has no page to sign in at.
        """
        if flow.mode is not FlowMode.HEADLESS or flow.status is not FlowStatus.PENDING:
            return None
        attempt = await self._flows.headless_attempt(flow.id) or await self._add(flow)
        if attempt is None or attempt.expires_at <= self._clock():
            return None
        state = _state(flow, attempt.code_verifier)
        secret_values.remember(state)
        return authorization_code.authorization_url(flow, state=state, code_verifier=attempt.code_verifier)

    async def _add(self, flow: Flow) -> Attempt | None:
        verifier = authorization_code.new_verifier()
        attempt = Attempt(
            flow_id=flow.id,
            state_hash=digest(_state(flow, verifier)),
            browser_hash=HEADLESS_ATTEMPT,
            code_verifier=verifier,
            created_at=self._clock(),
            expires_at=flow.expires_at,
        )
        return attempt if await self._flows.add_attempt(attempt) else None

    async def accept(
        self, principal: str, server: str, state: str, iss: str | None, *, account: str | None = None
    ) -> AcceptedCallback:
        """Find the attempt that a state belongs to, and use it up.

        ``principal`` is that of the account, ``account`` its name; None for any of the principal's. Raises StateRefused
        and IssuerMissing, which use up nothing, and CallbackRefused (400) if the state was used, or is too old.
        """
        found = await self._flows.find_attempt(digest(state))
        if found is None:
            raise await self._ended(principal, server, state) or _foreign()
        flow, attempt = found
        key = flow.key.account
        own = (key.principal, key.server) == (principal, server) and account in (None, key.name)
        if not own or flow.mode is not FlowMode.HEADLESS or attempt.browser_hash != HEADLESS_ATTEMPT:
            raise _foreign()
        if iss is None and flow.iss_supported:
            raise IssuerMissing(f"{excerpt(flow.key.issuer)} sends iss with every code (RFC 9207 §2.4): bring it too.")
        taken = await self._flows.take_attempt(digest(state), self._clock())
        if taken is None:
            raise await self._ended(principal, server, state) or _used()
        return AcceptedCallback(*taken, confirmed=False)

    async def _ended(self, principal: str, server: str, state: str) -> CallbackRefused | None:
        """Return why the flow of a state can't be finished any more; None if the principal has no such flow here."""
        for flow in await self._flows.of_server(principal, server):
            if flow.mode is not FlowMode.HEADLESS or state.partition(".")[0] != _tag(flow):
                continue
            if flow.status is FlowStatus.PENDING and flow.expires_at <= self._clock():
                return CallbackRefused("This authorization is too old.", 400)
            if flow.status is FlowStatus.FAILED:
                return CallbackRefused("This authorization was used already, and has failed.", 400)
            return _used()
        return None


def _state(flow: Flow, verifier: str) -> str:
    """Return the state of a headless attempt: which flow it is of, and 256 bits that only the verifier gives."""
    mac = hmac.digest(verifier.encode(), b"state of " + flow.id.encode(), "sha256")
    return f"{_tag(flow)}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def _tag(flow: Flow) -> str:
    return digest(f"flow {flow.id}")[:_TAG_LENGTH]


def _foreign() -> StateRefused:
    return StateRefused("The state is not that of a headless authorization of yours at this server.")


def _used() -> CallbackRefused:
    return CallbackRefused("This authorization was used already.", 400)
