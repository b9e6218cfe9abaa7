"""The composition root: builds every layer from the settings, and closes them in the opposite order."""

import asyncio
import importlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

from mcp_auth_proxy.broker import Broker, FlowRequest, PendingAuthorization, sign_in
from mcp_auth_proxy.broker.made_servers import MadeServers
from mcp_auth_proxy.broker.webhook import Webhook
from mcp_auth_proxy.config import loops
from mcp_auth_proxy.config.changes import SettingsChange
from mcp_auth_proxy.config.settings import Address, LimitSettings, ServerSettings, Settings, StoreSettings, reachable
from mcp_auth_proxy.errors import StoreOutOfReach
from mcp_auth_proxy.identity import Authenticator, Callers, make_authenticator
from mcp_auth_proxy.identity.api_token import obtain_token, token_path
from mcp_auth_proxy.identity.sessions import make_sessions
from mcp_auth_proxy.models import AccessToken, Account, Flow, FlowMode, GrantType, Tool
from mcp_auth_proxy.net import descriptors, urls
from mcp_auth_proxy.net.connection_limits import ConnectionLimits, ConnectionRules
from mcp_auth_proxy.net.descriptors import Shares
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.net.resolver import Resolver
from mcp_auth_proxy.net.urls import is_loopback, parse
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.observability import metrics
from mcp_auth_proxy.proxy.catalogs import ServerCatalogs
from mcp_auth_proxy.proxy.forwarder import Forwarder
from mcp_auth_proxy.proxy.probe import noting, probe
from mcp_auth_proxy.proxy.routes import route_to
from mcp_auth_proxy.proxy.tool_list import list_tools
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.router import Router
from mcp_auth_proxy.servers import ServerRegistry
from mcp_auth_proxy.store import Engine, keys, open_store, serving, store_exists
from mcp_auth_proxy.store.mcp_sessions import McpSessions
from mcp_auth_proxy.store.shared_secrets import SESSION_IDS, SharedSecrets
from mcp_auth_proxy.web import browser
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api_mount import ApiMount
from mcp_auth_proxy.web.audit import PageAudit
from mcp_auth_proxy.web.failed_credentials import FailedCredentials
from mcp_auth_proxy.web.guard import Guard
from mcp_auth_proxy.web.protected_resource import ProtectedResource
from mcp_auth_proxy.web.session import Visitors
from mcp_auth_proxy.web.sign_in_mount import SignInMount
from mcp_auth_proxy.web.site import Site

logger = logging.getLogger(__name__)

Clock = Callable[[], float]
Announce = Callable[[Flow, str], None]
"""Called with each new flow and its link."""

STORE_PATIENCE = 30.0
"""Seconds for which a server of the store that can't be reached at start, or is lost meanwhile, is tried again."""

STORE_PAUSE = 1.0
"""Seconds between two tries."""

FORGET_DELAY = 2.0
"""Seconds until the metrics of a removed server are dropped: its last requests have been counted by then."""

PROBE_SECONDS = 15.0
"""Seconds that the API waits for the first answer of a server."""

DRAIN_SECONDS = 30.0
"""Seconds that active requests are given after SIGTERM."""

PROMPT_SECONDS = 0.2
"""Seconds of these in which streams that are ended at once, and requests that are nearly done, are gone."""


def effective_public_url(settings: Settings, listening: Address) -> str:
    """Return how browsers reach the proxy: as configured, else the address it listens on."""
    if settings.public_url is not None:
        return settings.public_url
    return f"http://{reachable(listening)}"


def _say_nothing(count: int) -> None:
    pass


def _ignore_keys(key_ids: Sequence[str]) -> None:
    pass


@dataclass(slots=True, kw_only=True)
class Application:
    """A running proxy, without its listener."""

    settings: Settings
    listening: Address
    public_url: str
    servers: ServerRegistry
    made: MadeServers
    announcer: "Announcer"
    broker: Broker
    webhook: Webhook
    resolver: Resolver
    connections: ConnectionLimits
    http: HttpClient
    forwarder: Forwarder
    catalogs: ServerCatalogs
    router: Router
    site: Site
    callers: Callers
    visitors: Visitors
    sign_in: SignInMount
    database: Engine
    on_new_keys: Callable[[Sequence[str]], None] = _ignore_keys
    """Called with the ids of the store's keys after ``renew_keys`` has changed them."""

    async def renew_keys(self, store: StoreSettings) -> bool:
        """Read the keys of the store again, and use them; return whether they are others. Raises StoreError."""
        if not await keys.renew_keys(self.database, store):
            return False
        self.on_new_keys(self.database.cipher.key_ids)
        return True

    def apply(self, change: SettingsChange) -> None:
        """Hand each section of a changed configuration to its owner. Active requests keep the old one."""
        self.settings = settings = change.settings
        self.servers.replace(settings.servers)
        self.made.set_allow_private(settings.admin.allow_private)
        self.announcer.configure(settings)
        self.broker.set_allow_private(settings.authorization.allow_private)
        self.broker.set_keep_alive(settings.authorization.keep_alive)
        self.webhook.configure(settings.events.webhook)
        self.broker.set_opens_links(_opens_links(settings))
        self.broker.set_refresh_rate(settings.limits.refresh_rate)
        shares = _shares(settings.limits)
        self.connections.rules = _connection_rules(settings, shares)
        self.http.set_limit(settings.limits.upstream_connections, shares.upstreams)
        self.configure_forwarder()
        self.catalogs.enabled = settings.authorization.cold_start
        self.callers.configure(settings.inbound)
        self.router.identify_by(self.router.authenticator)
        self.sign_in.configure(settings.inbound)
        self.router.guard = Guard(listen=self.listening, public_url=self.public_url, inbound=settings.inbound)
        self.router.resource = ProtectedResource(self.public_url, settings.inbound)

    def configure_forwarder(self) -> None:
        """Hand the forwarder the limits, of which a server gets a share if there are several."""
        settings = self.settings
        self.forwarder.configure(
            limits=settings.limits, authorization=settings.authorization, several=len(self.servers) > 1
        )

    async def drain(self, waiting: Callable[[int], None] = _say_nothing) -> None:
        """Become unready, let requests finish for a bounded time, then end those that are left.

        ``waiting`` is called with the number of requests that do not end at once, if there are any.
        """
        self.router.draining = True
        self.forwarder.drain()
        await self.forwarder.until_idle(PROMPT_SECONDS)
        if self.forwarder.active_requests and not self.forwarder.ended:
            waiting(self.forwarder.active_requests)
            await self.forwarder.until_idle(DRAIN_SECONDS - PROMPT_SECONDS)
        self.end()

    def end(self) -> None:
        """End the active requests that are left, each stream with a final chunk."""
        self.forwarder.end_all()


@asynccontextmanager
async def lifespan(
    settings: Settings,
    listening: Address,
    *,
    clock: Clock | None = None,
    announce: Announce | None = None,
    announce_key: Callable[[str], None] = logger.warning,
    background: bool = True,
    authenticator: Authenticator | None = None,
) -> AsyncIterator[Application]:
    """Open everything that a running proxy needs, and close it again. Raises ConfigurationError, StoreError.

    ``clock``: Unix seconds; None for the time of the store. ``background``: renew tokens, remember what servers offer,
    and watch the store for what other processes write.
    ``authenticator`` tells who calls instead of what ``inbound`` says.
    """
    until = time.monotonic() + (STORE_PATIENCE if background else 0.0)

    def opened() -> AbstractAsyncContextManager[Application]:
        return _opened(
            settings,
            listening,
            clock=clock,
            announce=announce,
            announce_key=announce_key,
            background=background,
            authenticator=authenticator,
            patience=max(0.0, until - time.monotonic()),
        )

    async with AsyncExitStack() as stack:
        yield await _patiently(lambda: stack.enter_async_context(opened()), until=until)


async def _patiently(start: Callable[[], Awaitable[Application]], *, until: float) -> Application:
    """Start, and once more if the server of the store was lost meanwhile: it may be started again itself."""
    while True:
        try:
            return await start()
        except StoreOutOfReach as error:
            left = until - time.monotonic()
            if left <= STORE_PAUSE:
                raise
            logger.warning("%s It is tried again for %.0f seconds.", error, left)
        await asyncio.sleep(STORE_PAUSE)


@asynccontextmanager
async def _opened(
    settings: Settings,
    listening: Address,
    *,
    clock: Clock | None,
    announce: Announce | None,
    announce_key: Callable[[str], None],
    background: bool,
    authenticator: Authenticator | None,
    patience: float,
) -> AsyncIterator[Application]:
    """Open everything once; ``patience``: seconds for a server of the store that can't be reached."""
    public_url = effective_public_url(settings, listening)
    servers = ServerRegistry(settings.servers)

    def opening(flow: Flow) -> None:
        broker.link_opened(flow)

    announcer = Announcer(settings, listening, opening=opening)
    async with AsyncExitStack() as stack:
        # The store last of all that can fail: a start that fails leaves none behind.
        dialer = Dialer(ca_bundle=settings.outbound.ca_bundle, trust_proxy=settings.outbound.trust_proxy)
        if background:
            await _check_imports(settings.store)
        database = await open_store(settings.store, announce=announce_key, patience=patience)
        clock = clock or database.now
        stack.push_async_callback(database.close)
        if background and settings.store.imports.files:
            await _first_imports().take_in_once(database, settings.store.imports, now=clock())
        fetcher = Fetcher(dialer)
        stack.push_async_callback(fetcher.aclose)
        callers = make_authenticator(settings, database=database, fetcher=fetcher, clock=clock)
        stack.push_async_callback(callers.aclose)
        if background:
            await callers.start()
            callers.warm_up()
            if callers.anonymous and settings.admin.enabled:
                _accept_token(callers, settings, now=clock())
        made = MadeServers(
            database=database,
            servers=servers,
            allow_private=settings.admin.allow_private,
            clock=clock,
            check_loop=partial(loops.check_url, listening=listening, public_url=public_url),
        )
        await made.reload()
        webhook = Webhook(
            settings.events.webhook if background else None, servers=servers, fetcher=fetcher, clock=clock
        )
        stack.push_async_callback(webhook.aclose)
        broker = Broker(
            readers=(made,),
            servers=servers,
            database=database,
            fetcher=fetcher,
            allow_private=settings.authorization.allow_private,
            public_url=public_url,
            announce=announce or announcer,
            clock=clock,
            opens_links=_opens_links(settings),
            opens_windows=lambda: announce is None and announcer.opens,
            is_served=partial(_is_served, settings.store),
            refresh_rate=settings.limits.refresh_rate,
            keep_alive=settings.authorization.keep_alive,
        )
        broker.journal.listen(webhook.heard)
        stack.push_async_callback(broker.aclose)
        servers.on_change(lambda change: broker.servers_changed(change.removed, change.changed))
        shares = _shares(settings.limits)
        http = HttpClient(
            dialer, connections_per_origin=settings.limits.upstream_connections, connections=shares.upstreams
        )
        stack.push_async_callback(http.aclose)
        stack.callback(metrics.tokens.add_source(broker.token_states))
        stack.callback(metrics.upstream_connections.add_source(http.connections))
        upstream = UpstreamClient(http)
        catalogs = ServerCatalogs(
            broker=broker,
            servers=servers,
            upstream=upstream,
            database=database,
            clock=clock,
            enabled=settings.authorization.cold_start,
        )
        stack.push_async_callback(catalogs.aclose)
        broker.add_reader(catalogs)
        servers.on_change(lambda change: catalogs.servers_changed((*change.removed, *change.changed)))
        forwarder = Forwarder(
            broker=broker,
            upstream=upstream,
            limits=settings.limits,
            authorization=settings.authorization,
            several=len(servers) > 1,
            store=McpSessions(database),
            catalogs=catalogs,
            public_url=public_url,
            clock=clock,
        )
        stack.callback(metrics.buffered_bytes.add_source(lambda: {(): forwarder.memory.total}))
        stack.callback(metrics.held_requests.add_source(lambda: {(): forwarder.held.used}))
        broker.on_connected(forwarder.connected)
        if background:
            broker.on_connected(catalogs.connected)
            await broker.start()

        async def start(
            server: ServerSettings, account: Account, *, popup: bool = False
        ) -> AccessToken | PendingAuthorization | None:
            status, challenge = await probe(forwarder.upstream, route_to(server))
            if not popup or server.oauth.grant.unattended:
                return await broker.begin(account, status=status, challenge=challenge)
            mode = FlowMode.DEVICE if server.oauth.grant is GrantType.DEVICE_CODE else FlowMode.BROWSER
            wanted = FlowRequest(mode=mode, return_origin=parse(public_url).origin.serialized)
            outcome, _ = await broker.request_flow(account, wanted, status=status, challenge=challenge)
            return outcome

        async def noted_tools(server: ServerSettings, account: Account) -> list[Tool]:
            tools = await list_tools(broker, forwarder.upstream, server, account)
            broker.journal.note_tools(account, len(tools))
            return tools

        sessions = make_sessions(callers, database=database, clock=clock)
        visitors = Visitors(authenticator=authenticator or callers, sessions=sessions, public_url=public_url)
        failed_credentials = FailedCredentials(clock)
        audit = PageAudit(database, clock)
        sign_in_mount = SignInMount(
            settings.inbound,
            visitors=visitors,
            callers=callers,
            fetcher=fetcher,
            failed_credentials=failed_credentials,
            audit=audit,
            public_url=public_url,
            clock=clock,
        )
        stack.push_async_callback(sign_in_mount.aclose)
        api = ApiContext(
            broker=broker,
            servers=servers,
            made=made,
            probe=lambda server: noting(
                broker.outages, servers, server, probe(forwarder.upstream, route_to(_impatient(server)))
            ),
            list_tools=lambda server, account: noting(broker.outages, servers, server, noted_tools(server, account)),
            database=database,
            settings=lambda: application.settings,
            public_url=public_url,
            clock=clock,
            authenticator=callers,
            directory=callers.directory,
            failed_credentials=failed_credentials,
            session_caller=visitors.session_caller,
        )
        site = Site(
            broker=broker,
            servers=servers,
            database=database,
            public_url=public_url,
            draining=lambda: router.draining,
            start=start,
            api=ApiMount(api) if settings.admin.enabled else None,
            visitors=visitors,
            audit=audit,
            sign_in=sign_in_mount.pages,
            problems=callers.problems,
            find_principal=callers.directory.principal,
            on_loopback=is_loopback(listening.host),
            clock=clock,
        )
        guard = Guard(listen=listening, public_url=public_url, inbound=settings.inbound)
        router = Router(
            guard=guard,
            servers=servers,
            forwarder=forwarder,
            site=site.build(),
            authenticator=authenticator or callers,
            resource=ProtectedResource(public_url, settings.inbound),
            failed_credentials=failed_credentials,
            session_key=await SharedSecrets(database).get(SESSION_IDS),
        )
        servers.on_change(lambda change: _forget_series(servers, change.removed))
        servers.on_change(lambda change: _forget_pools(servers, http))
        servers.on_change(lambda change: application.configure_forwarder())
        application = Application(
            settings=settings,
            listening=listening,
            public_url=public_url,
            servers=servers,
            made=made,
            announcer=announcer,
            broker=broker,
            webhook=webhook,
            resolver=dialer.resolver,
            connections=ConnectionLimits(_connection_rules(settings, shares)),
            http=http,
            forwarder=forwarder,
            catalogs=catalogs,
            router=router,
            site=site,
            callers=callers,
            visitors=visitors,
            sign_in=sign_in_mount,
            database=database,
        )
        yield application


async def _check_imports(store: StoreSettings) -> None:
    """Make sure that ``store.import`` can be taken in, before a store is made for it. Raises ConfigurationError."""
    if store.imports.files and not store_exists(store):
        await _first_imports().check(store.imports)


def _first_imports() -> ModuleType:
    """Return ``store.first_imports``, which few need."""
    return importlib.import_module("mcp_auth_proxy.store.first_imports")


def _accept_token(callers: Callers, settings: Settings, *, now: float) -> None:
    """Let the key in the file ``api-token`` use the API, if the file can be used."""
    path = token_path(settings)
    if path is None:
        logger.info(
            "the API is off: with PostgreSQL and inbound.mode none, admin.token_file must name a file for its key"
        )
        return
    try:
        callers.accept_token(obtain_token(path, now=now))
    except OSError as error:
        logger.warning("the API can't be used: its key can't be kept in %s (%s)", path, error.strerror or error)


def _is_served(store: StoreSettings, public_url: str) -> bool:
    """Return whether a process on this machine and store is listening at a URL that browsers here reach it at."""
    origin = urls.parse(public_url).origin
    if origin.scheme != "http" or not is_loopback(origin.host):
        return False
    hosts = ("0.0.0.0", "::")
    return any(
        address.port == origin.port and (is_loopback(address.host) or address.host in hosts)
        for address in serving.addresses(store)
    )


def _impatient(server: ServerSettings) -> ServerSettings:
    """Return a server of which a user of the API does not wait for an answer as long as a tool may take."""
    return replace(server, upstream_timeout=min(server.upstream_timeout, PROBE_SECONDS))


def _opens_links(settings: Settings) -> bool:
    """Return whether the proxy or ``login`` may open links in a browser, wherever there is a desktop."""
    return settings.authorization.open_browser != "never"


def _connection_rules(settings: Settings, shares: Shares) -> ConnectionRules:
    return ConnectionRules.of(shares.clients, settings.limits.connections_per_address, settings.inbound.trusted_proxies)


def _shares(limits: LimitSettings) -> Shares:
    """Divide the process's descriptors; warn if there are fewer than configured."""
    shares = descriptors.shares(limits.connections)
    if limits.connections is not None and shares.clients < limits.connections:
        logger.warning(
            "the process may open too few files for limits.connections: %d connections of clients are accepted, not %d",
            shares.clients,
            limits.connections,
        )
    return shares


def _forget_series(servers: ServerRegistry, removed: Collection[str]) -> None:
    def forget() -> None:
        for name in removed:
            if name not in servers:
                metrics.registry.forget_server(name)

    asyncio.get_running_loop().call_later(FORGET_DELAY, forget)


def _forget_pools(servers: ServerRegistry, http: HttpClient) -> None:
    """Close the connections to servers that were made at run time and are gone, once nobody uses them."""

    def forget() -> None:
        routes = map(route_to, servers.made.values())
        http.discard_unused({(route.origin, route.policy) for route in routes if route.policy is not None})

    if servers.made or http.has_guarded:
        asyncio.get_running_loop().call_later(FORGET_DELAY, forget)


class Announcer:
    """Announce each new flow once: in the log, and in a browser if there is a desktop."""

    def __init__(self, settings: Settings, listening: Address, *, opening: Callable[[Flow], None]) -> None:
        """``opening`` is called with a flow right before its link is opened in a browser."""
        self._opening = opening
        self._on_loopback = is_loopback(listening.host)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Apply changed settings to the flows that are announced from now on."""
        self.opens = browser.should_open(
            settings.authorization.open_browser, loopback=self._on_loopback, environ=os.environ
        )

    def __call__(self, flow: Flow, link: str) -> None:
        server, address = flow.key.account.shown, sign_in(flow).address
        logger.warning("server %s needs your authorization at %s, open this link: %s", server, address, link)
        if flow.device is not None:
            # The link may lead to a machine that no browser reaches; this address works on any device.
            url, code = flow.device.verification_uri, flow.device.user_code
            logger.warning("server %s: or open %s on any device, and enter %s", server, url, code)
        if self.opens:
            self._opening(flow)
            browser.open_link(link)
