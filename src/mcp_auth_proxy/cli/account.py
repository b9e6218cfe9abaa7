"""``login`` and ``logout``. They use the store directly, whether or not a proxy is running."""

import os
import time
from contextlib import AsyncExitStack
from dataclasses import replace

from mcp_auth_proxy.app import Application, lifespan
from mcp_auth_proxy.broker import (
    ChallengeHistory,
    Disconnected,
    ForgottenGrant,
    PendingAuthorization,
    Revocation,
)
from mcp_auth_proxy.cli.invitation import NOT_USED, invitation, offer, who_opens
from mcp_auth_proxy.cli.listener import bind, in_numbers, listening
from mcp_auth_proxy.cli.owners import (
    account_of,
    find_principal,
    in_command,
    require_admitted,
    require_owner,
    split,
)
from mcp_auth_proxy.cli.terminal import complain, say, waiting
from mcp_auth_proxy.config.document import located
from mcp_auth_proxy.config.listeners import exposure_errors
from mcp_auth_proxy.config.settings import ServerSettings, Settings, reachable
from mcp_auth_proxy.errors import (
    MAX_MESSAGE,
    AddressInUse,
    ConfigError,
    ConfigurationError,
    McpAuthProxyError,
    excerpt,
)
from mcp_auth_proxy.models import LOCAL_PRINCIPAL, AccessToken, Account, Flow, Principal, Tool
from mcp_auth_proxy.proxy.probe import ask, end_session, probe
from mcp_auth_proxy.proxy.routes import Route, route_to
from mcp_auth_proxy.proxy.tool_list import list_tools
from mcp_auth_proxy.store import provisional_store, serving
from mcp_auth_proxy.web import browser
from mcp_auth_proxy.web.paths import name_of

MAX_TRIES = 5
"""How often a stored login is tried: a renewed token, or a new nonce, is tried again."""


async def login(settings: Settings, name: str, *, owner: str | None = None) -> int:
    """Authorize one account and list the tools that it sees. Return the exit code; raise McpAuthProxyError.

    ``owner``: the principal that it is for, if callers are identified. If a proxy is running, its callback completes
    the flow, and this process learns of it from the store. Otherwise this process listens itself. A store that it had
    to make stays only if there is a grant to keep.
    """
    server_name, account_name = split(name)
    server = server_of(settings, server_name)
    require_owner(settings, server, owner)
    # The secrets of the other servers may be missing here: their grants are left to the running proxy.
    # Nobody needs the API of this process, which would leave its key behind.
    settings = replace(settings, servers={server.name: server}, admin=replace(settings.admin, enabled=False))
    new_key: list[str] = []
    async with AsyncExitStack() as stack:
        stack.enter_context(provisional_store(settings.store))
        try:
            sock, address = bind(settings.listen)
        except AddressInUse:
            sock, address = None, settings.listen
            _require_our_proxy(settings)
        if sock is not None:
            stack.enter_context(sock)
            _require_leave_to_listen(settings)
        application = await stack.enter_async_context(
            lifespan(settings, address, announce=_say_nothing, announce_key=new_key.append)
        )
        if sock is not None:
            await stack.enter_async_context(listening(application, sock))
        principal = await _owner(application, owner)
        if principal is not None and settings.inbound.modes:
            require_admitted(server, principal)
        account = account_of(server, principal, account_name)
        token = await _authorize(application, server, account, owner)
        complain(*new_key)
        say(await _authorized(application, account) if token else f"{server.name} asks for no authorization.")
        say(offer(tool.name for tool in await _tools(application, server, account)))
    return 0


async def _owner(application: Application, name: str | None) -> Principal | None:
    """Return the principal that a command is for; None if the grants of its server are shared.

    Raises McpAuthProxyError.
    """
    if not application.settings.inbound.modes:
        return LOCAL_PRINCIPAL
    if name is None:
        return None
    directory = application.callers.directory
    await directory.reload()
    return find_principal(directory.principals(), name)


async def _authorize(
    application: Application, server: ServerSettings, account: Account, owner: str | None
) -> AccessToken | None:
    """Return the token of an account, after its user has consented if necessary.

    None if the server asks for no authorization.
    """
    broker, shown = application.broker, name_of(account)
    route = replace(route_to(server), account=account)
    stored = await broker.token(account)
    outcome: AccessToken | PendingAuthorization | None
    if stored is not None:
        outcome = await _try_stored(application, route, stored)
        if not isinstance(outcome, PendingAuthorization):
            forget = f"`mcp-auth-proxy logout {in_command(server, account.name, owner)}` forgets it"
            say(f"A login for {shown} is stored already; {forget}.")
    else:
        status, challenge = await probe(application.forwarder.upstream, route)
        outcome = await broker.authorize(account, status=status, challenge=challenge)
    if not isinstance(outcome, PendingAuthorization):
        return outcome
    identified = bool(application.settings.inbound.modes)
    say(*invitation(shown, outcome, who_opens(account, owner) if identified else None))
    choice = application.settings.authorization.open_browser
    # The link is for somebody who is signed in, at whichever machine.
    if not identified and browser.should_open(choice, loopback=True, environ=os.environ):
        broker.link_opened(outcome.flow)
        browser.open_link(outcome.link)
    with waiting("Waiting for your consent"):
        token = await outcome.wait(max(0.0, outcome.flow.expires_at - time.time()))
    if token is None:
        raise McpAuthProxyError(NOT_USED)
    return token


async def _authorized(application: Application, account: Account) -> str:
    """Return that an account is connected, and whose it is at the server."""
    connected = await application.broker.connected(account)
    label = f" as {connected.label}" if connected is not None and connected.label else ""
    return f"{name_of(account)} is connected{label}."


async def _try_stored(application: Application, route: Route, token: AccessToken) -> AccessToken | PendingAuthorization:
    """Return a token that the server accepts, renewed if necessary, or the authorization to wait for if it takes none.

    Raises McpAuthProxyError.
    """
    history, upstream = ChallengeHistory(), application.forwarder.upstream
    for _ in range(MAX_TRIES):
        answer = await ask(upstream, route, "initialize", token=token)
        await end_session(upstream, route, answer, token=token)
        verdict = await application.broker.challenged(
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
            say(f"{route.server.name} no longer accepts the login that is stored.")
            return verdict
        token = verdict
    raise McpAuthProxyError(f"{route.server.name} refuses every token that is renewed for it.")


async def _tools(application: Application, server: ServerSettings, account: Account) -> list[Tool]:
    """Use the server as any client would, to make sure that it works. Raises McpAuthProxyError."""
    try:
        return await list_tools(application.broker, application.forwarder.upstream, server, account)
    except McpAuthProxyError as error:
        raise McpAuthProxyError(
            f"The tools of {server.name} could not be listed: {excerpt(str(error).rstrip('.'), MAX_MESSAGE)}. "
            f"Is {server.url} its MCP endpoint?"
        ) from None


async def logout(settings: Settings, name: str, *, owner: str | None = None, forget_client: bool) -> int:
    """Delete the grants of an account and revoke them. Return the exit code; raise McpAuthProxyError.

    ``owner``: whose they are, if callers are identified. If a revocation fails, the grant is deleted all the same, and
    the error says so.
    """
    server_name, account_name = split(name)
    server = server_of(settings, server_name)
    require_owner(settings, server, owner)
    async with lifespan(settings, settings.listen, background=False, announce_key=complain) as application:
        account = account_of(server, await _owner(application, owner), account_name)
        result = await application.broker.disconnect(account, forget_client=forget_client)
    done, failed = _logout_lines(result)
    for line in done:
        say(line)
    if failed:
        raise McpAuthProxyError(" ".join(failed))
    if not done:
        say(f"{name_of(account)}: nothing was connected.")
    return 0


def _logout_lines(result: Disconnected) -> tuple[list[str], list[str]]:
    """Return what was done and what failed, in lines for the terminal."""
    server = name_of(result.account)
    done = [_forgotten_line(server, grant) for grant in result.grants if grant.revocation is not Revocation.FAILED]
    if result.client_forgotten:
        done.append(f"{server}: the next authorization registers a new client")
    failed = [_forgotten_line(server, grant) for grant in result.grants if grant.revocation is Revocation.FAILED]
    return done, failed


def _forgotten_line(server: str, grant: ForgottenGrant) -> str:
    match grant.revocation:
        case Revocation.REVOKED:
            return f"{server}: forgotten here and revoked at {grant.issuer}"
        case Revocation.NOT_OFFERED:
            return f"{server}: forgotten here; {grant.issuer} does not support revocation"
        case Revocation.FAILED:
            return (
                f"{server}: forgotten here, but not revoked at {grant.issuer}: {grant.reason} "
                f"Its tokens stay valid until they expire; to end them now, withdraw the access at the provider, for "
                f"example on its account page."
            )


def server_of(settings: Settings, name: str) -> ServerSettings:
    """Return the server with this name, or the only one if a URL was given."""
    if "://" in name:
        return next(iter(settings.servers.values()))
    try:
        return settings.servers[name]
    except KeyError:
        known = ", ".join(sorted(settings.servers))
        raise ConfigurationError([ConfigError("", f"There is no server {name!r}. Configured: {known}.")]) from None


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
            f"proxy holds the store {settings.store.path} and that address. End that program, or choose another "
            f"address with the key 'listen'."
        )


def _say_nothing(flow: Flow, link: str) -> None:
    """Do nothing: the command prints the link itself."""
