"""``install CLIENT SERVER…`` on the command line: options, and where the proxy and its servers are known from."""

import os
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

import click

from mcp_auth_proxy.cli.completion import server_names
from mcp_auth_proxy.cli.install import CLIENT_NAMES
from mcp_auth_proxy.cli.options import EXAMPLE, config_option, examples, settings_from
from mcp_auth_proxy.config import location
from mcp_auth_proxy.errors import ConfigError, ConfigurationError

if TYPE_CHECKING:
    from mcp_auth_proxy.cli.install.command import Place

_SHARED = "--url https://proxy.example.com --api-key env:PROXY_KEY"


@click.command(
    "install",
    epilog=examples(
        "install claude-code linear", "install cursor linear notes@work --remove", f"install codex linear {_SHARED}"
    ),
)
@click.argument("client", type=click.Choice(CLIENT_NAMES), metavar="CLIENT")
@click.argument("servers", nargs=-1, required=True, metavar="SERVER...", shell_complete=server_names)
@config_option
@click.option("--url", metavar="URL", help="The public URL of a proxy that runs elsewhere. Default: the one here.")
@click.option(
    "--api-key",
    metavar="SOURCE",
    help="Where the client finds the key for the proxy: env:NAME; file:PATH for claude-desktop. Default: none.",
)
@click.option("--remove", is_flag=True, help="Take the entries out, and leave the file as it was. Default: add them.")
@click.option("--print", "print_only", is_flag=True, help="Print the entries, and write nothing. Default: off.")
def install(
    client: str,
    servers: tuple[str, ...],
    config_file: str | None,
    url: str | None,
    api_key: str | None,
    remove: bool,
    print_only: bool,
) -> None:
    """Enter each SERVER (a configured name, or SERVER@ACCOUNT) into the configuration of an MCP client.

    All else in the file stays as it is, and a backup is left beside it.
    """
    from mcp_auth_proxy.cli.install import command
    from mcp_auth_proxy.cli.install.clients import CLIENTS

    servers = tuple(dict.fromkeys(servers))
    if url is not None and config_file is not None:
        raise click.UsageError("Give --url or --config, not both.")
    for server in servers:
        _check_name(server)
    found = CLIENTS[client]
    command.check_key_source(found, api_key)
    if remove:
        known = None if url is not None else _known_here(config_file)
        sys.exit(command.remove(found, servers, known, print_only=print_only))
    if found.starts_programs and url is not None and api_key is None:
        raise click.UsageError(f"--url needs --api-key env:NAME or file:PATH for {client}.")
    place = _place(servers, config_file, url, api_key)
    sys.exit(command.install(found, servers, place, print_only=print_only))


def _check_name(server: str) -> None:
    """Check that a text may be the name of a server or account. Raises ConfigurationError."""
    from mcp_auth_proxy.web.paths import split_name

    if not split_name(server)[0]:
        # The text may be a URL with a secret in it.
        raise click.UsageError("SERVER is the name of a configured server, or SERVER@ACCOUNT; `status` shows them.")


def _place(servers: Collection[str], config_file: str | None, url: str | None, api_key: str | None) -> "Place":
    """Return the proxy that has these servers. Raises McpAuthProxyError."""
    from mcp_auth_proxy.cli.install import command

    if url is not None:
        from mcp_auth_proxy.cli.remote_proxy import checked_url

        # Which servers it has is known to those who have its key.
        base = checked_url(url)
        return command.Place(url=base, options=("--url", base), key_source=api_key)
    if location.find(config_file, os.environ) is None and (place := _single_place(servers)) is not None:
        return place
    settings = settings_from(config_file, secrets_of=())
    _require_known(servers, settings.servers)
    return command.local_place(settings, key_source=api_key)


def _single_place(servers: Collection[str]) -> "Place | None":
    """Return the proxy of ``serve URL``, if it was ever run; it knows its server, and the store earlier ones."""
    from mcp_auth_proxy.cli.install import command
    from mcp_auth_proxy.config.load import single_store
    from mcp_auth_proxy.config.settings import reachable
    from mcp_auth_proxy.store import serving, store_exists

    store = single_store(environ=os.environ)
    if not store_exists(store):
        return None
    running = {process.name: process for process in serving.processes(store) if process.name}
    _require_known(servers, _known_here(None) or ())
    found = [running[name] for name in (each.partition("@")[0] for each in servers) if name in running]
    base = f"http://{reachable(found[0].address)}" if found else command.served_url(store)
    # There is no file in which `stdio` would find the server's name.
    return command.Place(url=base, options=("--url", base))


def _known_here(config_file: str | None) -> Collection[str] | None:
    """Return the servers of the configuration or, without one, those that ``serve URL`` serves or served; else None."""
    import asyncio

    from mcp_auth_proxy.broker import stored_servers
    from mcp_auth_proxy.config.load import single_store
    from mcp_auth_proxy.store import open_store_read_only, serving, store_exists

    if location.find(config_file, os.environ) is not None:
        return list(settings_from(config_file, secrets_of=()).servers)
    store = single_store(environ=os.environ)

    async def read() -> list[str]:
        database = await open_store_read_only(store)
        try:
            return list(await stored_servers(database))
        finally:
            await database.close()

    if not store_exists(store):
        return None
    return {*asyncio.run(read()), *(process.name for process in serving.processes(store) if process.name)}


def _require_known(servers: Collection[str], known: Collection[str]) -> None:
    unknown = [server for server in servers if server.partition("@")[0] not in known]
    if unknown:
        there = ", ".join(sorted(known)) or f"none; `mcp-auth-proxy serve {EXAMPLE}` would serve one"
        names = ", ".join(map(repr, unknown))
        raise ConfigurationError([ConfigError("", f"There is no server {names}. Configured: {there}.")])
