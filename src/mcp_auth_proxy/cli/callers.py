"""``api-keys`` and ``principals``. They use the store directly, whether or not a proxy is running."""

import re
from typing import TYPE_CHECKING

import click

from mcp_auth_proxy.cli.options import config_option, examples, run, settings_from

if TYPE_CHECKING:
    from mcp_auth_proxy.config.settings import Settings
    from mcp_auth_proxy.models import Identity, Scope

_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
_LONGEST = 10 * 365 * 86400.0
_SOURCE = re.compile(r"(jwt:[^=]+|header:[a-z0-9-]+)=(.+)", re.DOTALL)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON. Default: text.")

change_role_option = click.option(
    "--change-role",
    is_flag=True,
    help="Let --role change the role of a principal that its own first request has made. Default: refuse.",
)


def _name(context: click.Context, option: click.Parameter, value: str) -> str:
    from mcp_auth_proxy.identity.naming import check_name

    try:
        return check_name(value)
    except ValueError as problem:
        raise click.BadParameter(f"the name {problem}") from None


def _scopes(context: click.Context, option: click.Parameter, value: str | None) -> "frozenset[Scope] | None":
    from mcp_auth_proxy.models import Scope

    if value is None:
        return None
    try:
        return frozenset(Scope(name.strip()) for name in value.split(","))
    except ValueError:
        raise click.BadParameter(f"must be one or more of {', '.join(Scope)}, separated by commas") from None


def _lifetime(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,6})([mhdwy])", value, re.ASCII)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < seconds <= _LONGEST:
        raise click.BadParameter("must be a duration such as 90d, 12h or 1y, at most 10y")
    return seconds


def _identities(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> "list[Identity]":
    from mcp_auth_proxy.models import Identity

    found = [_SOURCE.fullmatch(value) for value in values]
    if None in found:
        raise click.BadParameter("must be jwt:ISSUER=SUBJECT or header:NAME=SUBJECT, with the name in lower case")
    return [Identity(each[1], each[2]) for each in found if each is not None]


def _settings(config_file: str | None) -> "Settings":
    return settings_from(config_file, secrets_of=())


@click.group(name="api-keys", epilog=examples("api-keys create alice --role admin", "api-keys list"))
def api_keys() -> None:
    """Make, list and revoke the keys that callers identify themselves with."""


@api_keys.command(epilog=examples("api-keys create alice", "api-keys create ci --scopes mcp --expires 90d"))
@click.argument("name", callback=_name)
@config_option
@click.option(
    "--role", type=click.Choice(["admin", "member"]), help="Of the principal. Default: as it is, else member."
)
@change_role_option
@click.option("--project", metavar="P", help="Of a principal that is made now. Default: default.")
@click.option(
    "--scopes",
    callback=_scopes,
    metavar="LIST",
    help="Of mcp, self and admin, separated by commas. Default: mcp,self; for admins all.",
)
@click.option("--expires", callback=_lifetime, metavar="DURATION", help="Such as 90d. Default: never.")
def create(
    name: str,
    config_file: str | None,
    role: str | None,
    change_role: bool,
    project: str | None,
    scopes: "frozenset[Scope] | None",
    expires: float | None,
) -> None:
    """Make a key for the principal NAME, and print it: once, and nothing else on stdout. A new NAME is added."""
    from mcp_auth_proxy.cli import caller_store

    settings = _settings(config_file)
    run(
        caller_store.create_key(
            settings, name, role=role, change_role=change_role, project=project, scopes=scopes, lifetime=expires
        )
    )


@api_keys.command("list", epilog=examples("api-keys list", "api-keys list --json"))
@config_option
@json_option
def list_keys(config_file: str | None, as_json: bool) -> None:
    """List the keys, without their secrets."""
    from mcp_auth_proxy.cli import caller_store

    run(caller_store.list_keys(_settings(config_file), as_json=as_json))


@api_keys.command(epilog=examples("api-keys revoke 1f2e3d4c5b6a"))
@click.argument("key_id", metavar="ID")
@config_option
def revoke(key_id: str, config_file: str | None) -> None:
    """End the key with this ID (the second part of the key) for good."""
    from mcp_auth_proxy.cli import caller_store

    run(caller_store.revoke_key(_settings(config_file), key_id))


@click.group(epilog=examples("principals list", "principals disable alice"))
def principals() -> None:
    """List, add, disable and enable those who may call."""


@principals.command("list", epilog=examples("principals list", "principals list --json"))
@config_option
@json_option
def list_principals(config_file: str | None, as_json: bool) -> None:
    """List the principals, and how they identify themselves."""
    from mcp_auth_proxy.cli import caller_store

    run(caller_store.list_principals(_settings(config_file), as_json=as_json))


@principals.command(epilog=examples("principals add alice --identity jwt:https://idp.example.com=248289761001"))
@click.argument("name", callback=_name)
@config_option
@click.option(
    "--identity",
    "identities",
    multiple=True,
    callback=_identities,
    metavar="SOURCE=SUBJECT",
    help="jwt:ISSUER=SUBJECT or header:NAME=SUBJECT. May be repeated. Default: none.",
)
@click.option(
    "--role", type=click.Choice(["admin", "member"]), help="Of the principal. Default: as it is, else member."
)
@change_role_option
@click.option("--project", metavar="P", help="Of a principal that is made now. Default: default.")
def add(
    name: str,
    config_file: str | None,
    identities: "list[Identity]",
    role: str | None,
    change_role: bool,
    project: str | None,
) -> None:
    """Let somebody in before the first request; an existing principal gets further identities."""
    from mcp_auth_proxy.cli import caller_store

    settings = _settings(config_file)
    run(caller_store.add_principal(settings, name, identities, role=role, change_role=change_role, project=project))


@principals.command(epilog=examples("principals disable alice"))
@click.argument("name")
@config_option
def disable(name: str, config_file: str | None) -> None:
    """End all access of the principal NAME (or its id): keys, tokens, open streams. Its grants stay."""
    from mcp_auth_proxy.cli import caller_store

    run(caller_store.set_status(_settings(config_file), name, active=False))


@principals.command(epilog=examples("principals enable alice"))
@click.argument("name")
@config_option
def enable(name: str, config_file: str | None) -> None:
    """Let the principal NAME (or its id) call again."""
    from mcp_auth_proxy.cli import caller_store

    run(caller_store.set_status(_settings(config_file), name, active=True))
