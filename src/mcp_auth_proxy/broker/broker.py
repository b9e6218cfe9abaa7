"""The broker: which token a request may use, and what to do if there is none."""

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence

from mcp_auth_proxy.broker import ownership
from mcp_auth_proxy.broker.adoption import ForeignLogin, grant_for
from mcp_auth_proxy.broker.attempts import (
    AcceptedCallback,
    AuthorizationAttempts,
    AuthorizationRedirect,
    ConfirmationPrompt,
    ConnectedServer,
    DevicePrompt,
    digest,
)
from mcp_auth_proxy.broker.authorization import Authorizations
from mcp_auth_proxy.broker.backoff import Backoff, of_account, of_issuer, of_tokens
from mcp_auth_proxy.broker.challenge_handler import ChallengeHandler
from mcp_auth_proxy.broker.challenge_history import ChallengeHistory
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.connection_notes import ConnectionJournal
from mcp_auth_proxy.broker.connection_records import ConnectionRecords
from mcp_auth_proxy.broker.connections import Connection, Disconnected, stored_connections
from mcp_auth_proxy.broker.device import DevicePolls
from mcp_auth_proxy.broker.disconnection import Disconnector
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.examination import Examination
from mcp_auth_proxy.broker.flows import Announce, PendingFlows, has_link
from mcp_auth_proxy.broker.forgotten_clients import ForgottenClients
from mcp_auth_proxy.broker.headless import HeadlessAttempts
from mcp_auth_proxy.broker.keep_alive import KeepAlive
from mcp_auth_proxy.broker.matching import configured, configured_at, configured_for, matches
from mcp_auth_proxy.broker.oauth_clients import ClientDirectory
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.broker.pending import PendingAuthorization
from mcp_auth_proxy.broker.planning import Planner
from mcp_auth_proxy.broker.refresh_rate import DEFAULT_RATE, RefreshRate
from mcp_auth_proxy.broker.renewal import Renewer, renewable
from mcp_auth_proxy.broker.requested_flows import FlowRequest, FlowState, state_of
from mcp_auth_proxy.broker.sign_ins import SignIns
from mcp_auth_proxy.broker.store_watch import StoreReader, StoreWatch
from mcp_auth_proxy.broker.stored_grants import StoredGrants
from mcp_auth_proxy.broker.token_cache import TokenCache
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.broker.visits import LinkVisits
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AddressRefused,
    AuthorizationDenied,
    AuthorizationError,
    AuthorizationServerUnavailable,
    CallbackRefused,
    StateRefused,
    StoreError,
    TokenRefused,
)
from mcp_auth_proxy.models import (
    AccessToken,
    Account,
    Flow,
    FlowMode,
    FlowStatus,
    Grant,
    Registration,
    TokenSet,
)
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.observability.outages import OutageLog
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.flows import CANCELLED, Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.leases import Leases
from mcp_auth_proxy.store.oauth_clients import OAuthClients
from mcp_auth_proxy.store.refresh_slots import RefreshSlots
from mcp_auth_proxy.store.registrations import Registrations

logger = logging.getLogger(__name__)


class Broker:
    """Hand out tokens, and authorize, renew and revoke them. Belongs to one event loop."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        database: Engine,
        fetcher: Fetcher,
        public_url: str,
        announce: Announce,
        clock: Callable[[], float],
        allow_private: tuple[str, ...] = (),
        opens_links: bool = False,
        opens_windows: Callable[[], bool] = lambda: False,
        is_served: Callable[[str], bool] = lambda public_url: False,
        readers: tuple[StoreReader, ...] = (),
        refresh_rate: float = DEFAULT_RATE,
        keep_alive: float = 0.0,
    ) -> None:
        """``servers`` may change at any time; call ``servers_changed`` afterwards.

        ``announce`` is called with each new flow and its link. ``allow_private``: private hosts and networks that
        metadata documents may lead to. ``opens_links``: whether links may be opened in a browser (``link_opened``);
        then every visit but the first after that has to be confirmed. ``opens_windows``: whether ``announce`` opens
        links in a browser now. ``is_served``: whether a process runs on the same machine and store that browsers reach
        at a URL: its flows will do here. ``readers`` are told what other processes write. ``refresh_rate`` is how many
        refreshes an authorization server is sent in a second, by all processes on the store. ``keep_alive``: seconds
        after which a grant is refreshed even if it is not used; 0: never.
        """
        self._servers = servers
        self._database = database
        self._fetcher = fetcher
        self._public_url = public_url
        self._clock = clock
        self.outages = OutageLog()
        self._backoff = backoff = Backoff(clock=clock)
        self.journal = journal = ConnectionJournal(clock=clock)
        self._grants = Grants(database)
        self._flows = Flows(database)
        leases = Leases(database)
        self._discoverer = discoverer = Discoverer(fetcher=fetcher, allow_private=allow_private)
        directory = ClientDirectory(OAuthClients(database))
        self._token_client = TokenClient(
            fetcher=fetcher, discoverer=discoverer, clock=clock, with_secret=directory.with_secret
        )
        self._registrar = ClientRegistrar(
            fetcher=fetcher, registrations=Registrations(database), public_url=public_url, clock=clock
        )
        self._rate = rate = RefreshRate(slots=RefreshSlots(database), clock=clock, rate=refresh_rate)
        renewer = Renewer(
            token_client=self._token_client,
            registrar=self._registrar,
            grants=self._grants,
            backoff=backoff,
            outages=self.outages,
            journal=journal,
            rate=rate,
            clock=clock,
            settled=lambda: self._watch.is_settled,
        )
        self._tokens = TokenCache(servers=servers, grants=self._grants, renewer=renewer, clock=clock)
        self._records = ConnectionRecords(
            servers=servers,
            database=database,
            tokens=self._tokens,
            journal=journal,
            outages=self.outages,
            clock=clock,
        )
        self._visits = LinkVisits(clock=clock, first_only=opens_links)
        self._sign_ins = SignIns(confirmations=Confirmations(database), grants=self._grants, clock=clock)
        self._forgotten_clients = ForgottenClients(
            servers=servers,
            flows=self._flows,
            register=self._register_again,
            start=self._start_follower,
            clock=clock,
        )
        self._attempts = AuthorizationAttempts(
            flows=self._flows,
            sign_ins=self._sign_ins,
            visits=self._visits,
            clients=self._forgotten_clients,
            clock=clock,
        )

        self._headless = HeadlessAttempts(flows=self._flows, clock=clock)
        self._begun: set[Account] = set()
        """The accounts for which a user in a browser begins an authorization right now."""

        def announce_started(flow: Flow, link: str) -> None:
            if flow.mode is FlowMode.HEADLESS:
                self._visits.started(flow)
                logger.info("server %s: an authorization was begun by a program", flow.key.account.server)
                return
            if flow.key.account not in self._begun:
                self._visits.started(flow)
                announce(flow, link)
                journal.needs_consent(flow.key.account)
                return
            # The browser that its user sits at is on its way to the link: no other one need be opened.
            self._visits.opened(flow)
            logger.warning(
                "server %s: an authorization was begun in a browser, with this link: %s", flow.key.account.server, link
            )

        self._pending = PendingFlows(
            servers=servers,
            flows=self._flows,
            tokens=self._tokens,
            device_polls=DevicePolls(
                servers=servers,
                token_client=self._token_client,
                registrar=self._registrar,
                flows=self._flows,
                grants=self._grants,
                clock=clock,
            ),
            leases=leases,
            public_url=public_url,
            announce=announce_started,
            journal=journal,
            opens_window=lambda flow: opens_windows() and has_link(flow) and flow.key.account not in self._begun,
            is_served=is_served,
            clock=clock,
        )
        self._planner = Planner(
            discoverer=discoverer,
            registrar=self._registrar,
            token_client=self._token_client,
            backoff=backoff,
            clients=directory,
        )
        self._authorizations = Authorizations(
            planner=self._planner,
            registrar=self._registrar,
            token_client=self._token_client,
            grants=self._grants,
            pending=self._pending,
            backoff=backoff,
            rate=rate,
            clock=clock,
        )
        self._challenges = ChallengeHandler(
            servers=servers, tokens=self._tokens, authorizations=self._authorizations, backoff=backoff
        )
        self.disconnector = Disconnector(
            servers=servers,
            flows=self._flows,
            grants=self._grants,
            tokens=self._tokens,
            pending=self._pending,
            token_client=self._token_client,
            registrar=self._registrar,
            journal=journal,
            clock=clock,
        )
        self.stored_grants = StoredGrants(
            servers=servers,
            database=database,
            tokens=self._tokens,
            renewer=renewer,
            pending=self._pending,
            outages=self.outages,
            journal=journal,
            backoff=backoff,
            revoke=self.disconnector.revoke,
            clock=clock,
        )
        """What the API and the pages ask about grants."""
        self._watch = StoreWatch(
            database=database,
            leases=leases,
            flows=self._flows,
            tokens=self._tokens,
            pending=self._pending,
            clock=clock,
            readers=(*readers, rate),
        )

        self._keep_alive = KeepAlive(
            servers=servers, database=database, tokens=self._tokens, period=keep_alive, clock=clock
        )

        def keep_alive_soon(account: Account) -> None:
            cached = self._tokens.get(account)
            if cached is not None:
                self._keep_alive.stored(cached.grant)

        self._tokens.on_connected(keep_alive_soon)

    async def start(self) -> None:
        """Begin the background work: interrupted renewals, device polls, watching the store. Raises StoreError."""
        await self._records.start()
        await self._watch.start()
        await self._tokens.resume_interrupted()
        await self._pending.resume_device_flows()
        self._keep_alive.start()

    async def aclose(self) -> None:
        """Stop all background work. A renewal in progress may finish: its refresh token may be used up already."""
        await self._keep_alive.aclose()
        await self._watch.aclose()
        await self._forgotten_clients.aclose()
        # Those that wait for their turn have sent nothing.
        await self._rate.aclose()
        await self._tokens.aclose()
        await self._pending.aclose()
        await self._authorizations.aclose()
        await self._records.aclose()

    def on_connected(self, callback: Callable[[Account], None]) -> Callable[[], None]:
        """Call ``callback`` whenever a grant is used here for the first time; return a function that ends this.

        That is soon after a consent, also one that another process on the store has received, if it is for an account
        that was asked for here; and when a stored grant is loaded for the first request after a start. A callback must
        not raise or block.
        """
        return self._tokens.on_connected(callback)

    def add_reader(self, reader: StoreReader) -> None:
        """Tell one more reader what other processes write to the store."""
        self._watch.add_reader(reader)

    def granted_at(self, account: Account) -> float | None:
        """Return when the grant in use was given, in Unix seconds; None if none is in use."""
        cached = self._tokens.get(account)
        return None if cached is None else cached.grant.granted_at

    async def newer_token(self, account: Account, refused: AccessToken) -> AccessToken | None:
        """Return a newer token than one that was refused, renewed if need be; None if there is none.

        For requests of the proxy's own, which never lead to an authorization. Raises AuthorizationError,
        AuthorizationServerUnavailable and StoreError.
        """
        cached = self._tokens.get(account)
        if cached is None:
            return None
        if cached.token.generation == refused.generation:
            if self._backoff.has_failed(of_tokens(account)) or not renewable(cached.grant):
                return None
            cached = await self._tokens.renew_rejected(account, cached)
        return None if cached is None else cached.token

    # For requests

    async def token(self, account: Account) -> AccessToken | None:
        """Return the token to send; None if there is no grant.

        Raises AuthorizationError if the server was removed from the configuration, AuthorizationServerUnavailable if
        the token has expired and can't be renewed now, and StoreError.
        """
        return await self._tokens.token(account)

    def token_nowait(self, account: Account) -> tuple[bool, AccessToken | None]:
        """Return (ready, token). ``ready`` is False if the caller must await ``token()`` instead.

        A token of None with ``ready`` means that there is neither a grant nor a pending authorization. Never ready if
        the server has just refused a fresh token: ``accepted`` has to be called if it accepts this one.
        """
        ready, token = self._tokens.token_nowait(account)
        if self._backoff.failures and self._backoff.has_failed(of_tokens(account)):
            ready = False
        return ready and (token is not None or account not in self._pending), token

    def accepted(self, account: Account) -> None:
        """Note that the server of an account has accepted its token."""
        if self._backoff.failures:
            self._backoff.accepted(of_tokens(account))

    def check_origin(self, sent_to: ServerSettings) -> None:
        """Check that a token may still be sent where these settings say, right before that is done.

        Raises AuthorizationError if the server was removed, or has moved to another origin.
        """
        configured_at(self._servers, sent_to)

    def pending(self, account: Account) -> PendingAuthorization | None:
        """Return the authorization that waits for the user, if its link can be used for a while."""
        return self._pending.usable(account)

    @property
    def waits_for_user(self) -> bool:
        """Whether a user may still come back from an authorization server."""
        now = self._clock()
        return any(not each.done and each.flow.expires_at > now for each in self._pending.all())

    async def fresh_link(self, pending: PendingAuthorization) -> PendingAuthorization:
        """Return a pending authorization with a usable link, to answer a request that has waited for long.

        Raises AuthorizationError if the server was removed or reconfigured, and StoreError.
        """
        return await self._authorizations.fresh_link(pending)

    async def challenged(
        self,
        account: Account,
        *,
        sent_to: ServerSettings,
        status: int,
        challenge: Sequence[bytes],
        used: AccessToken | None,
        history: ChallengeHistory,
        nonce: Sequence[bytes] = (),
        subject: str | None = None,
    ) -> AccessToken | PendingAuthorization | None:
        """Decide how to continue after a 401 or 403: with a token to try again, or a pending authorization to wait for.

        None: the response is not a challenge (a 403 for another reason) and belongs to the client. ``sent_to`` are the
        settings that the request began with. ``challenge`` and ``nonce`` are the WWW-Authenticate and DPoP-Nonce fields
        of the response, ``used`` the token of the request, ``subject`` the JWT that the caller was identified by, if it
        was. Call ``check_origin`` before a token that this returns is sent. Raises
        AuthorizationError, AuthorizationServerUnavailable and StoreError.
        """
        return await self._challenges.challenged(
            account,
            sent_to=sent_to,
            status=status,
            challenge=challenge,
            used=used,
            history=history,
            nonce=nonce,
            subject=subject,
        )

    # For browsers

    def link_opened(self, flow: Flow) -> None:
        """Note that a flow's link is about to be opened in a browser on this machine."""
        self._visits.opened(flow)

    async def claim_window(self, flow: Flow) -> bool:
        """Return whether this process may open a flow's link: one process opens it, once. Raises StoreError."""
        return await self._pending.claim_window(flow)

    async def open_link(
        self, server: str, flow_id: str, may_open: MayOpen = ownership.anyone
    ) -> AuthorizationRedirect | ConfirmationPrompt | DevicePrompt | ConnectedServer:
        """Return what to show to the browser that opened a link.

        ``may_open`` says which accounts the browser's user may authorize. Raises CallbackRefused if the link can't be
        used, or not by this user (403), AuthorizationError if its server was removed, or if the authorization server
        has asked for a pause that has not ended, and StoreError.
        """
        flow = await self._flows.get(flow_id)
        waits = flow is not None and flow.status is FlowStatus.PENDING and flow.device is None
        if flow is not None and waits and flow.key.account.server == server and may_open(flow.key.account):
            self._backoff.check_asked(of_issuer(server, flow.key.issuer))
        opened = await self._attempts.open(server, flow_id, may_open)
        configured(self._servers, server)
        if isinstance(opened, ConnectedServer) and flow is not None:
            connected = await self.connected(flow.key.account)
            if connected is None:
                raise CallbackRefused(
                    "This link has been used, but the server is no longer connected. Ask your MCP client again: it "
                    "gets a new link.",
                    410,
                )
            return connected
        return opened

    async def confirm_link(
        self, server: str, flow_id: str, may_open: MayOpen = ownership.anyone
    ) -> AuthorizationRedirect | DevicePrompt:
        """Return where to send the browser whose user has confirmed a ``ConfirmationPrompt``.

        Raises as ``open_link`` does.
        """
        opened = await self._attempts.confirm(server, flow_id, may_open)
        configured(self._servers, server)
        return opened

    async def _register_again(self, flow: Flow) -> Registration:
        return await self._planner.register_again(configured_for(self._servers, flow), flow)

    async def _start_follower(self, flow: Flow) -> None:
        # Its link was not given out yet, and no visit of it is the first one.
        self._visits.started(flow)
        await self._pending.replace(flow)

    async def connected(self, account: Account) -> ConnectedServer | None:
        """Return who has authorized an account, None if it is not connected. Raises StoreError."""
        grant, settings = await self._grants.current(account), self._servers.get(account.server)
        if grant is None or settings is None or not matches(grant, settings):
            return None
        return ConnectedServer(server=account.server, issuer=grant.key.issuer, label=grant.label)

    async def was_refused(self, account: Account) -> bool:
        """Return whether the authorization server has refused to renew the grant that a user gave. Raises StoreError.

        Until it changes its mind, only another consent brings new tokens.
        """
        grant = await self._grants.current(account)
        if grant is None or grant.grant_type.unattended:
            return False
        return grant.health.refused_at is not None or grant.health.rejected_since is not None

    async def begin(
        self, account: Account, *, status: int, challenge: Sequence[bytes]
    ) -> AccessToken | PendingAuthorization | None:
        """Authorize an account for a user who sits at a browser, also if there is a grant, which stays until then.

        The rest is as with ``authorize``; the link is not opened in another browser.
        """
        self._backoff.person_begins(account.server)
        self._begun.add(account)
        try:
            # The grant that there is must be known, so that it does not count as one that came meanwhile.
            await self._tokens.load(account)
            return await self._start(account, status, challenge)
        except AuthorizationError as error:
            raise self._backoff.with_time(error) from None
        finally:
            self._begun.discard(account)

    async def complete(
        self,
        params: Mapping[str, Sequence[str]],
        cookies: Mapping[str, str],
        may_open: MayOpen = ownership.anyone,
    ) -> Flow:
        """Complete the flow that a callback belongs to, and let everyone who waits for it continue.

        Raises CallbackRefused if it belongs to none, or to one of another user than the browser's (403; nothing is
        used up), AuthorizationError if the authorization failed.
        """
        return await self._finish(await self._attempts.accept(params, cookies, may_open), params)

    async def complete_headless(self, account: Account, *, code: str, state: str, iss: str | None) -> Flow:
        """Complete a headless flow of an account's principal, at its server, with the code that a program brings.

        Raises StateRefused and IssuerMissing, which use up nothing, and else as ``complete`` does.
        """
        accepted = await self._headless.accept(account.principal, account.server, state, iss)
        params = {"code": [code], "state": [state], **({} if iss is None else {"iss": [iss]})}
        return await self._finish(accepted, params)

    async def complete_pasted(self, account: Account, params: Mapping[str, Sequence[str]]) -> Flow:
        """Complete a headless flow of an account with the address that its user has pasted (``pasted_address.read``).

        Raises AddressRefused, which uses up nothing, and else as ``complete`` does.
        """
        state, iss = params["state"][0], next(iter(params.get("iss", ())), None)
        try:
            accepted = await self._headless.accept(account.principal, account.server, state, iss, account=account.name)
        except StateRefused:
            raise AddressRefused("That address is not ours: it belongs to another authorization.") from None
        except CallbackRefused as refused:
            raise AddressRefused(str(refused)) from None
        return await self._finish(accepted, params)

    async def _finish(self, accepted: AcceptedCallback, params: Mapping[str, Sequence[str]]) -> Flow:
        flow, attempt, confirmed = accepted
        other = self._forgotten_clients.other(flow)
        try:
            server = configured_for(self._servers, flow)
            code = authorization_code.check_response(params, flow=flow)
            grant = await self._token_client.redeem(server, flow, attempt, code)
        except (AuthorizationError, CallbackRefused) as error:
            if isinstance(error, AuthorizationServerUnavailable) and error.server_retry_after:
                # Without it there is no pause: people are slow enough.
                self._backoff.failed(of_issuer(flow.key.account.server, flow.key.issuer), error)
            if isinstance(error, TokenRefused | AuthorizationDenied):
                await self._authorizations.note_rejection(error.error, flow)
            for ended in filter(None, (flow, other)):
                await self._pending.fail(ended, error)
            raise
        stored = await self._grants.add_from(grant, flow.id)
        if stored is None:
            # The flow was cancelled while the code was redeemed, most likely by a logout.
            await self._token_client.discard(server, grant)
            self._pending.drop(flow, AuthorizationDenied(CANCELLED))
            raise AuthorizationDenied(CANCELLED)
        self._pending.activate(stored)
        if other is not None:
            # If it can't be stored, its link only lasts until it expires.
            with contextlib.suppress(StoreError):
                await self._flows.finish(other.id, FlowStatus.DONE)
        if confirmed:
            # If it can't be stored, the user is only asked again.
            with contextlib.suppress(StoreError):
                await self._sign_ins.remember(flow)
        account, issuer = stored.key.account, stored.key.issuer
        self._backoff.succeeded(of_issuer(server.name, issuer), of_account(account), of_tokens(account))
        metrics.flows.labels(metrics.server_label(server.name), "completed").inc()
        logger.info("server %s is connected", server.name)
        if not stored.label and (label := await self._token_client.label(server, stored)):
            with contextlib.suppress(StoreError):
                await self._grants.set_label(stored.id, label)
        return flow

    # For commands, pages and the API

    async def authorize(
        self, account: Account, *, status: int, challenge: Sequence[bytes]
    ) -> AccessToken | PendingAuthorization | None:
        """Authorize an account ahead of its first request.

        ``status`` and ``challenge`` (the WWW-Authenticate fields) are the server's response to a request without a
        token. Returns the token, which may have been stored before, or the pending authorization to wait for; None if
        the server asks for no authorization. This is for what a person begins: of the pauses after failures, only those
        hold that the server itself has asked for. Raises AuthorizationError and StoreError.
        """
        self._backoff.person_begins(account.server)
        try:
            return await self._authorize(account, status, challenge)
        except AuthorizationError as error:
            raise self._backoff.with_time(error) from None

    async def _authorize(
        self, account: Account, status: int, challenge: Sequence[bytes]
    ) -> AccessToken | PendingAuthorization | None:
        token = await self.token(account)
        return token if token is not None else await self._start(account, status, challenge)

    async def _start(
        self, account: Account, status: int, challenge: Sequence[bytes]
    ) -> AccessToken | PendingAuthorization | None:
        bearer = challenges.bearer(challenge)
        if not challenges.demands_authorization(status, bearer):
            return None
        server = configured(self._servers, account.server)
        schemes = challenges.other_schemes(challenge)
        return await self._authorizations.authorize(account, server, bearer, schemes=schemes)

    async def request_flow(
        self, account: Account, wanted: FlowRequest, *, status: int, challenge: Sequence[bytes]
    ) -> tuple[AccessToken | PendingAuthorization | None, bool]:
        """Return the flow that a person asks for, and whether it is new, also if there is a grant.

        ``status`` and ``challenge`` are as in ``authorize``, and so is the rest. No browser is opened here.
        """
        bearer = challenges.bearer(challenge)
        if not challenges.demands_authorization(status, bearer):
            return None, False
        server, schemes = configured(self._servers, account.server), challenges.other_schemes(challenge)
        self._backoff.person_begins(account.server)
        self._begun.add(account)
        try:
            return await self._authorizations.request(account, server, bearer, wanted, schemes=schemes)
        except AuthorizationError as error:
            raise self._backoff.with_time(error) from None
        finally:
            self._begun.discard(account)

    async def examine(self, server: ServerSettings, *, challenge: Sequence[bytes]) -> Examination:
        """Return what discovery finds out about a server, which need not be configured. Nothing is stored.

        ``challenge``: the WWW-Authenticate fields of its response to a request without a token. Raises StoreError.
        """
        found = Examination()
        discoverer = Discoverer(
            fetcher=self._fetcher, allow_private=self._discoverer.allow_private, observe=found.lookups.append
        )
        planner = Planner(
            discoverer=discoverer,
            registrar=self._registrar,
            token_client=self._token_client,
            backoff=Backoff(clock=self._clock),
        )
        try:
            found.plan = await planner.preview(Account("", server.name), server, challenges.bearer(challenge))
        except AuthorizationError as error:
            found.error = error
        return found

    async def flow(self, flow_id: str) -> Flow | None:
        """Return a flow, whatever its status is. Raises StoreError."""
        flow = await self._flows.get(flow_id)
        return None if flow is None else await self._forgotten_clients.newest(flow)

    async def finished_flows(self, account: Account) -> list[str]:
        """Return the ids of the flows that the user of an account has finished lately. Raises StoreError."""
        return [flow.id for flow in await self._flows.all_done(account)]

    async def flow_of_state(self, state: str) -> Flow | None:
        """Return the flow that a state belongs to, without using it up; None if it is unknown or used."""
        found = await self._flows.find_attempt(digest(state))
        return None if found is None else found[0]

    def flow_state(self, flow: Flow) -> FlowState:
        """Return how a flow is now."""
        return state_of(flow, self._clock())

    async def authorization_url(self, flow: Flow) -> str | None:
        """Return where the user of a headless flow authorizes; None for other flows, and if that was used.

        Raises AuthorizationError and StoreError.
        """
        return await self._headless.authorization_url(flow)

    async def cancel_flow(self, flow: Flow) -> None:
        """Cancel a flow that waits for its user: no grant comes from it any more. Raises StoreError."""
        for ended in filter(None, (flow, self._forgotten_clients.other(flow))):
            await self._flows.finish(ended.id, FlowStatus.FAILED, CANCELLED)
            self._pending.cancel_flow(ended)

    def link(self, flow: Flow) -> str:
        """Return the link of a flow."""
        return self._pending.link(flow)

    async def connections(self) -> list[Connection]:
        """Return the connection of each configured server and account. Raises StoreError."""
        return await stored_connections(self._servers, self._database, now=self._clock())

    async def renew(self, account: Account) -> AccessToken | None:
        """Renew the tokens of an account now; return None if there is no grant, or none that can be renewed.

        Raises AuthorizationError, AuthorizationServerUnavailable and StoreError.
        """
        cached = self._tokens.get(account) or await self._tokens.load(account)
        if cached is None or not renewable(cached.grant):
            return None
        renewed = await self._tokens.renew(account, cached)
        return None if renewed is None else renewed.token

    async def adopt(self, account: Account, tokens: TokenSet, client: Registration | None) -> None:
        """Store tokens that another program has obtained, and the client that it did it with.

        Their authorization server is found as for an authorization. Without a client they can't be renewed, unless the
        configuration names it. Raises AuthorizationError and StoreError.
        """
        grant = await self.grant_for(account, ForeignLogin(tokens, client, granted_at=self._clock()), None)
        self._tokens.put(account, await self._grants.add(grant))

    async def grant_for(self, account: Account, login: ForeignLogin, challenge: BearerChallenge | None) -> Grant:
        """Return the grant that the login of another program is, without storing it; see ``adoption.grant_for``."""
        return await grant_for(self._planner, configured(self._servers, account.server), account, login, challenge)

    async def disconnect(self, account: Account, *, forget_client: bool = False) -> Disconnected:
        """Delete the grants of an account and revoke them; see ``Disconnector.disconnect``. Raises StoreError."""
        return await self.disconnector.disconnect(account, forget_client=forget_client)

    def token_states(self) -> dict[tuple[str, ...], float]:
        """Return how many cached tokens are valid, renewing or expired."""
        return self._tokens.states()

    def set_allow_private(self, hosts: tuple[str, ...]) -> None:
        """Change the private hosts and networks that metadata documents may lead to."""
        if hosts != self._discoverer.allow_private:
            self._discoverer.allow_private = hosts
            self._backoff.clear()

    def set_refresh_rate(self, rate: float) -> None:
        """Change how many refreshes an authorization server is sent in a second."""
        self._rate.set_rate(rate)

    def set_keep_alive(self, period: float) -> None:
        """Change after how many seconds a grant is refreshed even if it is not used."""
        self._keep_alive.configure(period)

    def set_opens_links(self, opens: bool) -> None:
        """Change whether links may be opened in a browser."""
        self._visits.first_only = opens

    def servers_changed(self, removed: Collection[str], changed: Collection[str]) -> None:
        """Adapt to a changed configuration; call this after the mapping of servers was changed.

        Tokens and pending authorizations that no longer match the configuration are dropped: requests that wait get
        the reason, timers and device polls are stopped. The store keeps the grants; one that matches the new
        configuration is used with the next request.
        """
        names = {*removed, *changed}
        self._backoff.forget(names)
        self._tokens.servers_changed(names)
        self._pending.servers_changed(names)
