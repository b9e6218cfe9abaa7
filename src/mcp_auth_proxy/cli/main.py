"""The command line: finds the configuration, runs a command, turns errors into one line and an exit code."""

import os
import sys
from typing import TYPE_CHECKING

import click
from click.exceptions import NoArgsIsHelpError

from mcp_auth_proxy import __version__
from mcp_auth_proxy.cli.callers import api_keys, principals
from mcp_auth_proxy.cli.completion import VARIABLE, completion, server_names
from mcp_auth_proxy.cli.entering import install as install_entries
from mcp_auth_proxy.cli.grants import grants
from mcp_auth_proxy.cli.hardening import protect_process
from mcp_auth_proxy.cli.keys import keys
from mcp_auth_proxy.cli.moving.command import export_command, import_command
from mcp_auth_proxy.cli.options import (
    EXAMPLE,
    account_options,
    config_option,
    config_path,
    config_place,
    duration_option,
    examples,
    log_options,
    name_file,
    passed_log_options,
    refuse_both,
    run,
    settings_from,
)
from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.config import location
from mcp_auth_proxy.errors import ConfigurationError, KeyRejected, McpAuthProxyError

if TYPE_CHECKING:
    from mcp_auth_proxy.cli.remote_proxy import RemoteProxy
    from mcp_auth_proxy.config.settings import Settings

_REMOTE = "--url https://proxy.example.com --api-key env:PROXY_KEY"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(f"serve {EXAMPLE}", "demo"),
)
@click.version_option(__version__, "-V", "--version", prog_name="mcp-auth-proxy")
def cli() -> None:
    """Let any MCP client use OAuth-protected MCP servers without doing OAuth itself."""


@cli.command(epilog=examples(f"serve {EXAMPLE}", "serve --config mcp-auth-proxy.yaml --listen 9000"))
@click.argument("url", required=False)
@config_option
@click.option(
    "--listen",
    metavar="[HOST:]PORT",
    help="Address to listen on, by default on 127.0.0.1. Overrides the configuration. Default: 127.0.0.1:8787.",
)
@click.option(
    "--allow-anonymous", is_flag=True, help="Listen beyond loopback, as with inbound.allow_anonymous. Default: off."
)
@click.option(
    "--access-log", is_flag=True, help="Log each finished request. Default: off; at level debug it is always on."
)
@click.option("--for-bridges", is_flag=True, hidden=True)
@log_options
def serve(
    url: str | None, config_file: str | None, listen: str | None, allow_anonymous: bool, for_bridges: bool
) -> None:
    """Run the proxy for the configured servers, or for the server at URL."""
    from mcp_auth_proxy.cli.serve import serve_forever
    from mcp_auth_proxy.config import load as config
    from mcp_auth_proxy.config.reload import ConfigFile

    if url is not None:
        refuse_both(config_file)
        if "." not in url and ":" not in url:
            known = "Give the URL of a server, or nothing to serve all that are configured."
            raise click.UsageError(f"{url!r} is not a URL. {known}")
        settings = config.single(url, listen=listen, allow_anonymous=allow_anonymous)
        run(serve_forever(settings, None, for_bridges=for_bridges))
        return
    place = config_place(config_file)
    file = ConfigFile(place.path, listen=listen, allow_anonymous=allow_anonymous, programs=place.is_chosen)
    settings = file.read()
    name_file(file.path)
    run(serve_forever(settings, file, for_bridges=for_bridges))


@cli.command(epilog=examples("stdio linear", f"stdio {EXAMPLE}", f"stdio linear {_REMOTE}"))
@click.argument("server")
@config_option
@click.option("--url", metavar="URL", help="Use the proxy there. Default: the one here, which is started if need be.")
@click.option(
    "--api-key", metavar="SOURCE", help="Where the caller's key is: env:NAME or file:PATH. Default: no key is sent."
)
@log_options
def stdio(server: str, config_file: str | None, url: str | None, api_key: str | None) -> None:
    """Carry MCP between standard input and output and SERVER (a configured name, or a URL).

    For clients that start programs. SERVER@ACCOUNT is one of several accounts.
    """
    from mcp_auth_proxy.cli.stdio_bridge.log_output import log_without_waiting

    log_without_waiting()
    from mcp_auth_proxy.cli import stdio as command

    _check_form(server)
    if url is not None:
        if config_file is not None:
            raise click.UsageError("Give --url or --config, not both.")
        if "://" in server:
            raise click.UsageError("SERVER must be the name of a server of the proxy at --url.")
        run(command.over_remote_proxy(url, server, key_source=api_key))
    is_url = "://" in server
    settings = settings_from(config_file, server if is_url else None, secrets_of=())
    file = None if is_url else config_path(config_file)
    options = passed_log_options()
    run(command.over_local_proxy(settings, server, options=options, file=file, key_source=api_key))


@cli.command(epilog=examples("check --config mcp-auth-proxy.yaml"))
@config_option
def check(config_file: str | None) -> None:
    """Validate the configuration and print all errors at once."""
    from mcp_auth_proxy.config import load as config
    from mcp_auth_proxy.config.document import located
    from mcp_auth_proxy.config.inbound import warnings
    from mcp_auth_proxy.config.oauth import first_contact_warning
    from mcp_auth_proxy.store.cipher import key_errors, key_warnings

    path, is_chosen = config_place(config_file)
    settings = config.load(path, environ=os.environ, allow_anonymous=False, programs=is_chosen)
    errors = key_errors(settings.store)
    if errors:
        raise ConfigurationError(located(errors, path), str(path))
    found = [first_contact_warning(settings.servers), *warnings(settings.inbound), *key_warnings(settings.store)]
    for warning in filter(None, [*found, *config.limit_warnings(settings.limits)]):
        complain(f"warning: {warning}")
    say(f"{path}: valid, {len(settings.servers)} server{'s'[: len(settings.servers) != 1]}")


@cli.command(epilog=examples("healthcheck", "healthcheck --config mcp-auth-proxy.yaml"))
@config_option
def healthcheck(config_file: str | None) -> None:
    """Ask the proxy that runs with this configuration whether it is ready.

    The exit code is 0 if it is, else 1, with one line that says why.
    """
    from mcp_auth_proxy.cli.healthcheck import problem_at
    from mcp_auth_proxy.config.listeners import probed

    try:
        problem = problem_at(probed(config_path(config_file)))
    except ConfigurationError as error:
        # Docker reserves every other code than 0 and 1.
        problem = f"{error.source}: {error.errors[0]}" if error.source else str(error.errors[0])
    if problem is not None:
        complain(f"error: {problem}")
        sys.exit(1)
    say("ready")


@cli.command(epilog=examples("demo"))
@log_options
def demo() -> None:
    """Run the whole flow against demo servers on this machine."""
    from mcp_auth_proxy.cli.demo import demo as run_demo

    run(run_demo())


@cli.command(
    epilog=examples(
        "login linear",
        f"login {EXAMPLE}",
        "login linear --paste",
        "login linear@work --as anna --wait 10m",
        f"login linear {_REMOTE}",
    )
)
@click.argument("server", shell_complete=server_names)
@config_option
@click.option(
    "--paste",
    is_flag=True,
    help="Without a browser here and without a running proxy: paste the address that a browser elsewhere ends at. "
    "Default: off.",
)
@click.option("--no-wait", is_flag=True, help="Print the link, and do not wait until it was used. Default: wait.")
@click.option(
    "--wait",
    metavar="TIME",
    callback=duration_option,
    help="How long to wait for consent, as 10m or 90s. Default: until the link expires.",
)
@account_options
@log_options
def login(
    server: str,
    config_file: str | None,
    paste: bool,
    no_wait: bool,
    wait: float | None,
    owner: str | None,
    remote: tuple[str, str] | None,
) -> None:
    """Authorize SERVER (a configured name, or a URL) from this terminal. SERVER@ACCOUNT is one of several accounts."""
    _check_form(server)
    if no_wait and (paste or wait is not None):
        raise click.UsageError("--no-wait can't be used with --paste or --wait, which wait.")
    from mcp_auth_proxy.cli.invitation import LoginOptions

    options = LoginOptions(paste=paste, no_wait=no_wait, wait=wait)
    if remote is not None:
        from mcp_auth_proxy.cli import remote as elsewhere

        run(elsewhere.login(_proxy_at(server, remote), server, owner=owner, options=options))
    from mcp_auth_proxy.cli.login import login as log_in

    run(log_in(_settings_for(server, config_file), server, owner=owner, options=options))


@cli.command(epilog=examples("logout linear", "logout linear@work --as anna", f"logout linear {_REMOTE}"))
@click.argument("server", shell_complete=server_names)
@config_option
@click.option("--forget-client", is_flag=True, help="Also forget the dynamically registered client. Default: keep it.")
@account_options
@log_options
def logout(
    server: str, config_file: str | None, forget_client: bool, owner: str | None, remote: tuple[str, str] | None
) -> None:
    """Forget the grant of SERVER, or of SERVER@ACCOUNT, and revoke it upstream if the server supports that."""
    _check_form(server)
    if remote is not None:
        from mcp_auth_proxy.cli import remote as elsewhere

        if forget_client:
            raise click.UsageError("--forget-client can't be used with --url.")
        run(elsewhere.logout(_proxy_at(server, remote), server, owner=owner))
    from mcp_auth_proxy.cli import account

    run(account.logout(_settings_for(server, config_file), server, owner=owner, forget_client=forget_client))


@cli.command(epilog=examples("status", "status linear --json", "status linear@work --as anna", f"status {_REMOTE}"))
@click.argument("server", required=False, shell_complete=server_names)
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON. Default: text.")
@account_options
@log_options
def status(
    server: str | None, config_file: str | None, as_json: bool, owner: str | None, remote: tuple[str, str] | None
) -> None:
    """Show what is connected, since when and until when: all servers, or SERVER (a configured name, or a URL).

    SERVER@ACCOUNT is one of several accounts.
    """
    from mcp_auth_proxy.cli import status as command

    if server is not None:
        _check_form(server)
    if remote is not None:
        from mcp_auth_proxy.cli import remote as elsewhere

        run(elsewhere.status(_proxy_at(server, remote), server, owner=owner, as_json=as_json))
    url = server is not None and "://" in server
    if not url and location.find(config_file, os.environ) is None:
        from mcp_auth_proxy.config.load import single_store
        from mcp_auth_proxy.store import store_exists

        store = single_store(environ=os.environ)
        if store_exists(store):
            if owner is not None:
                raise click.UsageError("The callers of `serve URL` are not identified: leave --as out.")
            run(command.status_without_configuration(store, server, as_json=as_json))
    run(command.status(_settings_for(server, config_file, secrets=False), server, owner=owner, as_json=as_json))


@cli.command(epilog=examples("dashboard", "dashboard --as anna"))
@config_option
@click.option("--as", "name", metavar="NAME", help="The principal whose session it is. Default: that of mode none.")
@log_options
def dashboard(config_file: str | None, name: str | None) -> None:
    """Print a link that opens a session in a browser, once, with the running proxy; open it if there is a desktop."""
    from mcp_auth_proxy.cli import dashboard as command

    if location.find(config_file, os.environ) is None:
        from mcp_auth_proxy.config.load import single_store

        run(command.dashboard(single_store(environ=os.environ), None, name=name))
    settings = settings_from(config_file, secrets_of=())
    run(command.dashboard(settings.store, settings, name=name))


@cli.command(epilog=examples(f"doctor {EXAMPLE}", "doctor linear --json"))
@click.argument("server", shell_complete=server_names)
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON. Default: text.")
@log_options
def doctor(server: str, config_file: str | None, as_json: bool) -> None:
    """Run discovery against SERVER (a URL, or a configured name) and show the configuration that works.

    Registers and stores nothing. The exit code is 0 if the proxy can authorize or does not need to, else 1.
    """
    from mcp_auth_proxy.cli import account
    from mcp_auth_proxy.cli.doctor import command

    settings = _settings_for(server, config_file)
    run(command.doctor(settings, account.server_of(settings, server), as_machine=as_json))


@cli.group(epilog=examples("service install", "service status"))
def service() -> None:
    """Run the proxy as a service of this user or, as root, of the system."""


@service.command(epilog=examples("service install --config mcp-auth-proxy.yaml"))
@config_option
@click.option(
    "--print", "print_only", is_flag=True, help="Print the file of the service, and do nothing. Default: off."
)
def install(config_file: str | None, print_only: bool) -> None:
    """Write the file of the service, and start it now and at each login."""
    from mcp_auth_proxy.cli import service

    path, is_chosen = config_place(config_file)
    sys.exit(service.install(path, print_only=print_only, programs=is_chosen))


@service.command(epilog=examples("service uninstall"))
@click.option("--print", "print_only", is_flag=True, help="Only print the commands. Default: off.")
def uninstall(print_only: bool) -> None:
    """Stop the service and delete its file. Configuration and store stay."""
    from mcp_auth_proxy.cli import service

    sys.exit(service.uninstall(print_only=print_only))


@service.command("status", epilog=examples("service status"))
def service_status() -> None:
    """Print whether the service is installed and running. The exit code is 0 if it is running, else 1."""
    from mcp_auth_proxy.cli import service

    sys.exit(service.status())


cli.add_command(api_keys)
cli.add_command(principals)
cli.add_command(grants)
cli.add_command(keys)
cli.add_command(install_entries)
cli.add_command(export_command)
cli.add_command(import_command)
cli.add_command(completion)


def _check_form(server: str) -> None:
    if "://" not in server and set(server) & set("./:"):
        # No name has such characters. The text may be a URL with a secret in it.
        raise click.UsageError("SERVER is neither a configured name nor a URL; is https:// missing at its beginning?")


def _settings_for(server: str | None, config_file: str | None, *, secrets: bool = True) -> "Settings":
    if server is not None:
        _check_form(server)
    # Secrets of other servers may exist only in the environment of the service, and are not needed here.
    secrets_of = (server.partition("@")[0],) if secrets and server is not None else ()
    return settings_from(config_file, server if server and "://" in server else None, secrets_of=secrets_of)


def _proxy_at(server: str | None, remote: tuple[str, str]) -> "RemoteProxy":
    """Return the proxy of --url. Raises ConfigurationError."""
    from mcp_auth_proxy.cli.remote_proxy import RemoteProxy

    if server is not None and "://" in server:
        raise click.UsageError("SERVER must be the name of a server of the proxy at --url.")
    return RemoteProxy(*remote)


def _explain_usage(error: click.ClickException) -> None:
    """Print how the command is used, and last the error."""
    if isinstance(error, NoArgsIsHelpError):
        complain(*error.format_message().split("\n"), "", "error: A command is missing.")
        return
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        complain(*context.get_usage().split("\n"), f"Try '{context.command_path} --help' for help.", "")
    # A list of choices has line breaks.
    complain(f"error: {' '.join(error.format_message().split())}")


def main() -> None:
    """Run the command line. Each error is one line on stderr, and the last one there.

    The exit code is 2 for errors of the configuration and of the store's key, else 1.
    """
    protect_process()
    try:
        cli(standalone_mode=False, complete_var=VARIABLE)
    except ConfigurationError as error:
        for line in error.lines():
            complain(f"error: {line}")
        sys.exit(2)
    except McpAuthProxyError as error:
        complain(f"error: {error}")
        # Another start would not help, as with the configuration: service managers are told not to try.
        sys.exit(2 if isinstance(error, KeyRejected) else 1)
    except click.ClickException as error:
        _explain_usage(error)
        sys.exit(2 if isinstance(error, click.UsageError) else 1)
    except OSError as error:
        # Expected failures of files and sockets are McpAuthProxyErrors; this is a full disk under stdout, for example.
        complain(f"error: {error}")
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
