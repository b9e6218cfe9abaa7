"""``grants``. It uses the store directly, whether or not a proxy is running."""

import click

from mcp_auth_proxy.cli.options import config_option, examples, run, settings_from


@click.group(
    epilog=examples("grants assign --from local --to anna", "grants assign --from local --to shared linear notes")
)
def grants() -> None:
    """Give grants to other principals."""


@grants.command(
    epilog=examples("grants assign --from local --to anna", "grants assign --from local --to shared linear notes")
)
@click.argument("servers", nargs=-1, metavar="[SERVER]...")
@click.option(
    "--from", "giver", required=True, metavar="NAME", help="Whose they are: local, or a principal. Default: none."
)
@click.option(
    "--to", "receiver", required=True, metavar="NAME", help="Whose they become: a principal, or shared. Default: none."
)
@config_option
def assign(servers: tuple[str, ...], giver: str, receiver: str, config_file: str | None) -> None:
    """Give the grants of one principal to another, or to all callers: those of each SERVER. Default: of all servers.

    The grants of mode none belong to local, whom nobody is any more once inbound.mode identifies callers. What can't be
    given is named, and stays; then the exit code is 1.
    """
    from mcp_auth_proxy.cli import assigning

    run(assigning.assign(settings_from(config_file, secrets_of=()), servers, giver=giver, receiver=receiver))
