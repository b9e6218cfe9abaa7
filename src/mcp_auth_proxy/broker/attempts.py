"""Follow a browser through a flow: it opens the link, is redirected, and comes back to the callback."""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.errors import CallbackRefused
from mcp_auth_proxy.models import Attempt, DeviceAuthorization, Flow, FlowStatus
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.store.flows import Flows

COOKIE_PREFIX = "mcp_auth_flow_"


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
    """What to show to a user who authorizes on another device. ``device`` is None once the user has done so."""

    server: str
    device: DeviceAuthorization | None


class AuthorizationAttempts:
    """Open links and accept callbacks. Each attempt has its own state, verifier and cookie, good for one callback."""

    def __init__(self, *, flows: Flows, clock: Callable[[], float]) -> None:
        self._flows = flows
        self._clock = clock

    async def open(self, server: str, flow_id: str) -> AuthorizationRedirect | DevicePrompt:
        """Start an attempt for a link. Raises CallbackRefused if the link is unknown, used or too old."""
        flow = await self._find(server, flow_id)
        now = self._clock()
        if flow.device is not None and flow.status is FlowStatus.DONE:
            return DevicePrompt(server=server, device=None)
        if flow.status is not FlowStatus.PENDING or flow.expires_at <= now:
            raise _ended(flow)
        if flow.device is not None:
            return DevicePrompt(server=server, device=flow.device)
        state = authorization_code.new_state()
        verifier = authorization_code.new_verifier()
        cookie = secrets.token_urlsafe(32)
        secret_values.remember(state)
        added = await self._flows.add_attempt(
            Attempt(
                flow_id=flow.id,
                state_hash=digest(state),
                browser_hash=digest(cookie),
                code_verifier=verifier,
                created_at=now,
                expires_at=flow.expires_at,
            )
        )
        if not added:
            # The flow has ended since it was read.
            raise _ended(await self._find(server, flow_id))
        return AuthorizationRedirect(
            authorization_url=authorization_code.authorization_url(flow, state=state, code_verifier=verifier),
            cookie_name=cookie_name(state),
            cookie_value=cookie,
            max_age=max(1, int(flow.expires_at - now)),
        )

    async def _find(self, server: str, flow_id: str) -> Flow:
        flow = await self._flows.get(flow_id)
        if flow is None or flow.key.account.server != server:
            raise CallbackRefused("This link is not known here. Ask your MCP client again: it gets a new one.", 404)
        return flow

    async def accept(self, params: Mapping[str, Sequence[str]], cookies: Mapping[str, str]) -> tuple[Flow, Attempt]:
        """Find the attempt that a callback belongs to, and use it up (RFC 6749 §10.12, RFC 9700 §2.1).

        Raises CallbackRefused: 400 if the state is unknown or used, 403 if another browser made the attempt. A 403
        does not use it up.
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
        cookie = cookies.get(cookie_name(state), "")
        if not hmac.compare_digest(digest(cookie), found[1].browser_hash):
            raise CallbackRefused(
                "This authorization was started in another browser. Open the link in this one, and finish it here.", 403
            )
        taken = await self._flows.take_attempt(digest(state), self._clock())
        if taken is None:
            raise unknown_state
        return taken


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
