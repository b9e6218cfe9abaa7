"""Authorize an account: from a challenge to a token, or to a flow that waits for the user."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from mcp_auth_proxy.broker.backoff import Backoff, of_account, of_issuer, of_server
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.flows import PendingFlows, clone_flow, new_flow
from mcp_auth_proxy.broker.pending import PendingAuthorization
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.broker.planning import Planner
from mcp_auth_proxy.broker.refresh_rate import RefreshRate
from mcp_auth_proxy.broker.requested_flows import FlowRequest
from mcp_auth_proxy.broker.single_flight import SingleFlight
from mcp_auth_proxy.broker.step_up import StepUpLimiter
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    AuthorizationError,
    ClientNotActive,
    RedirectRefused,
    RefreshRateExceeded,
    TokenRefused,
    TooManyAccounts,
)
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, AccessToken, Account, Flow, Grant, GrantType
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.fetch import paced
from mcp_auth_proxy.oauth.token_exchange import SubjectToken
from mcp_auth_proxy.store.grants import Grants

MAX_ACCOUNTS = 100
"""Accounts that a principal has at a server, or is authorizing there, apart from those that the configuration names.

Any name in an address is an account, and each costs a registration at the authorization server.
"""


class _Flight(NamedTuple):
    """What runs only once at a time."""

    account: Account
    subject: int
    """The hash of the caller's JWT: whoever has a newer one does not wait for what the older one leads to."""


class Authorizations:
    """Start authorizations, one at a time for each account."""

    def __init__(
        self,
        *,
        planner: Planner,
        registrar: ClientRegistrar,
        token_client: TokenClient,
        grants: Grants,
        pending: PendingFlows,
        backoff: Backoff,
        rate: RefreshRate,
        clock: Callable[[], float],
    ) -> None:
        self._planner = planner
        self._registrar = registrar
        self._token_client = token_client
        self._grants = grants
        self._pending = pending
        self._backoff = backoff
        self._rate = rate
        self._clock = clock
        self._step_ups = StepUpLimiter(clock=clock)
        self._running: SingleFlight[_Flight, AccessToken | PendingAuthorization] = SingleFlight()

    async def aclose(self) -> None:
        await self._running.aclose()

    async def authorize(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        *,
        already: tuple[str, ...] | None = None,
        schemes: tuple[str, ...] = (),
        subject: str | None = None,
    ) -> AccessToken | PendingAuthorization:
        """Return a token if no user has to be asked, otherwise the flow to wait for.

        ``server``: the settings of the server that sent the challenge. ``already``: scopes granted before a step-up;
        None if this is not a step-up. ``schemes``: authentication schemes other than Bearer that the server asked for.
        ``subject``: the caller's JWT, for ``token_exchange``; what fails with one is tried again with another.
        After a failure nothing is tried again until the pause ends; a flow that waits for its user is returned all the
        same. Raises AuthorizationError and StoreError.
        """
        if server.oauth.grant is not GrantType.TOKEN_EXCHANGE:
            subject = None
        known = self._pending.known_grant(account)
        return await self._running.run(
            _Flight(account, hash(subject)),
            lambda: self._authorize(account, server, challenge, already, schemes, subject, known),
        )

    async def request(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        wanted: FlowRequest,
        *,
        schemes: tuple[str, ...] = (),
    ) -> tuple[AccessToken | PendingAuthorization, bool]:
        """Return the flow that somebody asks for, and whether it is new; a token if no user has to be asked.

        Raises as ``authorize`` does.
        """

        async def find() -> PendingAuthorization | None:
            found = self._pending.usable(account, elsewhere=True)
            if found is None or not wanted.fits(found.flow):
                found = await self._pending.resume(account, None, wanted.fits)
            return found

        async def start() -> AccessToken | PendingAuthorization:
            found = await find()
            if found is not None:
                return found
            settings = wanted.settings(account, server)
            return await self._new(account, settings, challenge, None, schemes, None, wanted, find)

        before = await find()
        while True:
            # A request of an MCP client may be authorizing the account just now, with a flow of another kind.
            outcome = await self._running.run(_Flight(account, hash(None)), start)
            if not isinstance(outcome, PendingAuthorization):
                return outcome, False
            # Another page may have asked for the same flow just now.
            if wanted.fits(outcome.flow) and (told := await self._pending.tell(outcome, wanted.return_origin)):
                new = outcome.made_here and (before is None or before.flow.id != outcome.flow.id)
                return told, new

    async def fresh_link(self, pending: PendingAuthorization) -> PendingAuthorization:
        """Return a pending authorization whose link can be used for a while, a new one if necessary.

        Raises AuthorizationError if the server was removed or reconfigured, and StoreError.
        """
        newest = self._pending.get(pending.flow.key.account) or pending
        if not self._pending.needs_fresh_link(newest):
            return newest
        flight = _Flight(newest.flow.key.account, hash(None))
        outcome = await self._running.run(flight, lambda: self._replace(newest.flow))
        return outcome if isinstance(outcome, PendingAuthorization) else newest

    async def note_rejection(self, error: str, rejected: Flow | Plan) -> None:
        """Make the next authorization avoid what this one was rejected for, if that is the proxy's own choice."""
        if error == "invalid_client":
            await self._registrar.forget(rejected.registration)
        elif error == "invalid_scope":
            self._planner.leave_out_offline_access(rejected)

    async def _authorize(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...] | None,
        schemes: tuple[str, ...],
        subject: str | None,
        known: Grant | None,
    ) -> AccessToken | PendingAuthorization:
        pending = self._pending.usable(account) or await self._pending.resume(account, challenge)
        if pending is not None:
            return pending

        async def look() -> AccessToken | PendingAuthorization | None:
            # The user may have been faster with the flow of another process than this one was with its look.
            found = await self._pending.resume(account, challenge)
            return found or await self._pending.granted_since(account, known)

        return await self._new(account, server, challenge, already, schemes, subject, None, look)

    async def _new(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...] | None,
        schemes: tuple[str, ...],
        subject: str | None,
        wanted: FlowRequest | None,
        look: Callable[[], Awaitable[AccessToken | PendingAuthorization | None]],
    ) -> AccessToken | PendingAuthorization:
        """Authorize in one process at a time; ``look`` finds what another has come to meanwhile."""
        self._backoff.check(of_server(server.name), of_account(account, subject))

        async def make() -> AccessToken | PendingAuthorization:
            return await self._make(account, server, challenge, already, schemes, subject, wanted)

        # One window or token request, however many processes on this store are asked in the same instant.
        return await self._pending.in_turn(account, look, make)

    async def _make(
        self,
        account: Account,
        server: ServerSettings,
        challenge: BearerChallenge | None,
        already: tuple[str, ...] | None,
        schemes: tuple[str, ...],
        subject: str | None,
        wanted: FlowRequest | None,
    ) -> AccessToken | PendingAuthorization:
        everyone, own = of_server(server.name), of_account(account, subject)
        await self._check_accounts(account, server)
        # A token that can't be read is no server's failure: no pause, and nothing is fetched in vain.
        await self._token_client.check_credentials(server)
        try:
            plan = await self._planner.plan(account, server, challenge, already=already or (), schemes=schemes)
            if wanted is not None:
                wanted.check(plan)
            if already is not None:
                requested = (challenge and challenge.scopes) or ()
                self._step_ups.count(account, server=server.name, requested=requested, already=already)
            made = await (self._obtain(plan, subject) if server.oauth.grant.unattended else self._new_flow(plan))
        except (ClientNotActive, RedirectRefused, RefreshRateExceeded):
            # No server has failed: an admin may change it at any time, and others have their turns first.
            raise
        except AuthorizationDenied as denied:
            # An OAuth error may be about this account's credentials or request, and says that the issuer works.
            self._backoff.failed(own, denied)
            raise
        except AuthorizationError as error:
            self._backoff.failed(everyone, error)
            raise
        self._backoff.succeeded(everyone, own, of_issuer(server.name, plan.key.issuer))
        if isinstance(made, Flow):
            if wanted is None:
                return await self._pending.start(made)
            return await self._pending.start(wanted.apply(made), wanted.fits)
        return self._pending.activate(await self._grants.add(made)).token

    async def _check_accounts(self, account: Account, server: ServerSettings) -> None:
        """Raise TooManyAccounts if this would be one account too many."""
        free = {DEFAULT_ACCOUNT, *server.accounts}
        if account.name in free:
            return
        known = self._pending.names(account.principal, account.server)
        if len(known) < MAX_ACCOUNTS:
            known |= await self._grants.account_names(account.principal, account.server, count=MAX_ACCOUNTS)
        running = {flight.account for flight in self._running if flight.account != account}
        begun = {each.name for each in running if (each.principal, each.server) == (account.principal, account.server)}
        if account.name not in known and len((known | begun) - free) >= MAX_ACCOUNTS:
            raise TooManyAccounts(
                f"There are {MAX_ACCOUNTS} accounts of {server.name} already, connected or waiting for consent. "
                f"Disconnect some, or use one of them."
            )

    async def _obtain(self, plan: Plan, subject: str | None) -> Grant:
        token = None if subject is None else SubjectToken(subject)
        try:
            self._backoff.check(of_issuer(plan.server.name, plan.key.issuer))
            # Many callers may come at once, as after a start; nobody consents here.
            await self._rate.turn(plan.key.issuer)
            with (
                self._backoff.attempt(of_issuer(plan.server.name, plan.key.issuer)),
                paced(plan.endpoints.token, lambda: self._rate.sending(plan.key.issuer)),
            ):
                return await self._token_client.obtain(plan, subject=token)
        except TokenRefused as refused:
            raise _denied(refused) from None

    async def _new_flow(self, plan: Plan) -> Flow:
        """Return a flow, not yet stored; for another device it needs a code of the authorization server."""
        if plan.server.oauth.grant is not GrantType.DEVICE_CODE:
            further = await self._grants.has_other_account(plan.key.account)
            return new_flow(plan, now=self._clock(), further=further)
        try:
            with self._backoff.attempt(of_issuer(plan.server.name, plan.key.issuer)):
                device = await self._token_client.start_device(plan)
        except TokenRefused as refused:
            await self.note_rejection(refused.error, plan)
            raise _denied(refused) from None
        return new_flow(plan, now=self._clock(), device=device)

    async def _replace(self, flow: Flow) -> PendingAuthorization:
        return await self._pending.start(clone_flow(flow, now=self._clock()))


def _denied(refused: TokenRefused) -> AuthorizationDenied:
    """Return the error for a request without a user that was refused."""
    denied = AuthorizationDenied(str(refused), refused.error, hint=refused.hint)
    denied.server_retry_after = refused.server_retry_after
    return denied
