"""Follow a browser through a flow: it opens the link, is redirected, and comes back to the callback."""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.broker import ownership
from mcp_auth_proxy.broker.forgotten_clients import ForgottenClients
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.broker.sign_ins import SignIn, SignIns, sign_in
from mcp_auth_proxy.broker.visits import LinkVisits
from mcp_auth_proxy.errors import CallbackRefused, CopyAddress
from mcp_auth_proxy.models import HEADLESS_ATTEMPT, Attempt, DeviceAuthorization, Flow, FlowStatus
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.store.flows import Flows

COOKIE_PREFIX = "mcp_auth_flow_"

_CONFIRMED = "confirmed."
"""What the cookie of an attempt starts with whose user has confirmed. Its hash is stored, so a browser can't add it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationRedirect:
    """Where to send the browser that opened a link, and the cookie that ties the callback to this browser."""

    authorization_url: str = field(repr=False)
    cookie_name: str
    cookie_value: str = field(repr=False)
    max_age: int
    """Seconds that the cookie is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePrompt:
    """What to show to a user who authorizes on another device."""

    server: str
    device: DeviceAuthorization
    sign_in: SignIn


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectedServer:
    """A server whose user has authorized, and the authorization server that they did it at."""

    server: str
    issuer: str
    label: str = ""
    """Whose account it is, as far as the authorization server said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationPrompt:
    """What a user has to confirm before their browser is redirected. ``max_age``: seconds that the link can be used."""

    flow_id: str
    sign_in: SignIn
    max_age: int
    visited: bool
    """Whether a browser was sent to sign in already, and has not come back: the client may be forgotten there."""


class AcceptedCallback(NamedTuple):
    """The flow and the attempt that a callback belongs to. ``confirmed``: whether the user had to confirm, and did."""

    flow: Flow
    attempt: Attempt
    confirmed: bool


class AuthorizationAttempts:
    """Open links and accept callbacks. Each attempt has its own state, verifier and cookie, good for one callback."""

    def __init__(
        self,
        *,
        flows: Flows,
        sign_ins: SignIns,
        visits: LinkVisits,
        clients: ForgottenClients,
        clock: Callable[[], float],
    ) -> None:
        self._flows = flows
        self._clients = clients
        self._sign_ins = sign_ins
        self._visits = visits
        self._clock = clock

    async def open(
        self, server: str, flow_id: str, may_open: MayOpen = ownership.anyone
    ) -> AuthorizationRedirect | ConfirmationPrompt | DevicePrompt | ConnectedServer:
        """Start an attempt for a link, unless its user has to confirm first, or has authorized with it.

        Raises CallbackRefused if the link is unknown, has failed or is too old, or is not for this user (403),
        AuthorizationError if the authorization server has no page to sign in at, and StoreError.
        """
        flow = await self._usable(server, flow_id, may_open)
        if flow.status is FlowStatus.DONE:
            return ConnectedServer(server=server, issuer=flow.key.issuer)
        if flow.device is not None:
            return _device_prompt(flow, flow.device)
        if self._visits.is_direct(flow) and not await self._sign_ins.need_confirmation(flow):
            return await self._start(flow, confirmed=False)
        return ConfirmationPrompt(
            flow_id=flow_id,
            sign_in=sign_in(flow),
            max_age=self._seconds_left(flow),
            visited=await self._clients.was_visited(flow),
        )

    async def confirm(
        self, server: str, flow_id: str, may_open: MayOpen = ownership.anyone
    ) -> AuthorizationRedirect | DevicePrompt:
        """Start an attempt for a link whose user has confirmed. Raises as ``open`` does, also if the link was used."""
        flow = await self._usable(server, flow_id, may_open)
        if flow.status is FlowStatus.DONE:
            raise _ended(flow)
        if flow.device is not None:
            return _device_prompt(flow, flow.device)
        return await self._start(flow, confirmed=True)

    async def _usable(self, server: str, flow_id: str, may_open: MayOpen) -> Flow:
        """Return a flow that waits for its user, or one that is done."""
        found = await self._find(server, flow_id)
        ownership.require(may_open, found.key.account)
        flow = await self._clients.newest(found)
        if flow.status is FlowStatus.DONE:
            return flow
        if flow.status is not FlowStatus.PENDING or flow.expires_at <= self._clock():
            raise _ended(flow)
        if flow.ends_elsewhere:
            raise CallbackRefused("A program has begun this authorization, and only it can finish it.", 403)
        return flow

    async def _start(self, flow: Flow, *, confirmed: bool) -> AuthorizationRedirect:
        flow = await self._clients.follow(flow)
        state = authorization_code.new_state()
        verifier = authorization_code.new_verifier()
        cookie = (_CONFIRMED if confirmed else "") + secrets.token_urlsafe(32)
        secret_values.remember(state)
        added = await self._flows.add_attempt(
            Attempt(
                flow_id=flow.id,
                state_hash=digest(state),
                browser_hash=digest(cookie),
                code_verifier=verifier,
                created_at=self._clock(),
                expires_at=flow.expires_at,
            )
        )
        if not added:
            # The flow has ended since it was read.
            raise _ended(await self._find(flow.key.account.server, flow.id))
        return AuthorizationRedirect(
            authorization_url=authorization_code.authorization_url(flow, state=state, code_verifier=verifier),
            cookie_name=cookie_name(state),
            cookie_value=cookie,
            max_age=self._seconds_left(flow),
        )

    def _seconds_left(self, flow: Flow) -> int:
        return max(1, int(flow.expires_at - self._clock()))

    async def _find(self, server: str, flow_id: str) -> Flow:
        flow = await self._flows.get(flow_id)
        if flow is None or flow.key.account.server != server:
            raise CallbackRefused("This link is not known here. Ask your MCP client again: it gets a new one.", 404)
        return flow

    async def accept(
        self,
        params: Mapping[str, Sequence[str]],
        cookies: Mapping[str, str],
        may_open: MayOpen = ownership.anyone,
    ) -> AcceptedCallback:
        """Find the attempt that a callback belongs to, and use it up (RFC 6749 §10.12, RFC 9700 §2.1).

        Raises CallbackRefused: 400 if the state is unknown or used, 403 if another browser made the attempt, or if the
        browser's user is not the one that it is for (any more). A 403 does not use it up.
        """
        states = params.get("state", ())
        if len(states) != 1 or not states[0]:
            raise CallbackRefused("This page must be opened with exactly one 'state', as an authorization server does.")
        state = states[0]
        unknown_state = CallbackRefused(
            "This authorization is not known here: it was finished already, or it is older than 10 minutes. "
            "Ask your MCP client again: it gets a new link."
        )
        found = await self._flows.find_attempt(digest(state))
        if found is None:
            raise unknown_state
        if found[1].browser_hash == HEADLESS_ATTEMPT:
            raise CopyAddress
        cookie = cookies.get(cookie_name(state), "")
        if not hmac.compare_digest(digest(cookie), found[1].browser_hash):
            raise CallbackRefused(
                "This authorization was started in another browser. Open the link in this one, and finish it here.", 403
            )
        ownership.require(may_open, found[0].key.account)
        taken = await self._flows.take_attempt(digest(state), self._clock())
        if taken is None:
            raise unknown_state
        return AcceptedCallback(*taken, confirmed=cookie.startswith(_CONFIRMED))


def _device_prompt(flow: Flow, device: DeviceAuthorization) -> DevicePrompt:
    return DevicePrompt(server=flow.key.account.server, device=device, sign_in=sign_in(flow))


def _ended(flow: Flow) -> CallbackRefused:
    if flow.status is FlowStatus.DONE:
        return CallbackRefused("This link has been used, and the server is connected. Nothing is left to do.", 410)
    return CallbackRefused("This link is no longer valid. Ask your MCP client again: it gets a new one.", 410)


def digest(value: str) -> str:
    """Return the hash of a state or a cookie; only the hash is stored."""
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


def cookie_name(state: str) -> str:
    """Return the name of an attempt's cookie: one per attempt, so that two flows in one browser do not collide."""
    return COOKIE_PREFIX + digest(state)[:12]
