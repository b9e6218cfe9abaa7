"""Which account a command is about: ``SERVER@ACCOUNT``, and whose it is (``--as NAME``)."""

import shlex
from collections.abc import Iterable

from mcp_auth_proxy.config.settings import ServerSettings, Settings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, LOCAL, LOCAL_PRINCIPAL, Account, Principal, shared_principal
from mcp_auth_proxy.web.paths import split_name


def split(text: str) -> tuple[str, str | None]:
    """Return the server and the account that ``SERVER``, ``SERVER@ACCOUNT`` or a URL names. Raises ConfigurationError.

    The account is None if none is named; a URL names none.
    """
    if "://" in text or "@" not in text:
        return text, None
    server, account = split_name(text)
    if not server:
        raise _refused(f"{text!r} is not SERVER@ACCOUNT: an account has up to 32 characters, of a-z, 0-9 and '-'.")
    return server, account


def require_owner(settings: Settings, server: ServerSettings | None, name: str | None) -> None:
    """Check that ``--as NAME`` is given if the account is somebody's, and only then. Raises ConfigurationError.

    ``server`` is None if the command is about all accounts: then it may be left out.
    """
    if not settings.inbound.modes:
        if name is not None:
            raise _refused("The callers of this proxy are not identified (inbound.mode): leave --as out.")
    elif name is None and server is not None and server.grant_owner != "shared":
        raise _refused("The callers of this proxy are identified (inbound.mode). Say whose account it is: --as NAME.")


def find_principal(principals: Iterable[Principal], name: str) -> Principal:
    """Return the principal with a name; ``local`` is the one of mode ``none``. Raises McpAuthProxyError."""
    if name == LOCAL:
        return LOCAL_PRINCIPAL
    found = next((principal for principal in principals if principal.name == name), None)
    if found is None:
        raise McpAuthProxyError(
            f"There is no principal {name!r}. `mcp-auth-proxy principals list` shows those that there are, and "
            f"`mcp-auth-proxy api-keys create {shlex.quote(name)}` makes this one."
        )
    return found


def account_of(server: ServerSettings, principal: Principal | None, name: str | None) -> Account:
    """Return the account that a command is about.

    ``principal`` is None if the grants of the server are shared, ``name`` if the account is the default one.
    """
    name = name or DEFAULT_ACCOUNT
    if principal is None:
        return Account(shared_principal(server.project), server.name, name)
    return server.account(principal, name)


def require_admitted(server: ServerSettings, principal: Principal) -> None:
    """Check that a principal could use what it authorizes. Raises McpAuthProxyError."""
    if principal.id == LOCAL:
        raise McpAuthProxyError("Nobody calls as 'local' here (inbound.mode). Name the principal that authorizes.")
    if not principal.is_active:
        again = f"mcp-auth-proxy principals enable {shlex.quote(principal.name)}"
        raise McpAuthProxyError(f"{principal.name} is disabled: `{again}` comes first.")
    if not server.admits(principal):
        raise McpAuthProxyError(
            f"{principal.name} may not use {server.name}: see {server.key('allow')} and {server.key('project')}."
        )


def in_command(server: ServerSettings, account: str, name: str | None) -> str:
    """Return what to write after ``mcp-auth-proxy login`` for an account: ``linear@work --as anna``.

    ``name``: that of its principal; None if it need not be said.
    """
    plain = account == DEFAULT_ACCOUNT or server.from_url
    place = server.command_name if plain else f"{server.command_name}@{account}"
    return place if name is None else f"{place} --as {shlex.quote(name)}"


def _refused(problem: str) -> ConfigurationError:
    return ConfigurationError([ConfigError("", problem)])
