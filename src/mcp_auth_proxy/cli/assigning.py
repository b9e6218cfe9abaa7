"""What ``grants assign`` does in the store. A running proxy heeds it within a second."""

from collections.abc import Mapping, Sequence

from mcp_auth_proxy.broker.made_servers import MadeServers
from mcp_auth_proxy.cli import audit
from mcp_auth_proxy.cli.owners import find_principal
from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.config.settings import ServerSettings, Settings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError
from mcp_auth_proxy.models import LOCAL, Account, Principal, shared_principal
from mcp_auth_proxy.servers import ServerRegistry
from mcp_auth_proxy.store import Engine, open_store, store_exists
from mcp_auth_proxy.store.grant_summaries import GrantSummaries
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.principals import Principals

SHARED = "shared"


async def assign(settings: Settings, names: Sequence[str], *, giver: str, receiver: str) -> int:
    """Give the grants of ``giver`` at the servers with these names, or at all, to ``receiver``; print each.

    Return 0. Raises McpAuthProxyError, also if some could not be given.
    """
    if giver == receiver:
        raise ConfigurationError([ConfigError("", f"--from and --to are both {giver!r}.")])
    if receiver == LOCAL:
        raise ConfigurationError([ConfigError("--to", "must be a principal or 'shared': nobody else can use them")])
    if not store_exists(settings.store):
        raise McpAuthProxyError(f"There is no store at {settings.store.shown} yet, and so there are no grants.")
    engine = await open_store(settings.store, announce=complain)
    try:
        servers = await _servers(engine, settings)
        if unknown := sorted(set(names) - set(servers)):
            known = ", ".join(sorted(servers))
            raise ConfigurationError([ConfigError("", f"There is no server {unknown[0]!r}. There are: {known}.")])
        principals = await Principals(engine).all()
        source = find_principal(principals, giver)
        target = None if receiver == SHARED else find_principal(principals, receiver)
        accounts = await _accounts(engine, source, names)
        left = 0
        for account in accounts:
            problem = await _give(engine, account, servers.get(account.server), target)
            if problem:
                left += 1
                complain(f"{account.shown}: stays with {giver}: {problem}")
            else:
                say(f"{account.shown}: now {'shared' if target is None else f'of {receiver}'}")
    finally:
        await engine.close()
    if left:
        raise McpAuthProxyError(f"{left} of {len(accounts)} grants could not be given to {receiver}: see above.")
    if not accounts:
        say(f"{giver} has no grants{' there' if names else ''}")
    return 0


async def _servers(engine: Engine, settings: Settings) -> Mapping[str, ServerSettings]:
    """Return the servers of the configuration, and those that were made at run time."""
    servers = ServerRegistry(settings.servers)
    made = MadeServers(database=engine, servers=servers, allow_private=settings.admin.allow_private, clock=lambda: 0.0)
    await made.reload()
    return servers


async def _accounts(engine: Engine, principal: Principal, names: Sequence[str]) -> list[Account]:
    """Return the accounts of a principal with a grant that has not ended."""
    grants = await GrantSummaries(engine).of_principal(principal.id)
    found = {grant.key.account for grant in grants if grant.ended_at is None}
    return sorted(account for account in found if not names or account.server in names)


async def _give(engine: Engine, account: Account, server: ServerSettings | None, target: Principal | None) -> str:
    """Give the grant of an account to a principal; None stands for all callers. Return why that can't be, or ""."""
    if server is None:
        return "the server is no longer there"
    if target is None:
        if server.grant_owner != "shared":
            return f"its callers have grants of their own ({server.key('grant_owner')})"
        owner = shared_principal(server.project)
    elif server.grant_owner == "shared":
        return f"its callers share one grant ({server.key('grant_owner')}): use --to shared"
    elif not server.admits(target):
        return f"{target.name} may not use it ({server.key('allow')}, {server.key('project')})"
    else:
        owner = target.id
    if not await Grants(engine).assign(account, owner):
        has = "there is a shared one" if target is None else f"{target.name} has one"
        return f"{has} already"
    project = server.project if target is None else target.project_id
    place = (server.server_id, server.name)
    await audit.record(engine, "grants.assign", target=f"{owner}/{account.name}", project=project, server=place)
    return ""
