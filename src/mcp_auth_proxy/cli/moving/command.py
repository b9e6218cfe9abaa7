"""The options of ``export`` and ``import``."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mcp_auth_proxy.cli.completion import server_names
from mcp_auth_proxy.cli.options import (
    config_option,
    config_path,
    config_place,
    examples,
    log_options,
    name_file,
    run,
    settings_from,
)
from mcp_auth_proxy.config import location

if TYPE_CHECKING:
    from mcp_auth_proxy.config.settings import Settings, StoreSettings

KUBERNETES = "kubernetes-secret"

_PASSPHRASE = "Where the passphrase is: env:NAME or file:PATH, at least 12 characters. Default: none."


@click.command(
    "export",
    epilog=examples(
        "export logins.export --passphrase env:PASSPHRASE",
        "export linear notes@work logins.export --passphrase file:passphrase --move",
        f"export linear --format {KUBERNETES} --passphrase file:passphrase > secret.yaml",
    ),
)
@click.argument("places", nargs=-1, metavar="[SERVER]... [FILE]", shell_complete=server_names)
@click.option("--passphrase", metavar="SOURCE", required=True, help=_PASSPHRASE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["file", KUBERNETES]),
    default="file",
    help=f"What is written: a sealed file, or a Secret with it ({KUBERNETES}), without FILE on stdout. Default: file.",
)
@click.option(
    "--move/--keep",
    "move",
    default=None,
    help=f"End the exported logins here, or not. Default: --keep; with --format {KUBERNETES}, --move.",
)
@click.option("--name", metavar="NAME", help="The name of the Secret. Default: mcp-auth-proxy-logins.")
@click.option("--force", is_flag=True, help="Replace a FILE that exists. Default: refuse.")
@click.option("--json", "as_json", is_flag=True, help="Print what was exported as JSON. Default: text.")
@config_option
@log_options
def export_command(
    places: tuple[str, ...],
    passphrase: str,
    form: str,
    move: bool | None,
    name: str | None,
    force: bool,
    as_json: bool,
    config_file: str | None,
) -> None:
    """Write logins and what they need to FILE, sealed with a passphrase: those of each SERVER. Default: everything.

    SERVER@ACCOUNT is one of several accounts. A copy and its original can't both be used for long: servers replace
    refresh tokens, and end a login if an old one comes again.
    """
    from mcp_auth_proxy.cli.moving import exporting, passphrases

    as_secret = form == KUBERNETES
    store, settings = _store(config_file)
    servers, file = _split(places, as_secret=as_secret, known=settings.servers if settings is not None else ())
    if name is not None and not as_secret:
        raise click.UsageError(f"--name is for --format {KUBERNETES}.")
    if as_json and file is None:
        raise click.UsageError("--json needs a FILE, since the Secret goes to stdout.")
    job = exporting.ExportJob(
        store=store,
        known=None if settings is None else frozenset(settings.servers),
        servers=servers,
        file=file,
        passphrase=passphrases.read(passphrase),
        move=as_secret if move is None else move,
        secret_name=(name or "mcp-auth-proxy-logins") if as_secret else None,
        force=force,
        as_json=as_json,
        passphrase_source=passphrase,
    )
    run(exporting.export(job))


@click.command(
    "import",
    epilog=examples(
        "import logins.export --passphrase env:PASSPHRASE",
        "import --from mcp-remote",
        "import --from mcp-use ~/.mcp_use/tokens --as anna",
    ),
)
@click.argument("source", required=False, metavar="[FILE|DIR]", type=click.Path(path_type=Path))
@click.option("--passphrase", metavar="SOURCE", help=_PASSPHRASE)
@click.option(
    "--from",
    "program",
    type=click.Choice(["mcp-remote", "mcp-use"]),
    help="Take over the logins of another program, from DIR or where it keeps them. Default: a FILE of `export`.",
)
@click.option(
    "--headers",
    metavar="SOURCE",
    help="The --header options that mcp-remote ran with, as a JSON object in env:NAME or file:PATH. Default: none.",
)
@click.option("--as", "owner", metavar="NAME", help="With --from: whose logins they become. Default: shared.")
@click.option("--json", "as_json", is_flag=True, help="Print what was imported as JSON. Default: text.")
@config_option
@log_options
def import_command(
    source: Path | None,
    passphrase: str | None,
    program: 'Literal["mcp-remote", "mcp-use"] | None',
    headers: str | None,
    owner: str | None,
    as_json: bool,
    config_file: str | None,
) -> None:
    """Take in the logins in FILE, which `export` wrote, or those of another program.

    Of two logins for one account the newer one stays. The files stay as they are. The exit code is 1 if something could
    not be taken in.
    """
    if program is None:
        if owner is not None or headers is not None:
            raise click.UsageError("--as and --headers are for --from PROGRAM.")
        _import_file(source, passphrase, config_file, as_json=as_json)
    elif passphrase is not None:
        raise click.UsageError("--passphrase is for a FILE of `export`: those of other programs are not sealed.")
    elif headers is not None and program != "mcp-remote":
        raise click.UsageError("--headers is for --from mcp-remote.")
    else:
        _take_over(program, source, owner, headers, config_file, as_json=as_json)


def _import_file(source: Path | None, passphrase: str | None, config_file: str | None, *, as_json: bool) -> None:
    if source is None:
        raise click.UsageError("Give a FILE, or --from PROGRAM.")
    if passphrase is None:
        raise click.UsageError("--passphrase env:NAME or file:PATH is needed: a FILE of `export` is sealed.")
    from mcp_auth_proxy.cli.moving import importing, passphrases

    store, settings = _store(config_file)
    run(importing.import_file(store, settings, source, passphrases.read(passphrase), as_json=as_json))


def _take_over(
    program: 'Literal["mcp-remote", "mcp-use"]',
    folder: Path | None,
    owner: str | None,
    headers: str | None,
    config_file: str | None,
    *,
    as_json: bool,
) -> None:
    from mcp_auth_proxy.cli.moving import passphrases, taking_over

    given = None if headers is None else passphrases.read_object(headers)
    job = taking_over.Job(program=program, folder=folder, owner=owner, headers=given, as_json=as_json)
    path, is_chosen = config_place(config_file)

    def load(secrets_of: Collection[str]) -> "Settings":
        from mcp_auth_proxy.config import load as config

        return config.load(path, environ=os.environ, secrets_of=secrets_of, programs=is_chosen)

    name_file(path)
    run(taking_over.take_over(load, job))


def _split(
    places: tuple[str, ...], *, as_secret: bool, known: "Collection[str]" = ()
) -> tuple[tuple[str, ...], Path | None]:
    """Return the servers and the file that are named. Raises UsageError."""
    if not as_secret:
        if not places:
            raise click.UsageError("A FILE is missing.")
        *servers, file = places
        if file.partition("@")[0] in known:
            raise click.UsageError(f"{file} is a server. Give a FILE after it; for a file of that name, ./{file}.")
        return tuple(servers), Path(file)
    servers, last = list(places), None
    # No name of a server has such a character.
    if servers and set(servers[-1]) & set("./"):
        last = Path(servers.pop())
    if not servers:
        raise click.UsageError(f"Name each SERVER: with --format {KUBERNETES} its login ends here, unless --keep.")
    return tuple(servers), last


def _store(config_file: str | None) -> "tuple[StoreSettings, Settings | None]":
    """Return the store of the configuration, or else that of ``serve URL``. Raises ConfigurationError."""
    if location.find(config_file, os.environ) is None:
        from mcp_auth_proxy.config.load import single_store
        from mcp_auth_proxy.store import store_exists

        store = single_store(environ=os.environ)
        if store_exists(store):
            return store, None
        config_path(config_file)
    settings = settings_from(config_file, secrets_of=())
    return settings.store, settings
