"""``import FILE``: take in what ``export`` wrote."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

from mcp_auth_proxy.broker.matching import matches
from mcp_auth_proxy.cli import audit
from mcp_auth_proxy.cli.moving.rows import grant_row, grant_text, owner_names
from mcp_auth_proxy.cli.terminal import complain, say, say_json
from mcp_auth_proxy.config.settings import Secret, ServerSettings, Settings, StoreSettings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.store import Engine, exports, open_store
from mcp_auth_proxy.store.imports import ImportedGrant, ImportResult, Outcome, take_in
from mcp_auth_proxy.store.principals import Principals
from mcp_auth_proxy.store.sealed_file import open_sealed, read_file
from mcp_auth_proxy.store.servers import Servers


async def import_file(
    store: StoreSettings, settings: Settings | None, file: Path, passphrase: Secret, *, as_json: bool
) -> int:
    """Take in an export, and print what has become of each login. Return the exit code; raise McpAuthProxyError.

    The whole file is opened and checked before the store is.
    """
    sealed = await asyncio.to_thread(read_file, file)
    content = await asyncio.to_thread(open_sealed, sealed, passphrase.value, name=str(file))
    export = exports.decode(content, name=str(file))
    engine = await open_store(store, announce=complain)
    try:
        result = await take_in(engine, export, now=engine.now())
        assert result is not None, "only a file that is remembered is left out"
        await record(engine, result)
        names = owner_names(await Principals(engine).all())
        made = {server.name for server in await Servers(engine).all()}
    finally:
        await engine.close()
    configured = {} if settings is None else settings.servers
    warnings = [] if settings is None else [_misfit(each, configured, made) for each in result.grants]
    return report(result, names, as_json=as_json, warnings=[line for line in warnings if line])


async def record(engine: Engine, result: ImportResult) -> None:
    """Leave an event for each grant that was imported. Raises StoreError."""
    for each in result.grants:
        if each.outcome is Outcome.IMPORTED:
            account = each.account
            place = (account.server, account.server)
            await audit.record(engine, "grants.import", target=f"{account.principal}/{account.name}", server=place)


def report(result: ImportResult, names: Mapping[str, str], *, as_json: bool, warnings: list[str]) -> int:
    """Print what has become of each grant, and return 0. Raises McpAuthProxyError if some were left out."""
    if as_json:
        rows = [
            {**grant_row(each.grant, names), "outcome": str(each.outcome), "reason": each.reason}
            for each in result.grants
        ]
        say_json({"grants": rows, "notes": result.notes})
    else:
        say(*(_line(each, names) for each in result.grants), *result.notes)
        if not result.grants:
            say("There are no logins in it.")
    complain(*(f"warning: {line}" for line in warnings))
    left_out = sum(each.outcome is Outcome.LEFT_OUT for each in result.grants)
    if left_out:
        raise McpAuthProxyError(f"{left_out} of {len(result.grants)} logins could not be imported: see above.")
    return 0


def _line(each: ImportedGrant, names: Mapping[str, str]) -> str:
    what = grant_text(each.grant, names)
    match each.outcome:
        case Outcome.IMPORTED:
            return f"{what}: imported{f' {each.reason}' if each.reason else ''}"
        case Outcome.KEPT:
            return f"{what}: not imported: {each.reason}, and stays"
        case Outcome.LEFT_OUT:
            return f"{what}: not imported: {each.reason}"


def _misfit(each: ImportedGrant, servers: Mapping[str, ServerSettings], made: set[str]) -> str | None:
    """Return why a grant that was imported is not used with the configuration as it is, or None."""
    name = each.account.server
    if each.outcome is not Outcome.IMPORTED or name in made:
        return None
    if name not in servers:
        return f"{name} is not configured here, so its login is kept and not used."
    if not matches(each.grant, servers[name]):
        return f"{name} has another url, issuer, resource or grant in the configuration here, so its login is not used."
    return None
