"""``serve``: the proxy in the foreground until a signal ends it."""

import gc
import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext

import click

from mcp_auth_proxy import __version__
from mcp_auth_proxy.app import Application, effective_public_url, lifespan
from mcp_auth_proxy.cli.allocator import returning_memory
from mcp_auth_proxy.cli.install import CLIENT_NAMES
from mcp_auth_proxy.cli.listener import Server, bind, bound
from mcp_auth_proxy.cli.reloading import reloading
from mcp_auth_proxy.cli.terminal import complain, say, styled
from mcp_auth_proxy.config import loops
from mcp_auth_proxy.config.inbound import warnings
from mcp_auth_proxy.config.load import limit_warnings
from mcp_auth_proxy.config.oauth import first_contact_warning
from mcp_auth_proxy.config.reload import ConfigFile
from mcp_auth_proxy.config.settings import Settings, reachable
from mcp_auth_proxy.errors import StoreUnavailable, without_query_values
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.net import descriptors
from mcp_auth_proxy.net.resolver import Resolver
from mcp_auth_proxy.store import serving

logger = logging.getLogger(__name__)

MAX_SHOWN = 20


async def serve_forever(settings: Settings, file: ConfigFile | None, *, for_bridges: bool = False) -> int:
    """Serve until SIGTERM or SIGINT, then drain. Return the exit code. Raises McpAuthProxyError.

    ``file`` is what ``settings`` were read from, and is read again when it changes; None if there is no file.
    ``for_bridges``: a bridge of ``stdio`` has started this process, which ends when there is none any more.
    """
    given = None if file is not None else next(iter(settings.servers.values()))
    only, name = ("", "") if given is None else (serving.server_mark(given.url), given.name)
    descriptors.raise_limit()
    if warning := first_contact_warning(settings.servers):
        logger.warning("%s", warning)
    for warning in [*warnings(settings.inbound), *limit_warnings(settings.limits)]:
        logger.warning("%s", warning)
    with ExitStack() as sockets:
        if for_bridges:
            from mcp_auth_proxy.cli.stdio_bridge.serving_bridges import bind_for_bridges, serving_bridges

            sock, address = await bind_for_bridges(settings, configured=file is not None)
        else:
            sock, address = bind(settings.listen)
        sockets.enter_context(sock)
        health = None
        if settings.health_listen is not None:
            health, health_address = bind(settings.health_listen, chosen_by="the key 'health_listen'")
            sockets.enter_context(health)
        await loops.check(settings, address, effective_public_url(settings, address), resolver=Resolver())
        async with lifespan(settings, address, announce_key=complain) as application:
            ids = application.database.cipher.key_ids
            lock = serving.hold(settings.store, bound(sock), only=only, name=name, for_bridges=for_bridges, keys=ids)
            application.on_new_keys = lock.set_keys
            server = Server(application, health=health, before_close=lock.release)
            bridges = serving_bridges(application, server, only=only) if for_bridges else nullcontext()
            async with returning_memory(), bridges, reloading(application, file, stop=server.drain_and_exit):
                _say_what_is_served(application)
                application.broker.on_connected(_say_once_that_it_is_ready())
                if settings.inbound.modes:
                    await _warn_of_left_grants(application)
                if health is not None:
                    logger.info("/healthz, /readyz and /metrics are also at http://%s", reachable(health_address))
                # Objects made at start-up are never freed: the garbage collector need not visit them again.
                gc.collect()
                gc.freeze()
                await server.serve(sockets=[sock])
    return 0


async def _warn_of_left_grants(application: Application) -> None:
    """Say which grants nobody can use: those from when callers were not identified."""
    try:
        left = await application.broker.stored_grants.count(LOCAL)
    except StoreUnavailable:
        # Everything is ready, and goes on when the store is back.
        return
    if left:
        logger.warning(
            "%d grant%s of 'local' %s left from when callers were not identified, and nobody can use %s: "
            "`mcp-auth-proxy grants assign --from local --to NAME|shared` gives %s to somebody",
            left,
            "s"[: left != 1],
            "is" if left == 1 else "are",
            "it" if left == 1 else "them",
            "it" if left == 1 else "them",
        )


def _say_once_that_it_is_ready() -> Callable[[Account], None]:
    """Return a function that logs, for the first grant of each server that is used, that the server is ready."""
    ready: set[str] = set()

    def connected(account: Account) -> None:
        if account.server not in ready:
            ready.add(account.server)
            logger.info("server %s is ready", account.server)

    return connected


def _say_what_is_served(application: Application) -> None:
    """Print a banner or, if the log is JSON, log one line."""
    names, base = list(application.settings.servers), application.public_url
    if click.get_current_context().params.get("log_format") == "json":
        many = "s"[: len(names) != 1]
        logger.info("mcp-auth-proxy %s is listening at %s with %d server%s", __version__, base, len(names), many)
        return
    say(styled(f"mcp-auth-proxy {__version__} is listening at {base}", bold=True), "")
    needs = " (sign in first)" if application.settings.inbound.modes else ""
    rows = [("dashboard", f"{base}/{needs}"), ("store", application.settings.store.shown)]
    for name in names[:MAX_SHOWN]:
        url = without_query_values(application.settings.servers[name].url)
        rows.append((name, f"{base}/{name}/mcp  ->  {url}"))
    if len(names) > MAX_SHOWN:
        rows.append(("", f"and {len(names) - MAX_SHOWN} more"))
    width = max(len(name) for name, _ in rows)
    say(*(f"  {name:<{width}}  {text}" for name, text in rows))
    hint = f"To point an MCP client at it: mcp-auth-proxy install {'|'.join(CLIENT_NAMES)} {names[0]}"
    credential = "; it needs a credential of its user (inbound.mode)" if application.settings.inbound.modes else ""
    say("", hint + credential, "")
