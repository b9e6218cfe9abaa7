"""Flows that somebody asks for by the API or with a page: how the user gets there, and who hears of the end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.broker.sign_ins import sign_in
from mcp_auth_proxy.config.settings import AccountSettings, ServerSettings
from mcp_auth_proxy.errors import RedirectRefused, excerpt
from mcp_auth_proxy.models import Account, Flow, FlowMode, FlowStatus
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.store.flows import CANCELLED


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRequest:
    """What a flow is to be like."""

    mode: FlowMode = FlowMode.BROWSER
    scopes: tuple[str, ...] | None = None
    """None: as without the request."""
    return_origin: str | None = None
    redirect_uri: str | None = None
    """Where the code of a headless authorization goes; None: to the proxy."""

    def fits(self, flow: Flow) -> bool:
        """Return whether a flow that is under way is what is asked for."""
        return (
            mode_of(flow) is self.mode
            and (None in (self.return_origin, flow.return_origin) or flow.return_origin == self.return_origin)
            and flow.redirect_uri == (self.redirect_uri or flow.registration.redirect_uri)
            and set(self.scopes or ()) <= set(flow.scopes)
        )

    def apply(self, flow: Flow) -> Flow:
        """Return a new flow as it is asked for."""
        redirect_uri = self.redirect_uri or flow.redirect_uri
        return replace(flow, mode=self.mode, return_origin=self.return_origin, redirect_uri=redirect_uri)

    def check(self, plan: Plan) -> None:
        """Check that the code goes where it may go. Raises RedirectRefused."""
        own = plan.registration.redirect_uri
        if self.redirect_uri not in (None, own, *plan.redirect_uris):
            raise RedirectRefused(f"must be {own}, or stand in the oauth-client of the server")

    def settings(self, account: Account, server: ServerSettings) -> ServerSettings:
        """Return the settings to plan with: those of the server, with the scopes that are asked for."""
        if self.scopes is None:
            return server
        preset = replace(server.accounts.get(account.name, AccountSettings()), scopes=self.scopes)
        return replace(server, accounts={**server.accounts, account.name: preset})


class FlowState(StrEnum):
    """How a flow is, for those who asked for it."""

    PENDING = "pending"
    CONNECTED = "connected"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


def state_of(flow: Flow, now: float) -> FlowState:
    """Return how a flow is at ``now`` (Unix seconds)."""
    match flow.status:
        case FlowStatus.DONE:
            return FlowState.CONNECTED
        case FlowStatus.FAILED:
            return FlowState.CANCELLED if flow.reason == CANCELLED else FlowState.FAILED
        case FlowStatus.PENDING:
            return FlowState.PENDING if flow.expires_at > now else FlowState.EXPIRED


def mode_of(flow: Flow) -> FlowMode:
    """Return how the user of a flow authorizes. Flows of requests for another device have no mode of their own."""
    return flow.mode if flow.device is None else FlowMode.DEVICE


def notice(flow: Flow) -> str:
    """Return what the user of a headless flow has to know before they sign in, which no page of ours tells them.

    Raises AuthorizationError if there is no page to sign in at.
    """
    seen = sign_in(flow)
    scopes = f", with the scopes {excerpt(' '.join(seen.scopes))}" if seen.scopes else ""
    place = f" at {seen.upstream}" if seen.upstream else ""
    return (
        f"The server {seen.server}{place} sends you to {seen.address} to sign in{scopes}. What you allow there, it can "
        "use. Continue only if you started this yourself, and if the sign-in belongs to this server."
    )


def allowed_return_origin(given: str | None, *, popup_origins: Sequence[str], public_url: str) -> str:
    """Return the origin that is told how a flow ends, as browsers write it. Raises ValueError if it is not allowed."""
    own = urls.parse(public_url).origin.serialized
    if given is None:
        return popup_origins[0] if len(popup_origins) == 1 else own
    if given != own and given not in popup_origins:
        raise ValueError("is not allowed: list the origin in the key admin.popup_origins")
    return given
