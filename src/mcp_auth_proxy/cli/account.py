"""``login`` and ``logout``. They use the store directly, whether or not a proxy is running."""

import logging
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
    sign_in,
)
from mcp_auth_proxy.cli.listener import bind, in_numbers, listening
from mcp_auth_proxy.cli.terminal import complain, say
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
from mcp_auth_proxy.models import LOCAL, AccessToken, Account, Flow
from mcp_auth_proxy.proxy.probe import ask, end_session, probe
from mcp_auth_proxy.proxy.routes import Route, route_to
from mcp_auth_proxy.store import provisional_store, serving
from mcp_auth_proxy.web import browser

MAX_TRIES = 5
"""How often a stored login is tried: a renewed token, or a new nonce, is tried again."""


async def login(settings: Settings, name: str) -> int:
    """Authorize one server and list its tools through the proxy. Return the exit code; raise McpAuthProxyError.

    If a proxy is running, its callback completes the flow, and this process learns of it from the store. Otherwise
    this process listens itself. A store that it had to make stays only if there is a grant to keep.
    """
    server = server_of(settings, name)
    # The secrets of the other servers may be missing here: their grants are left to the running proxy.
    settings = replace(settings, servers={server.name: server})
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
        token = await _authorize(application, server)
        complain(*new_key)
        say(f"{server.name} is connected." if token else f"{server.name} asks for no authorization.")
        await _list_tools(server, f"http://{reachable(address)}/{server.name}/mcp")
    return 0


async def _authorize(application: Application, server: ServerSettings) -> AccessToken | None:
    """Return the server's token, after the user has consented if necessary; None if it asks for no authorization."""
    broker, account = application.broker, Account(LOCAL, server.name)
    route = route_to(server)
    stored = await broker.token(account)
    outcome: AccessToken | PendingAuthorization | None
    if stored is not None:
        outcome = await _try_stored(application, route, stored)
        if not isinstance(outcome, PendingAuthorization):
            forget = f"`mcp-auth-proxy logout {server.command_name}` forgets it"
            say(f"A login for {server.name} is stored already; {forget}.")
    else:
        status, challenge = await probe(application.forwarder.upstream, route)
        outcome = await broker.authorize(account, status=status, challenge=challenge)
    if not isinstance(outcome, PendingAuthorization):
        return outcome
    say(*_invitation(server.name, outcome))
    opens = browser.should_open(application.settings.authorization.open_browser, loopback=True, environ=os.environ)
    if opens:
        broker.link_opened(outcome.flow)
        browser.open_link(outcome.link)
    token = await outcome.wait(max(0.0, outcome.flow.expires_at - time.time()))
    if token is None:
        raise McpAuthProxyError("The link was not used in time. Run login again for a new one.")
    return token


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


def _invitation(server: str, pending: PendingAuthorization) -> list[str]:
    """Return in lines what the user has to do: open a link here or, with a code, on any device (RFC 8628)."""
    device = pending.flow.device
    if device is None:
        return [f"Open this link to authorize {server}:", "", f"  {pending.link}", ""]
    asked = sign_in(pending.flow).in_words
    lines = [f"To authorize {asked}, open on any device", device.verification_uri, "and enter", device.user_code]
    if device.verification_uri_complete:
        lines += ["or open this address, and check that it shows the same code:", device.verification_uri_complete]
    return [part for number, line in enumerate(lines) for part in (("", f"  {line}", "") if number % 2 else (line,))]


async def _list_tools(server: ServerSettings, url: str) -> None:
    """Use the server as any client would, to make sure that it works. Raises McpAuthProxyError."""
    # Importing the SDK takes 0.6 s, which only the commands that use it should pay for.
    from mcp import Client

    # The SDK logs problems with tracebacks; what matters is in the error below.
    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    try:
        async with Client(url) as client:
            tools = (await client.list_tools()).tools
    except Exception as error:  # the SDK raises groups of whatever went wrong in its tasks
        raise McpAuthProxyError(
            f"The tools of {server.name} could not be listed: {excerpt(_first(error), MAX_MESSAGE)}. "
            f"Is {server.url} its MCP endpoint?"
        ) from None
    names = ", ".join(sorted(excerpt(tool.name) for tool in tools))
    say(f"It offers {len(tools)} tool{'s'[: len(tools) != 1]}{': ' if names else ''}{names}")


def _first(error: BaseException) -> str:
    """Return the text of the first error in a group of them, on one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


async def logout(settings: Settings, name: str, *, forget_client: bool) -> int:
    """Delete the grants of a server and revoke them. Return the exit code; raise McpAuthProxyError.

    If a revocation fails, the grant is deleted all the same, and the error says so.
    """
    server = server_of(settings, name)
    async with lifespan(settings, settings.listen, background=False, announce_key=complain) as application:
        result = await application.broker.disconnect(Account(LOCAL, server.name), forget_client=forget_client)
    done, failed = _logout_lines(result)
    for line in done:
        say(line)
    if failed:
        raise McpAuthProxyError(" ".join(failed))
    if not done:
        say(f"{server.name}: nothing was connected.")
    return 0


def _logout_lines(result: Disconnected) -> tuple[list[str], list[str]]:
    """Return what was done and what failed, in lines for the terminal."""
    server = result.account.server
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
    """Raise ConfigurationError if this command would serve the stored grants to other machines without being told."""
    source = settings.source
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
