"""``login``: authorize an account from a terminal. It uses the store directly, whether or not a proxy is running."""

import asyncio
import os
import socket
from contextlib import AsyncExitStack
from dataclasses import replace
from urllib.parse import quote

from mcp_auth_proxy.app import Application, lifespan
from mcp_auth_proxy.broker import ChallengeHistory, FlowRequest, PendingAuthorization
from mcp_auth_proxy.broker.requested_flows import notice
from mcp_auth_proxy.cli.account import owner_of, server_of
from mcp_auth_proxy.cli.invitation import (
    NOT_USED,
    LoginOptions,
    client_line,
    invitation,
    needs_waiting,
    not_in_time,
    offer,
    paste_lines,
    who_opens,
)
from mcp_auth_proxy.cli.listener import bind, in_numbers, listening
from mcp_auth_proxy.cli.owners import account_of, in_command, require_admitted, require_owner, split
from mcp_auth_proxy.cli.paste import Params, PastedLines, read_addresses
from mcp_auth_proxy.cli.terminal import complain, say, waiting
from mcp_auth_proxy.config.document import located
from mcp_auth_proxy.config.listeners import exposure_errors
from mcp_auth_proxy.config.settings import Address, ServerSettings, Settings, reachable
from mcp_auth_proxy.errors import (
    MAX_MESSAGE,
    AddressInUse,
    AuthorizationServerUnavailable,
    ConfigurationError,
    McpAuthProxyError,
    excerpt,
)
from mcp_auth_proxy.models import AccessToken, Account, Flow, FlowMode, GrantType, Tool
from mcp_auth_proxy.proxy.probe import ask, end_session, probe
from mcp_auth_proxy.proxy.routes import Route, route_to
from mcp_auth_proxy.proxy.tool_list import list_tools
from mcp_auth_proxy.store import provisional_store, serving
from mcp_auth_proxy.web import browser

MAX_TRIES = 5
"""How often a stored login is tried: a renewed token, or a new nonce, is tried again."""

NOT_RUNNING = (
    "No proxy is running with this configuration. Start it before the link is opened: its callback finishes the login. "
    "Without one, use --paste."
)


async def login(settings: Settings, name: str, *, owner: str | None = None, options: LoginOptions) -> int:
    """Authorize one account and list the tools that it sees. Return the exit code; raise McpAuthProxyError.

    ``owner``: the principal that it is for, if callers are identified. If a proxy is running, its callback completes
    the flow, and this process learns of it from the store. Otherwise this process listens itself, unless its user
    brings the address of the callback. A store that it had to make is removed if it fails.
    """
    server_name, account_name = split(name)
    server = server_of(settings, server_name)
    require_owner(settings, server, owner)
    # The secrets of the other servers may be missing here: their grants are left to the running proxy.
    # Nobody needs the API of this process, which would leave its key behind.
    settings = replace(settings, servers={server.name: server}, admin=replace(settings.admin, enabled=False))
    settings = _at_its_proxy(settings, server)
    new_key: list[str] = []
    async with AsyncExitStack() as stack:
        stack.enter_context(provisional_store(settings.store))
        sock, address = (None, settings.listen) if options.paste else _take_callback(settings, stack, options)
        application = await stack.enter_async_context(
            lifespan(settings, address, announce=_say_nothing, announce_key=new_key.append)
        )
        # This command lists the tools itself; what a server offers is remembered by the proxy that uses the grant.
        application.catalogs.enabled = False
        if sock is not None:
            await stack.enter_async_context(listening(application, sock))
        principal = await owner_of(application, owner)
        if principal is not None and settings.inbound.modes:
            require_admitted(server, principal)
        account = account_of(server, principal, account_name)
        attempt = LoginAttempt(application, server, account, owner, options)
        outcome = await attempt.authorize()
        complain(*new_key)
        if isinstance(outcome, PendingAuthorization):
            say(outcome.link)
            return 0
        connected = await _authorized(application, account) if outcome else f"{server.name} asks for no authorization."
        if options.no_wait:
            complain(connected)
            return 0
        say(connected)
        if outcome is not None:
            say(client_line(f"{application.public_url}/{quote(account.shown, safe='@')}/mcp"))
        say(offer(tool.name for tool in await _tools(application, server, account)))
    return 0


def _at_its_proxy(settings: Settings, server: ServerSettings) -> Settings:
    """Return the settings with the address of the proxy that runs for this URL, which no file names."""
    if settings.source is not None:
        return settings
    mark = serving.server_mark(server.url)
    found = next((process for process in serving.processes(settings.store) if process.only == mark), None)
    return settings if found is None else replace(settings, listen=found.address)


def _take_callback(
    settings: Settings, stack: AsyncExitStack, options: LoginOptions
) -> tuple[socket.socket | None, Address]:
    """Return a socket to listen for the callback, None if a running proxy does or nobody has to; and the address.

    Raises ConfigurationError and McpAuthProxyError.
    """
    try:
        sock, address = bind(settings.listen)
    except AddressInUse:
        _require_our_proxy(settings)
        return None, settings.listen
    if options.no_wait:
        sock.close()
        complain(NOT_RUNNING)
        return None, settings.listen
    stack.enter_context(sock)
    _require_leave_to_listen(settings)
    return sock, address


class LoginAttempt:
    """One account that is being authorized from a terminal."""

    def __init__(
        self,
        application: Application,
        server: ServerSettings,
        account: Account,
        owner: str | None,
        options: LoginOptions,
    ) -> None:
        self._application = application
        self._broker = application.broker
        self._server = server
        self._account = account
        self._owner = owner
        self._options = options
        self._shown = account.shown
        self._replaces = False
        """Whether the user authorizes again though a login is stored."""
        # The link alone is on stdout if nobody waits for the user.
        self._tell = complain if options.no_wait else say

    async def authorize(self) -> AccessToken | PendingAuthorization | None:
        """Return the token of the account, after its user has consented if necessary.

        None if the server asks for no authorization; what waits for the user with ``no_wait``. Raises
        McpAuthProxyError.
        """
        stored, outcome = await self._stored()
        if stored is not None and not isinstance(outcome, PendingAuthorization):
            again = in_command(self._server, self._account.name, self._owner)
            forget = f"`mcp-auth-proxy logout {again}` forgets it"
            self._tell(f"A login for {self._shown} is stored already; {forget}.")
            return outcome
        if outcome is None or self._pastes:
            outcome = await self._begin()
        if not isinstance(outcome, PendingAuthorization):
            return outcome
        if not self._options.no_wait:
            return await self._wait(outcome)
        if outcome.flow.device is not None:
            raise needs_waiting(self._server.name)
        return outcome

    async def _stored(self) -> tuple[AccessToken | None, AccessToken | PendingAuthorization | None]:
        """Return the stored token, and what it leads to: see ``_try_stored``.

        None and None if there is none, or none that can be renewed: then the user authorizes again, and what is stored
        stays until then. Raises McpAuthProxyError.
        """
        stored: AccessToken | None = None
        outcome: AccessToken | PendingAuthorization | None = None
        try:
            stored = await self._broker.token(self._account)
            if stored is not None:
                outcome = await self._try_stored(stored)
        except AuthorizationServerUnavailable:
            if not await self._broker.was_refused(self._account):
                raise
        if not isinstance(outcome, PendingAuthorization) and await self._broker.was_refused(self._account):
            self._tell(f"The login for {self._shown} that is stored can't be renewed. It stays until there is another.")
            self._replaces = True
            return None, None
        return stored, outcome

    @property
    def _pastes(self) -> bool:
        """Whether the user is to bring an address: other grants have no redirect."""
        return self._options.paste and self._server.oauth.grant is GrantType.AUTHORIZATION_CODE

    @property
    def _route(self) -> Route:
        return replace(route_to(self._server), account=self._account)

    async def _begin(self) -> AccessToken | PendingAuthorization | None:
        status, challenge = await probe(self._application.forwarder.upstream, self._route)
        if not self._pastes:
            # Only the latter returns a token that is stored.
            begin = self._broker.begin if self._replaces else self._broker.authorize
            return await begin(self._account, status=status, challenge=challenge)
        wanted = FlowRequest(mode=FlowMode.HEADLESS)
        outcome, _ = await self._broker.request_flow(self._account, wanted, status=status, challenge=challenge)
        return outcome

    async def _wait(self, pending: PendingAuthorization) -> AccessToken:
        """Wait until the user has consented, with a new link whenever one expires before the time is over."""
        ends = None if self._options.wait is None else self._application.database.now() + self._options.wait
        lines = PastedLines() if self._pastes else None
        while True:
            expires = pending.flow.expires_at
            seconds = (expires if ends is None else min(ends, expires)) - self._application.database.now()
            if lines is None:
                await self._invite(pending)
                with waiting("Waiting for your consent"):
                    token = await pending.wait(seconds)
            else:
                token = await self._pasted(pending, lines, seconds)
            if token is not None:
                return token
            if ends is None:
                raise McpAuthProxyError(NOT_USED)
            if self._application.database.now() >= ends:
                raise not_in_time(self._options.wait)
            again = await self._begin()
            if not isinstance(again, PendingAuthorization):
                raise McpAuthProxyError(NOT_USED)
            pending = again

    async def _invite(self, pending: PendingAuthorization) -> None:
        """Print the link, and open it if there is a desktop and no process has opened it yet."""
        identified = bool(self._application.settings.inbound.modes)
        say(*invitation(self._shown, pending, who_opens(self._account, self._owner) if identified else None))
        choice = self._application.settings.authorization.open_browser
        # The link is for somebody who is signed in, at whichever machine.
        if identified or not browser.should_open(choice, loopback=True, environ=os.environ):
            return
        if await self._broker.claim_window(pending.flow):
            self._broker.link_opened(pending.flow)
            browser.open_link(pending.link)

    async def _pasted(self, pending: PendingAuthorization, lines: PastedLines, seconds: float) -> AccessToken | None:
        """Print the authorization server's address, and read that of the redirect from standard input."""
        address = await self._broker.authorization_url(pending.flow)
        if address is None:
            raise McpAuthProxyError(NOT_USED)
        uri = pending.flow.redirect_uri
        say(*paste_lines(self._shown, address, notice(pending.flow), uri))

        async def use(params: Params) -> None:
            await self._broker.complete_pasted(self._account, params)

        reading = asyncio.ensure_future(read_addresses(lines, uri, use))
        try:
            # Somebody else may be faster: with the link of a running proxy, or with the API.
            token = await pending.wait(seconds, interrupt=reading)
            if token is not None or not reading.done():
                return token
            reading.result()
            return await pending.wait(0)
        finally:
            reading.cancel()

    async def _try_stored(self, token: AccessToken) -> AccessToken | PendingAuthorization:
        """Return a token that the server accepts, renewed if necessary, or else the authorization to wait for.

        Raises McpAuthProxyError.
        """
        history, upstream, route = ChallengeHistory(), self._application.forwarder.upstream, self._route
        for _ in range(MAX_TRIES):
            answer = await ask(upstream, route, "initialize", token=token)
            await end_session(upstream, route, answer, token=token)
            verdict = await self._broker.challenged(
                route.account,
                sent_to=route.server,
                status=answer.status,
                challenge=answer.challenge,
                nonce=answer.all(b"dpop-nonce"),
                used=token,
                history=history,
            )
            if verdict is None:
                return token
            if isinstance(verdict, PendingAuthorization):
                self._tell(f"{route.server.name} no longer accepts the login that is stored.")
                return verdict
            token = verdict
        raise McpAuthProxyError(f"{route.server.name} refuses every token that is renewed for it.")


async def _authorized(application: Application, account: Account) -> str:
    """Return that an account is connected, and whose it is at the server."""
    connected = await application.broker.connected(account)
    label = f" as {connected.label}" if connected is not None and connected.label else ""
    return f"{account.shown} is connected{label}."


async def _tools(application: Application, server: ServerSettings, account: Account) -> list[Tool]:
    """Use the server as any client would, to make sure that it works. Raises McpAuthProxyError."""
    try:
        return await list_tools(application.broker, application.forwarder.upstream, server, account)
    except McpAuthProxyError as error:
        raise McpAuthProxyError(
            f"The tools of {server.name} could not be listed: {excerpt(str(error).rstrip('.'), MAX_MESSAGE)}. "
            f"Is {server.url} its MCP endpoint?"
        ) from None


def _require_leave_to_listen(settings: Settings) -> None:
    """Raise an error if this command would serve the stored grants to other machines without being told.

    It must not identify callers without the secrets that this takes either. Raises ConfigurationError and
    McpAuthProxyError.
    """
    source = settings.source
    if settings.inbound.sign_in is not None or settings.inbound.trusted_header is not None:
        raise McpAuthProxyError(
            "No proxy is running, and this command does not read the secrets with which callers sign in. Start the "
            "proxy first."
        )
    if source is not None and (errors := exposure_errors(settings, False, otherwise="start the proxy first")):
        raise ConfigurationError(located(errors, source), str(source))


def _require_our_proxy(settings: Settings) -> None:
    """Raise AddressInUse if another program has the address of the proxy: it would get the callback with the code.

    What a program answers proves nothing, so nothing is asked. A running proxy holds a lock beside its store.
    """
    wanted = reachable(in_numbers(settings.listen))
    everywhere = "::" if ":" in wanted.host else "0.0.0.0"
    served = serving.addresses(settings.store)
    if not any(address.port == wanted.port and address.host in (wanted.host, everywhere) for address in served):
        raise AddressInUse(
            f"{settings.listen} is taken by another program, so the callback could not be received there: no running "
            f"proxy holds the store {settings.store.shown} and that address. End that program, or choose another "
            f"address with the key 'listen'."
        )


def _say_nothing(flow: Flow, link: str) -> None:
    """Do nothing: the command prints the link itself."""
