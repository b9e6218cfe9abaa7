"""The authorizations that wait for a user: started, resumed, replaced, completed or failed."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from mcp_auth_proxy.broker.client_registration import public_url_of, redirect_uri
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal
from mcp_auth_proxy.broker.device import DevicePolls
from mcp_auth_proxy.broker.matching import configured, configured_for, matches
from mcp_auth_proxy.broker.pending import PendingAuthorization, link_of
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.broker.token_cache import CachedToken, TokenCache
from mcp_auth_proxy.broker.turns import take_turn
from mcp_auth_proxy.config.settings import AccountSettings, ServerSettings
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, McpAuthProxyError, StoreError
from mcp_auth_proxy.models import AccessToken, Account, Flow, FlowMode, FlowStatus, Grant, GrantType
from mcp_auth_proxy.oauth import dpop, scopes
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.device_authorization import DeviceGrantStart
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.store.flows import CANCELLED, Flows, start_lease
from mcp_auth_proxy.store.leases import Leases

T = TypeVar("T")

logger = logging.getLogger(__name__)

FLOW_LIFETIME = 600.0
"""Seconds that a link can be used."""

MIN_LINK_LIFETIME = 60.0
"""Seconds that a link must still be usable when it is given out; if its whole life is short, a tenth of that."""

MANY = 1000
"""Pending authorizations at which those whose links have expired are dropped: a caller may name any account."""

LONGEST_START = 25.0
"""Seconds after which another process may begin a flow though one that is about to has not made it."""

Announce = Callable[[Flow, str], None]
"""Called with each new flow and its link."""

Fits = Callable[[Flow], bool]
"""Return whether a flow that somebody else has begun will do."""


def has_link(flow: Flow) -> bool:
    """Return whether a flow has a link of ours, which every browser can use."""
    return not flow.ends_elsewhere


class PendingFlows:
    """The pending authorization of each account. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        flows: Flows,
        tokens: TokenCache,
        device_polls: DevicePolls,
        leases: Leases,
        public_url: str,
        announce: Announce,
        journal: ConnectionJournal,
        opens_window: Callable[[Flow], bool],
        is_served: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        """``servers`` may change at any time; see ``servers_changed``.

        ``opens_window`` says whether ``announce`` opens a flow's link in a browser, ``is_served`` whether a process on
        this machine and store runs now that browsers reach at a URL.
        """
        self._servers = servers
        self._flows = flows
        self._tokens = tokens
        self._device_polls = device_polls
        self._journal = journal
        self._public_url = public_url
        self._announce = announce
        self._opens_window = opens_window
        self._is_served = is_served
        self._clock = clock
        self._leases = leases
        self._owner = leases.owners.new()
        self._pending: dict[Account, PendingAuthorization] = {}
        self._following: dict[str, asyncio.Task[None]] = {}
        """By flow id: the tasks that wait for a decision on another device."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Stop waiting for other devices. A poll in progress may end: its device code can't be used again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._device_polls.settle()

    # What is pending

    def __contains__(self, account: Account) -> bool:
        return account in self._pending

    def get(self, account: Account) -> PendingAuthorization | None:
        """Return the pending authorization of an account."""
        return self._pending.get(account)

    def usable(self, account: Account, *, elsewhere: bool = False) -> PendingAuthorization | None:
        """Return the pending authorization of an account, if its link can be used for a while.

        ``elsewhere``: also one that only a program can finish (``Flow.ends_elsewhere``).
        """
        pending = self._pending.get(account)
        if pending is None or pending.done or (pending.flow.ends_elsewhere and not elsewhere):
            return None
        return pending if self._is_usable(pending.flow) and self._is_reachable(pending.flow) else None

    def needs_fresh_link(self, pending: PendingAuthorization) -> bool:
        """Return whether a link is too old to be given out.

        A flow on another device is never replaced: its code comes from the authorization server.
        """
        return not pending.done and pending.flow.device is None and not self._is_usable(pending.flow)

    def names(self, principal: str, server: str) -> set[str]:
        """Return the accounts of a principal at a server that can be authorized now."""
        now = self._clock()
        return {
            account.name
            for account, pending in self._pending.items()
            if (account.principal, account.server) == (principal, server) and pending.flow.expires_at > now
        }

    def all(self) -> list[PendingAuthorization]:
        return list(self._pending.values())

    def _is_usable(self, flow: Flow) -> bool:
        needed = min(MIN_LINK_LIFETIME, 0.1 * (flow.expires_at - flow.created_at))
        return flow.expires_at - self._clock() >= needed

    # Start and resume

    async def start(self, flow: Flow, fits: Fits = has_link) -> PendingAuthorization:
        """Store a new flow and announce its link, unless another process has made one meanwhile: then return that one.

        ``fits`` says whether another flow will do. Raises AuthorizationError if its server was removed or reconfigured
        in the meantime, and StoreError.
        """
        server = configured(self._servers, flow.key.account.server)

        def adopts(other: Flow) -> bool:
            same_kind = (other.mode, other.device is None) == (flow.mode, flow.device is None)
            enough = set(flow.scopes) <= set(other.scopes)
            return same_kind and enough and self._is_usable(other) and self._matches(other, server) and fits(other)

        opened_by = self._owner if self._opens_window(flow) else ""
        stored = await self._flows.begin(flow, adopts=adopts, opened_by=opened_by)
        if stored.id != flow.id:
            return self._adopt(stored)
        try:
            configured_for(self._servers, flow)
        except AuthorizationError as error:
            await self._flows.finish(flow.id, FlowStatus.FAILED, str(error))
            raise
        metrics.flows.labels(metrics.server_label(flow.key.account.server), "started").inc()
        pending = self._track(flow, made_here=True)
        if not flow.ends_elsewhere:
            self._announce(flow, pending.link)
        return pending

    async def in_turn(
        self, account: Account, look: Callable[[], Awaitable[T | None]], work: Callable[[], Awaitable[T]]
    ) -> T:
        """Return what ``look`` finds once no other process begins a flow of the account, else what ``work`` makes."""
        return await take_turn(
            self._leases, start_lease(account), clock=self._clock, longest=LONGEST_START, look=look, work=work
        )

    def known_grant(self, account: Account) -> Grant | None:
        """Return the grant of an account that this process knows of."""
        cached = self._tokens.get(account)
        return None if cached is None else cached.grant

    async def granted_since(self, account: Account, known: Grant | None) -> AccessToken | None:
        """Return the token of a new grant, which another process has stored since ``known`` was the one in use."""
        stored = await self._tokens.stored(account)
        if stored is None or (known is not None and stored.granted_at == known.granted_at):
            return None
        return self.activate(stored).token

    async def tell(self, pending: PendingAuthorization, return_origin: str | None) -> PendingAuthorization | None:
        """Let the origin of a page hear how a flow ends. Return None if another origin does. Raises StoreError."""
        flow = pending.flow
        if return_origin is None or flow.return_origin is not None:
            return pending
        if await self._flows.tell(flow, return_origin):
            return self._track(replace(flow, return_origin=return_origin), made_here=pending.made_here)
        stored = await self._flows.get(flow.id)
        if stored is None or stored.return_origin in (None, return_origin):
            return pending
        self._track(stored, made_here=pending.made_here)
        return None

    async def claim_window(self, flow: Flow) -> bool:
        """Return whether this process may open the link of a flow in a browser. Raises StoreError."""
        return await self._flows.claim_window(flow, owner=self._owner, now=self._clock())

    async def replace(self, flow: Flow) -> None:
        """Store a flow that follows the one that is pending, without announcing it. Raises StoreError."""
        await self._flows.save(flow)
        self._track(flow, made_here=True)

    async def resume(
        self, account: Account, challenge: BearerChallenge | None, fits: Fits = has_link
    ) -> PendingAuthorization | None:
        """Return a stored flow that an earlier run or another process started, if it can still be used.

        ``fits`` says whether a flow will do.
        """
        server = configured(self._servers, account.server)
        wanted = set((challenge and challenge.scopes) or ())
        for flow in await self._flows.all_live(account, self._clock()):
            if self._is_usable(flow) and self._matches(flow, server) and wanted <= set(flow.scopes) and fits(flow):
                return self._adopt(flow)
        return None

    def _adopt(self, flow: Flow) -> PendingAuthorization:
        """Wait for a flow that another process has started."""
        pending = self._track(flow)
        if flow.mode is not FlowMode.HEADLESS:
            # The process that started the flow opened the browser; the user of this one may be looking for the link.
            logger.warning(
                "server %s still needs your authorization, open this link: %s", flow.key.account.shown, pending.link
            )
        return pending

    async def resume_device_flows(self) -> None:
        """Poll again for the stored flows on other devices. Raises StoreError."""
        for flow in await self._flows.devices(self._clock()):
            server = self._servers.get(flow.key.account.server)
            if server is not None and self._matches(flow, server):
                self._track(flow)

    def _matches(self, flow: Flow, server: ServerSettings) -> bool:
        return matches(flow, server) and self._is_reachable(flow)

    def _is_reachable(self, flow: Flow) -> bool:
        """Return whether the callback of a flow comes to this process, or to another that runs on the same store."""
        if flow.device is not None or flow.ends_elsewhere:
            return True
        own = redirect_uri(self._public_url, GrantType.AUTHORIZATION_CODE)
        return flow.redirect_uri == own or self._is_served(public_url_of(flow.redirect_uri))

    def link(self, flow: Flow) -> str:
        """Return the link of a flow, which leads to the process that its callback comes to."""
        own = flow.device is not None or flow.ends_elsewhere
        return link_of(flow, self._public_url if own else public_url_of(flow.redirect_uri))

    def _track(self, flow: Flow, *, made_here: bool = False) -> PendingAuthorization:
        account = flow.key.account
        link = self.link(flow)
        before = self._pending.get(account)
        if before is not None and not before.done:
            pending = before.replaced_by(flow, link, made_here=made_here)
        else:
            pending = PendingAuthorization(flow, link, asyncio.get_running_loop().create_future(), made_here)
        if len(self._pending) >= MANY:
            self._drop_expired()
        self._pending[account] = pending
        if flow.device is not None and flow.id not in self._following:
            self._following[flow.id] = task = self._spawn(self._follow_device(flow))
            task.add_done_callback(lambda _: self._following.pop(flow.id, None))
        return pending

    def _drop_expired(self) -> None:
        """Drop what nobody can complete any more. Who still waits for it gets a new link."""
        now = self._clock()
        for account in [key for key, pending in self._pending.items() if pending.flow.expires_at <= now]:
            del self._pending[account]

    async def _follow_device(self, flow: Flow) -> None:
        """Wait for the user on another device, then let everyone who waits continue."""
        server = flow.key.account.server
        try:
            grant = await self._device_polls.wait_for_decision(flow)
            if grant is not None:
                self.activate(grant)
                metrics.flows.labels(metrics.server_label(server), "completed").inc()
                logger.info("server %s is connected", server)
        except AuthorizationError as error:
            logger.warning("server %s was not authorized: %s", server, error)
            self._journal.not_authorized(flow.key.account, str(error))
            with contextlib.suppress(StoreError):
                await self._flows.finish(flow.id, FlowStatus.FAILED, str(error))
            self.drop(flow, error)
        except StoreError as error:
            logger.error("the authorization of server %s could not be stored: %s", server, error)
            self.drop(flow, AuthorizationDenied(str(error)))

    # Complete and fail

    def activate(self, grant: Grant, *, elsewhere: bool = False) -> CachedToken:
        """Use a new grant, and let everyone who waits for it continue.

        ``elsewhere``: another process has received and stored it. Raises AuthorizationError if the server was removed
        or reconfigured in the meantime.
        """
        account = grant.key.account
        cached = self._tokens.put(account, grant)
        cached.used = True
        self._journal.connected(account, elsewhere=elsewhere)
        pending = self._pending.pop(account, None)
        if pending is not None:
            pending.release(cached.token)
        return cached

    async def fail(self, flow: Flow, error: McpAuthProxyError) -> None:
        """Fail a flow, in the store and for everyone who waits for it. Raises StoreError."""
        await self._flows.finish(flow.id, FlowStatus.FAILED, str(error))
        self._journal.not_authorized(flow.key.account, str(error))
        self.drop(flow, error)

    def drop(self, flow: Flow, error: McpAuthProxyError) -> None:
        """Raise an error for everyone who waits for a flow. The store is not changed."""
        account = flow.key.account
        pending = self._pending.get(account)
        if pending is not None and pending.flow.id == flow.id:
            del self._pending[account]
            metrics.flows.labels(metrics.server_label(account.server), "failed").inc()
            denied = AuthorizationDenied(str(error))
            denied.retry_after = error.retry_after if isinstance(error, AuthorizationError) else None
            pending.fail(denied)

    def cancel(self, account: Account) -> None:
        """Raise an error for everyone who waits for an account's flow, and stop polling for it."""
        pending = self._pending.get(account)
        if pending is not None:
            self._stop_following(pending.flow)
            self.drop(pending.flow, AuthorizationDenied(CANCELLED))

    def cancel_flow(self, flow: Flow) -> None:
        """Raise an error for everyone who waits for a flow that was cancelled, and stop polling for it."""
        self._stop_following(flow)
        self.drop(flow, AuthorizationDenied(CANCELLED))

    def servers_changed(self, names: Collection[str]) -> None:
        """Fail the flows of these servers that no longer match the configuration."""
        for pending in self.all():
            flow = pending.flow
            if flow.key.account.server not in names:
                continue
            try:
                configured_for(self._servers, flow)
            except AuthorizationError as error:
                logger.warning("a pending authorization has ended: %s", error)
                self._stop_following(flow)
                self.drop(flow, error)
                self._spawn(self._finish(flow, error))

    async def _finish(self, flow: Flow, error: AuthorizationError) -> None:
        """Mark a flow as failed in the store, so that its link says why it can't be used."""
        with contextlib.suppress(StoreError):
            await self._flows.finish(flow.id, FlowStatus.FAILED, str(error))

    def _stop_following(self, flow: Flow) -> None:
        task = self._following.get(flow.id)
        if task is not None:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def new_flow(plan: Plan, *, now: float, device: DeviceGrantStart | None = None, further: bool = False) -> Flow:
    """Return a flow for a plan, not yet stored.

    ``device`` if the user authorizes on another device. ``further``: the principal has another account there already.
    """
    return Flow(
        id=secrets.token_urlsafe(24),
        key=plan.key,
        registration=plan.registration,
        endpoints=plan.endpoints,
        scopes=plan.scopes,
        redirect_uri=plan.registration.redirect_uri,
        iss_supported=plan.metadata.iss_parameter_supported,
        extra_params=tuple(_extra_params(plan, further=further).items()),
        created_at=now,
        expires_at=now + (FLOW_LIFETIME if device is None else device.lifetime),
        device=None if device is None else device.device,
        dpop_key=plan.new_dpop_key(),
    )


def _extra_params(plan: Plan, *, further: bool) -> dict[str, str]:
    """Return the parameters that the configuration adds to the authorization request; those of the account win.

    For a further account the authorization server is asked to let the user choose one (OpenID Connect Core §3.1.2.1):
    else it would use the account that the browser is signed in with.
    """
    account = plan.server.accounts.get(plan.key.account.name, AccountSettings())
    consent = " consent" if scopes.OFFLINE_ACCESS in plan.scopes else ""
    params = {"prompt": f"select_account{consent}"} if further else {}
    params.update(plan.server.oauth.authorization_params)
    if account.login_hint is not None:
        params["login_hint"] = account.login_hint
    params.update(account.authorization_params)
    return params


def clone_flow(flow: Flow, *, now: float) -> Flow:
    """Return a flow, not yet stored, that asks a browser for the same as an older one."""
    return replace(
        flow,
        id=secrets.token_urlsafe(24),
        created_at=now,
        expires_at=now + FLOW_LIFETIME,
        dpop_key=dpop.Key.generate().text if flow.dpop_key else None,
    )
