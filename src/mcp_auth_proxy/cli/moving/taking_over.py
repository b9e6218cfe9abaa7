"""``import --from``: make grants of the logins that another program has."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcp_auth_proxy.app import Application, lifespan
from mcp_auth_proxy.broker.adoption import ForeignLogin
from mcp_auth_proxy.broker.matching import matches
from mcp_auth_proxy.cli.account import owner_of
from mcp_auth_proxy.cli.moving import mcp_remote, mcp_use
from mcp_auth_proxy.cli.moving.found_logins import FoundLogin
from mcp_auth_proxy.cli.moving.importing import record, report
from mcp_auth_proxy.cli.moving.rows import owner_names
from mcp_auth_proxy.cli.owners import account_of, require_admitted, require_owner
from mcp_auth_proxy.cli.terminal import complain
from mcp_auth_proxy.config.settings import ServerSettings, Settings
from mcp_auth_proxy.errors import AuthorizationError, McpAuthProxyError, UpstreamError
from mcp_auth_proxy.models import Grant, GrantType, Principal
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.proxy.probe import probe
from mcp_auth_proxy.proxy.routes import route_to
from mcp_auth_proxy.store import open_store, provisional_store
from mcp_auth_proxy.store.exports import Export
from mcp_auth_proxy.store.imports import ImportResult, Outcome, take_in
from mcp_auth_proxy.store.principals import Principals


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which program's logins to take over. ``folder``: None for where it keeps them; ``headers``: of mcp-remote."""

    program: Literal["mcp-remote", "mcp-use"]
    folder: Path | None
    owner: str | None
    headers: Mapping[str, str] | None = field(repr=False)
    as_json: bool


async def take_over(load: Callable[[Collection[str]], Settings], job: Job) -> int:
    """Take over the logins for the configured servers, and print what became of each. Raises McpAuthProxyError.

    ``load`` returns the settings with the secrets of the servers that are named: others may be missing here.

    The authorization servers are found as for an authorization; nothing is registered, and no token is sent.
    """
    folder = _folder(job)
    servers = [*load(()).servers.values()]
    found = [(server, login) for server in servers if (login := _find(job, folder, server)) is not None]
    _warn_of_unmatched(job, folder, servers)
    if not found:
        raise McpAuthProxyError(
            f"{folder} has no login of {job.program} for a configured server. They are found by the URL: it must be "
            f"written under servers as {job.program} was given it."
        )
    failed: list[str] = []
    wanted = list(_once_each(found, failed))
    settings = load([server.name for server, _ in wanted])
    for server, _ in wanted:
        require_owner(settings, server, job.owner)
    with provisional_store(settings.store):
        async with lifespan(settings, settings.listen, background=False, announce_key=complain) as application:
            principal = await owner_of(application, job.owner)
            grants = [
                grant
                for server, login in wanted
                if (grant := await _grant(application, settings.servers[server.name], principal, login, failed))
                is not None
            ]
        complain(*failed)
        if not grants:
            raise _not_imported(failed, found)
        result, names = await _store(settings, grants)
    if any(each.outcome is Outcome.IMPORTED for each in result.grants):
        complain(
            f"The files of {job.program} stay, but their refresh tokens are the proxy's from now on: {job.program} "
            f"must not use them any more, or both lose the login. Take it out of your MCP clients."
        )
    code = report(result, names, as_json=job.as_json, warnings=[])
    if failed:
        raise _not_imported(failed, found)
    return code


def _not_imported(failed: Sequence[object], found: Sequence[object]) -> McpAuthProxyError:
    return McpAuthProxyError(f"{len(failed)} of {len(found)} logins could not be imported: see above.")


def _once_each(
    found: Sequence[tuple[ServerSettings, FoundLogin]], failed: list[str]
) -> Iterator[tuple[ServerSettings, FoundLogin]]:
    """Leave out servers whose login another one gets: of two that renew one login, the server may end both."""
    owners: dict[Path, str] = {}
    for server, login in found:
        owner = owners.setdefault(login.path, server.name)
        if owner == server.name:
            yield server, login
        else:
            failed.append(f"{server.name}: not imported: {owner} has taken the same login. Authorize this one instead.")


def _folder(job: Job) -> Path:
    default = mcp_remote.default_folder if job.program == "mcp-remote" else mcp_use.default_folder
    folder = (job.folder or default()).expanduser()
    if not folder.is_dir():
        raise McpAuthProxyError(f"There is no folder {folder}. Name the one in which {job.program} keeps its logins.")
    return folder


def _find(job: Job, folder: Path, server: ServerSettings) -> FoundLogin | None:
    if job.program == "mcp-remote":
        return mcp_remote.find(folder, server, job.headers)
    return mcp_use.find(folder, server)


def _warn_of_unmatched(job: Job, folder: Path, servers: Sequence[ServerSettings]) -> None:
    count = mcp_remote.unmatched(folder, servers, job.headers) if job.program == "mcp-remote" else 0
    if count:
        complain(
            f"warning: {count} login{'s'[: count != 1]} of mcp-remote in {folder} belong{'s'[: count == 1]} to no "
            f"configured server: only the hash of its URL is known, with --resource and --header if it was given them. "
            f"For the first, set oauth.resource; for the second, use --headers."
        )


async def _grant(
    application: Application, server: ServerSettings, principal: Principal | None, login: FoundLogin, failed: list[str]
) -> Grant | None:
    """Return the grant that a login is; None, with the reason in ``failed``, if it can't be used."""
    try:
        if principal is not None and application.settings.inbound.modes:
            require_admitted(server, principal)
        if server.oauth.grant is not GrantType.AUTHORIZATION_CODE:
            raise McpAuthProxyError(f"{server.key('oauth.grant')} is {server.oauth.grant}: it needs no such login.")
        if login.client is None and server.oauth.client_id is None and login.tokens.refresh_token is not None:
            raise McpAuthProxyError(
                f"There is no client beside {login.path.name}: it was given to the other program. Put it in "
                f"{server.key('oauth.client_id')} (and client_secret) first."
            )
        status, fields = await probe(application.forwarder.upstream, route_to(server))
        challenge = challenges.bearer(fields) if challenges.demands_authorization(status, None) else None
        account = account_of(server, principal, None)
        foreign = ForeignLogin(login.tokens, login.client, login.granted_at, login.issuer)
        grant = await application.broker.grant_for(account, foreign, challenge)
        if not matches(grant, server):
            raise McpAuthProxyError("Its tokens are not what the configuration asks for (resource, dpop).")
    except (AuthorizationError, UpstreamError, McpAuthProxyError) as error:
        failed.append(f"{server.name}: not imported: {error}")
        return None
    if not login.issuer:
        complain(f"{server.name}: the files do not name its authorization server; {grant.key.issuer} is the one now.")
    return grant


async def _store(settings: Settings, grants: list[Grant]) -> tuple[ImportResult, Mapping[str, str]]:
    engine = await open_store(settings.store, announce=complain)
    try:
        now = engine.now()
        result = await take_in(engine, Export(made_at=now, grants=tuple(grants)), now=now)
        assert result is not None, "only a file that is remembered is left out"
        await record(engine, result)
        return result, owner_names(await Principals(engine).all())
    finally:
        await engine.close()
