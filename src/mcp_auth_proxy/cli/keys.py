"""``keys``: list the keys of the store, and seal the store again under a new one. Both work while proxies serve."""

from typing import TYPE_CHECKING

import click

from mcp_auth_proxy.cli.options import config_option, examples, log_options, run, settings_from

if TYPE_CHECKING:
    from mcp_auth_proxy.config.settings import Settings

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON. Default: text.")


@click.group(epilog=examples("keys list", "keys rotate"))
def keys() -> None:
    """List the keys that the store is sealed with, and replace them.

    Put the new key first in store.keys, before the old one. Running proxies take it up; send SIGHUP to be sure. Run
    `keys rotate`, then remove the keys that `keys list` calls droppable.
    """


@keys.command("list", epilog=examples("keys list", "keys list --json"))
@config_option
@_json_option
@log_options
def list_keys(config_file: str | None, as_json: bool) -> None:
    """List the keys of the store, and how many rows need each. The store is only read."""
    from mcp_auth_proxy.cli import key_rotation

    run(key_rotation.list_keys(_settings(config_file), as_json=as_json))


@keys.command(epilog=examples("keys rotate", "keys rotate --json"))
@config_option
@_json_option
@log_options
def rotate(config_file: str | None, as_json: bool) -> None:
    """Seal the whole store again with the first of store.keys.

    Proxies may serve meanwhile. If it is interrupted, run it again: it goes on where it stopped. The exit code is 1 if
    a row can't be read, which then stays as it is, or if a proxy still seals with another key.
    """
    from mcp_auth_proxy.cli import key_rotation

    run(key_rotation.rotate(_settings(config_file), as_json=as_json))


def _settings(config_file: str | None) -> "Settings":
    # Secrets of servers are not needed.
    return settings_from(config_file, secrets_of=())
