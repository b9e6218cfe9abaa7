"""The broker: which token a request may use, and what happens when there is none.

In memory, for each (principal, server): the token in use (``TokenCache``) and the flow that waits for a user
(``PendingAuthorization``). All of it can be had again from the store; what another process writes there is noticed.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mcp_auth_proxy.broker import dpop
from mcp_auth_proxy.broker.attempts import AuthorizationAttempts, AuthorizationRedirect, DevicePrompt
from mcp_auth_proxy.broker.device import DeviceFlows
from mcp_auth_proxy.broker.pending import ChallengeHistory, PendingAuthorization
from mcp_auth_proxy.broker.planning import Authorizer, Plan, is_for
from mcp_auth_proxy.broker.renewal import renewable
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.broker.step_up import MAX_AUTHORIZATIONS, StepUpLimiter, step_up_limit
from mcp_auth_proxy.broker.token_cache import CachedToken, TokenCache
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    AuthorizationError,
    CallbackRefused,
    McpAuthProxyError,
    StoreError,
    TokenRefused,
)
from mcp_auth_proxy.models import AccessToken, Account, Flow, FlowStatus, Grant
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.store.database import Database
from mcp_auth_proxy.store.flows import CANCELLED, Flows
from mcp_auth_proxy.store.grants import Grants

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 0.5
"""Seconds between looks at whether another process has written to the store."""

PURGE_INTERVAL = 3600.0
"""Seconds between two times that old flows are deleted."""

MIN_LINK_LIFETIME = 60.0
"""Seconds that a link still has to live when it is given out; of one with a short life, a tenth of that."""

MAX_UNAUTHORIZED = 3
"""401 answers with a token that one request is carried through."""


class Broker:
    """See the module. Built by the composition root; ``announce`` is told of each new flow and its link."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        database: Database,
        authorizer: Authorizer,
        public_url: str,
        announce: Callable[[Flow, str], None],
        clock: Callable[[], float],
    ) -> None:
        self._servers = servers
        self._database = database
        self._grants = Grants(database)
        self._flows = Flows(database)
        self._authorizer = authorizer
        self._tokens = TokenCache(servers=servers, grants=self._grants, authorizer=authorizer, clock=clock)
        self._visits = AuthorizationAttempts(flows=self._flows, clock=clock)
        self._step_ups = StepUpLimiter(clock=clock)
        self._devices = DeviceFlows(authorizer=authorizer, flows=self._flows, grants=self._grants, clock=clock)
        self._public_url = public_url
        self._announce = announce
        self._clock = clock
        self._pending: dict[Account, PendingAuthorization] = {}
        self._authorizing: SingleFlight[Account, AccessToken | PendingAuthorization] = SingleFlight()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load what is stored, take up renewals that a crash cut short, and begin to watch the store."""
        await self._flows.purge(self._clock())
        await self._database.changed()
        for grant in await self._grants.all():
            account = grant.key.account
            if (
                grant.ended_at is None
                and grant.refresh_begun_at is not None
                and grant.key.account.server in self._servers
            ):
                logger.warning("a renewal for server %s was cut short; it is taken up again", grant.key.account.server)
                held = await self._tokens.load(account)
                if held is not None and renewable(held.grant):
                    self._tokens.renew_soon(account, held)
        for flow in await self._flows.devices(self._clock()):
            server = self._servers.get(flow.key.account.server)
            if server is not None and self._authorizer.fits(flow, server):
                self._track(flow.key.account, flow)
        self._spawn(self._watch())

    async def aclose(self) -> None:
        """Stop all that runs by itself. A renewal under way is waited for: its refresh token is spent already."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tokens.aclose()
        await self._devices.settle()
        await self._authorizing.aclose()

    # The three verbs

    async def token(self, account: Account) -> AccessToken | None:
        """Return the token to send, None where there is no grant.

        Raises AuthorizationServerUnavailable where the token is dead and can't be renewed now, and StoreError.
        """
        return await self._tokens.token(account)

    def token_nowait(self, account: Account) -> tuple[bool, AccessToken | None]:
        """Return whether nothing has to be waited for or begun before a request is sent, and the token to send with it.

        That is: a token in use that is not due to be renewed; or none, where no grant and no flow is known.
        """
        known, token = self._tokens.token_nowait(account)
        return known and (token is not None or account not in self._pending), token

    def pending(self, account: Account) -> PendingAuthorization | None:
        """Return the flow that waits for the user, where there is one whose link can be used for a while yet."""
        pending = self._pending.get(account)
        return pending if pending is not None and not pending.done and self._is_usable(pending.flow) else None

    async def fresh_link(self, pending: PendingAuthorization) -> PendingAuthorization:
        """Return what to answer a request with that has waited for long: a flow whose link can be used for a while yet.

        A flow on another device is not followed by another here: its code comes from the authorization server.
        Raises StoreError.
        """
        account = pending.flow.key.account
        newest = self._pending.get(account, pending)
        if newest.done or newest.flow.device is not None or self._is_usable(newest.flow):
            return newest
        outcome = await self._authorizing.run(
            account, lambda: self._start_flow(account, self._authorizer.clone_flow(newest.flow))
        )
        return outcome if isinstance(outcome, PendingAuthorization) else newest

    async def challenged(
        self,
        account: Account,
        *,
        status: int,
        challenge: Sequence[bytes],
        used: AccessToken | None,
        trail: ChallengeHistory,
        nonce: Sequence[bytes] = (),
    ) -> AccessToken | PendingAuthorization | None:
        """Answer an upstream's 401 or 403: a token to try again with, or a flow to wait for.

        ``nonce`` are the answer's DPoP-Nonce fields. None: the answer is no challenge (a 403 for another reason) and
        belongs to the client.
        Raises AuthorizationError, AuthorizationServerUnavailable, StoreError.
        """
        settings = self._servers[account.server]
        bearer = challenges.bearer(challenge)
        if not challenges.demands_authorization(status, bearer):
            return None
        held = self._tokens.get(account) or await self._tokens.load(account)
        if held is not None and (used is None or held.token.generation > used.generation):
            held.used = True
            return held.token
        if status == 401 and used is not None:
            again = trail.with_new_nonce == used.generation
            same = dpop.with_new_nonce(used, server=account.server, challenge=challenge, nonce=nonce, again=again)
            if same is not None:
                trail.with_new_nonce = used.generation
                return same
            trail.unauthorized += 1
            if held is not None and renewable(held.grant) and trail.unauthorized < MAX_UNAUTHORIZED:
                renewed = await self._tokens.renew(account, held)
                if renewed is not None:
                    renewed.used = True
                    return renewed.token
            elif trail.authorizations:
                raise AuthorizationError(
                    f"Server {account.server} refuses a token that its authorization server has just issued"
                    f"{f' ({held.grant.key.issuer})' if held else ''}. Look at "
                    f"servers.{account.server}.oauth.resource and scopes, at "
                    f"authorization_params or token_params if the provider wants an audience there "
                    f"(docs/providers.md), and at what the account may use."
                )
        trail.authorizations += 1
        if trail.authorizations > MAX_AUTHORIZATIONS:
            raise step_up_limit(account.server, (bearer and bearer.scopes) or ())
        already = held.grant.scopes if held is not None and status == 403 else None
        if status == 403 and bearer is not None and used is not None and used.signer is not None:
            # It took the proof: what is asked for on top must not be had for a weaker token.
            bearer = replace(bearer, dpop=True)
        others = challenges.other_schemes(challenge)
        return await self._authorizing.run(account, lambda: self._authorize(account, settings, bearer, already, others))

    async def complete(self, params: Mapping[str, Sequence[str]], cookies: Mapping[str, str]) -> Flow:
        """Finish the flow that a callback belongs to, and let everyone who waits for it go on.

        Raises CallbackRefused where it belongs to none, AuthorizationError where the authorization failed.
        """
        flow, attempt = await self._visits.accept(params, cookies)
        account = flow.key.account
        try:
            server = self._server_of(flow)
            code = authorization_code.check_response(params, flow=flow)
            grant = await self._authorizer.redeem(server, flow, attempt, code)
        except (AuthorizationError, CallbackRefused) as error:
            if isinstance(error, TokenRefused | AuthorizationDenied):
                await self._note_rejection(error.error, flow)
            await self._fail_flow(account, flow, str(error))
            raise
        stored = await self._grants.add_from(grant, flow.id)
        if stored is None:
            # A logout, most likely, while the code was redeemed.
            await self._authorizer.discard(server, grant)
            self._fail_pending(account, flow.id, CANCELLED)
            raise AuthorizationDenied(CANCELLED)
        await self._activate(account, stored)
        metrics.flows.labels(flow.key.account.server, "completed").inc()
        logger.info("server %s is connected", flow.key.account.server)
        return flow

    async def visit(self, server: str, flow_id: str) -> AuthorizationRedirect | DevicePrompt:
        """Begin a browser's visit to a link. Raises CallbackRefused."""
        return await self._visits.open(server, flow_id)

    # For the terminal

    async def grants(self) -> list[Grant]:
        """Return every grant that the store holds, ended ones too."""
        return await self._grants.all()

    async def logout(
        self, account: Account, server: ServerSettings, *, forget_client: bool
    ) -> tuple[list[str], list[str]]:
        """Forget the grants for a server and revoke them upstream; return what was done, and what failed, in lines."""
        done: list[str] = []
        failed: list[str] = []
        # In this order: a grant that arrives in between finds its flow cancelled, or is deleted.
        await self._flows.cancel(account)
        grants = await self._grants.delete(account)
        for grant in grants:
            if grant.ended_at is not None:
                continue
            try:
                revoked = await self._authorizer.revoke(server, grant)
            except McpAuthProxyError as error:
                failed.append(
                    f"{server.name}: forgotten here, but not revoked at {grant.key.issuer}: {error} "
                    f"Its tokens are good until they end by themselves; to end them now, withdraw the access at the "
                    f"provider, for example on its account page."
                )
            else:
                how = "forgotten here and revoked at" if revoked else "forgotten here; no revocation is offered by"
                done.append(f"{server.name}: {how} {grant.key.issuer}")
        if forget_client:
            # Also where no grant is left: that is when a registration is what stands in the way.
            await self._authorizer.forget_clients(server)
            done.append(f"{server.name}: the next authorization registers anew")
        return done, failed

    def token_states(self) -> dict[tuple[str, ...], float]:
        """Return how many cached tokens are valid, renewing or expired."""
        return self._tokens.states()

    # Configuration

    def servers_changed(self, removed: Collection[str], changed: Collection[str]) -> None:
        """Drop the tokens and pending authorizations of servers that were removed or do not match any more."""
        self._tokens.clear_negative()
        for account in {*self._tokens.keys(), *self._pending}:
            if account.server in removed or account.server in changed:
                self._tokens.evict(account)
        for account, pending in list(self._pending.items()):
            server = self._servers.get(account.server)
            if account.server in removed or server is None:
                reason = "it is no longer in the configuration."
            elif account.server in changed and not self._authorizer.fits(pending.flow, server):
                reason = "its configuration has changed. Send the request again."
            else:
                continue
            del self._pending[account]
            pending.fail(AuthorizationError(reason))

    def set_allow_private(self, hosts: tuple[str, ...]) -> None:
        """Change the private hosts and networks that metadata documents may lead to."""
        self._authorizer.set_allow_private(hosts)

    # Authorizations

    async def _authorize(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...] | None,
        schemes: tuple[str, ...],
    ) -> AccessToken | PendingAuthorization:
        """``already``: the scopes that a step-up starts from; None: this is none. ``schemes``: see ``plan``."""
        pending = self.pending(account)
        if pending is None:
            pending = await self._resume(account, server, challenge)
        if pending is not None:
            return pending
        plan = await self._authorizer.plan(account, server, challenge, already or (), schemes=schemes)
        if already is not None:
            asked = (challenge and challenge.scopes) or ()
            self._step_ups.count(account, server=server.name, asked=asked, already=already)
        if server.oauth.grant.unattended:
            return await self._obtain(account, plan)
        return await self._start_flow(account, await self._begin(plan))

    async def _start_flow(self, account: Account, flow: Flow) -> PendingAuthorization:
        await self._flows.save(flow)
        metrics.flows.labels(account.server, "started").inc()
        pending = self._track(account, flow)
        self._announce(flow, pending.link)
        return pending

    async def _obtain(self, account: Account, plan: Plan) -> AccessToken:
        try:
            grant = await self._authorizer.obtain(plan)
        except TokenRefused as refused:
            raise AuthorizationDenied(str(refused), refused.error, remedy=refused.remedy) from None
        return (await self._activate(account, await self._grants.add(grant))).token

    async def _begin(self, plan: Plan) -> Flow:
        try:
            return await self._authorizer.begin(plan)
        except TokenRefused as refused:
            await self._note_rejection(refused.error, plan)
            raise AuthorizationDenied(str(refused), refused.error, remedy=refused.remedy) from None

    async def _note_rejection(self, error: str, tried: Flow | Plan) -> None:
        """Let the next authorization do without what this one was refused for, where that is ours to change."""
        if error == "invalid_client":
            await self._authorizer.forget_client(tried.registration)
        elif error == "invalid_scope":
            self._authorizer.leave_out_offline_access(tried)

    async def _resume(
        self, account: Account, server: ServerSettings, challenge: BearerChallenge | None
    ) -> PendingAuthorization | None:
        """Take up a flow that an earlier run of the proxy began, or another process, if it still fits."""
        flow = await self._flows.live(account, self._clock())
        if flow is None or not self._is_usable(flow) or not self._authorizer.fits(flow, server):
            return None
        if not set((challenge and challenge.scopes) or ()) <= set(flow.scopes):
            return None
        pending = self._track(account, flow)
        # The browser was opened by who began it; here somebody may be looking for the link.
        logger.warning("server %s still needs your authorization, open this link: %s", server.name, pending.link)
        return pending

    def _track(self, account: Account, flow: Flow) -> PendingAuthorization:
        link = f"{self._public_url}/connect/{flow.key.account.server}?flow={flow.id}"
        before = self._pending.get(account)
        if before is not None and not before.done:
            pending = before.replaced_by(flow, link)
        else:
            pending = PendingAuthorization(flow, link, asyncio.get_running_loop().create_future())
        self._pending[account] = pending
        if flow.device is not None:
            self._spawn(self._follow_device(account, flow))
        return pending

    async def _follow_device(self, account: Account, flow: Flow) -> None:
        """Wait for the user on another device, then let everyone who waits go on."""
        try:
            grant = await self._devices.wait_for_decision(self._server_of(flow), flow)
            if grant is not None:
                await self._activate(account, grant)
                metrics.flows.labels(flow.key.account.server, "completed").inc()
                logger.info("server %s is connected", flow.key.account.server)
        except AuthorizationError as error:
            logger.warning("server %s was not authorized: %s", flow.key.account.server, error)
            await self._fail_flow(account, flow, str(error))
        except StoreError as error:
            logger.error("the authorization of server %s could not be stored: %s", flow.key.account.server, error)
            self._fail_pending(account, flow.id, str(error))

    async def _fail_flow(self, account: Account, flow: Flow, reason: str) -> None:
        metrics.flows.labels(account.server, "failed").inc()
        await self._flows.finish(flow.id, FlowStatus.FAILED, reason)
        self._fail_pending(account, flow.id, reason)

    async def _activate(self, account: Account, grant: Grant) -> CachedToken:
        held = self._tokens.put(account, grant)
        held.used = True
        pending = self._pending.pop(account, None)
        if pending is not None:
            pending.release(held.token)
        return held

    def _fail_pending(self, account: Account, flow_id: str, reason: str) -> None:
        pending = self._pending.get(account)
        if pending is not None and pending.flow.id == flow_id:
            del self._pending[account]
            pending.fail(AuthorizationDenied(reason))

    def _is_usable(self, flow: Flow) -> bool:
        rest = min(MIN_LINK_LIFETIME, 0.1 * (flow.expires_at - flow.created_at))
        return flow.expires_at - self._clock() >= rest

    def _server_of(self, flow: Flow) -> ServerSettings:
        server = self._servers.get(flow.key.account.server)
        if server is None:
            raise AuthorizationError(f"Server {flow.key.account.server} is no longer in the configuration.")
        if not is_for(flow.key, server):
            raise AuthorizationError(
                f"The configuration has given the name {flow.key.account.server} to another server or issuer "
                f"since this authorization was begun."
            )
        return server

    # What other processes do

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Notice grants that ``login`` or ``logout`` in another process has stored or removed; delete old flows."""
        purged = self._clock()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            # A store in trouble is reported by /readyz and by the requests that need it.
            with contextlib.suppress(StoreError):
                if await self._database.changed():
                    await self._reload()
            now = self._clock()
            # The distance, for the clock may have been set back.
            if abs(now - purged) >= PURGE_INTERVAL:
                purged = now
                with contextlib.suppress(StoreError):
                    await self._flows.purge(now)

    async def _reload(self) -> None:
        self._tokens.clear_negative()
        for account in {*self._tokens.keys(), *self._pending}:
            grant = await self._tokens.current(account)
            if grant is None:
                self._tokens.evict(account)
            elif not self._tokens.is_renewing(account):
                await self._activate_if_new(account, grant)
        for account, pending in list(self._pending.items()):
            flow = await self._flows.get(pending.flow.id)
            if flow is None or flow.status is FlowStatus.FAILED:
                self._fail_pending(account, pending.flow.id, flow.reason if flow else CANCELLED)

    async def _activate_if_new(self, account: Account, grant: Grant) -> None:
        pending = self._pending.get(account)
        if pending is None:
            self._tokens.put(account, grant)
            return
        flow = await self._flows.get(pending.flow.id)
        # Or by the link before this one, or that another process gave out.
        if grant.granted_at > pending.flow.created_at or (flow is not None and flow.status is FlowStatus.DONE):
            await self._activate(account, grant)
