"""What the handlers of the API work with."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from mcp_auth_proxy.broker import Broker
from mcp_auth_proxy.broker.made_servers import MadeServers
from mcp_auth_proxy.config.settings import ServerSettings, Settings
from mcp_auth_proxy.identity import Directory, Fields
from mcp_auth_proxy.models import Account, Caller, Principal, Tool
from mcp_auth_proxy.servers import ServerRegistry
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.web.failed_credentials import FailedCredentials


class ApiAuthenticator(Protocol):
    """What tells who uses the API: ``identity.Callers``."""

    async def identify_api(self, fields: Fields, peer: str) -> Caller | None:
        """Return the caller; None without a credential. Raises CallerRefused, and StoreError."""


async def no_session(request: Request) -> Caller | None:
    """Return the caller of a session: none, if there are no sessions."""
    return None


@dataclass(slots=True, kw_only=True)
class ApiContext:
    """The parts of the running proxy that the API uses."""

    broker: Broker
    servers: ServerRegistry
    made: MadeServers
    probe: Callable[[ServerSettings], Awaitable[tuple[int, list[bytes]]]]
    """Sends an ``initialize`` without a token; returns the status and the WWW-Authenticate fields of the answer.

    Raises UpstreamError.
    """
    list_tools: Callable[[ServerSettings, Account], Awaitable[list[Tool]]]
    """Returns the tools of a server. Raises NotConnected, AuthorizationError, UpstreamError and StoreError."""
    database: Engine
    settings: Callable[[], Settings]
    """Returns the settings as they are now: a reload changes them."""
    public_url: str
    clock: Callable[[], float]
    authenticator: ApiAuthenticator
    directory: Directory
    failed_credentials: FailedCredentials
    session_caller: Callable[[Request], Awaitable[Caller | None]] = no_session
    """Returns the caller of the session that a request belongs to, None if it has none."""

    def find_principal(self, wanted: str, project_id: str) -> Principal | None:
        """Return the principal of a project that has this id or name."""
        found = self.directory.principal(wanted)
        if found is None:
            found = next((each for each in self.directory.principals() if each.name == wanted), None)
        return found if found is not None and found.project_id == project_id else None
