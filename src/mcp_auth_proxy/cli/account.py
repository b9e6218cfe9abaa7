"""``logout``, and which account a command is about. They use the store directly, whether or not a proxy is running."""

from mcp_auth_proxy.app import Application, lifespan
from mcp_auth_proxy.broker import Disconnected, ForgottenGrant, Revocation
from mcp_auth_proxy.cli.owners import account_of, find_principal, require_owner, split
from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.config.settings import ServerSettings, Settings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError
from mcp_auth_proxy.models import LOCAL_PRINCIPAL, Principal


async def logout(settings: Settings, name: str, *, owner: str | None = None, forget_client: bool) -> int:
    """Delete the grants of an account and revoke them. Return the exit code; raise McpAuthProxyError.

    ``owner``: whose they are, if callers are identified. If a revocation fails, the grant is deleted all the same, and
    the error says so.
    """
    server_name, account_name = split(name)
    server = server_of(settings, server_name)
    require_owner(settings, server, owner)
    async with lifespan(settings, settings.listen, background=False, announce_key=complain) as application:
        account = account_of(server, await owner_of(application, owner), account_name)
        result = await application.broker.disconnect(account, forget_client=forget_client)
    done, failed = _logout_lines(result)
    for line in done:
        say(line)
    if failed:
        raise McpAuthProxyError(" ".join(failed))
    if not done:
        say(f"{account.shown}: nothing was connected.")
    return 0


def _logout_lines(result: Disconnected) -> tuple[list[str], list[str]]:
    """Return what was done and what failed, in lines for the terminal."""
    server = result.account.shown
    done = [_forgotten_line(server, grant) for grant in result.grants if grant.revocation is not Revocation.FAILED]
    if result.client_forgotten:
        done.append(f"{server}: the next authorization registers a new client")
    failed = [_forgotten_line(server, grant) for grant in result.grants if grant.revocation is Revocation.FAILED]
    return done, failed


def _forgotten_line(server: str, grant: ForgottenGrant) -> str:
    match grant.revocation:
        case Revocation.REVOKED:
            return f"{server}: forgotten here and revoked at {grant.issuer}"
        case Revocation.NOT_OFFERED:
            return f"{server}: forgotten here; {grant.issuer} does not support revocation"
        case Revocation.FAILED:
            return (
                f"{server}: forgotten here, but not revoked at {grant.issuer}: {grant.reason} "
                f"Its tokens stay valid until they expire; to end them now, withdraw the access at the provider, for "
                f"example on its account page."
            )


async def owner_of(application: Application, name: str | None) -> Principal | None:
    """Return the principal that a command is for; None if the grants of its server are shared.

    Raises McpAuthProxyError.
    """
    if not application.settings.inbound.modes:
        return LOCAL_PRINCIPAL
    if name is None:
        return None
    directory = application.callers.directory
    await directory.reload()
    return find_principal(directory.principals(), name)


def server_of(settings: Settings, name: str) -> ServerSettings:
    """Return the server with this name, or the only one if a URL was given."""
    if "://" in name:
        return next(iter(settings.servers.values()))
    try:
        return settings.servers[name]
    except KeyError:
        known = ", ".join(sorted(settings.servers))
        raise ConfigurationError([ConfigError("", f"There is no server {name!r}. Configured: {known}.")]) from None
