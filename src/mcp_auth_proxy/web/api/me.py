"""``/me``: who the caller is, and how it is connected."""

from typing import Annotated

from msgspec import Meta

from mcp_auth_proxy.broker import AccountConnection
from mcp_auth_proxy.broker.states import Word
from mcp_auth_proxy.config.settings import GrantOwner, ServerSettings
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Scope
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.grants import GrantView, grant_view
from mcp_auth_proxy.web.api.models import View
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.principals import PrincipalView, principal_view


class ConnectionView(View):
    """An account of a server. ``grant`` is null if it was never connected, or disconnected."""

    account: str
    state: Word
    address: Annotated[str, Meta(description="The URL that MCP clients use for this account.")]
    grant: GrantView | None


class MyServer(View):
    """A server that the caller may use. ``state`` is that of its default account."""

    id: str
    name: str
    grant_owner: GrantOwner
    state: Word
    accounts: list[ConnectionView]


class Me(View):
    """Who calls. ``mode`` is that of the configuration: none, one mode, or a list of them."""

    principal: PrincipalView
    mode: str | list[str]
    credential: Annotated[str, Meta(description="What the caller is known by, as in the audit trail.")]
    scopes: list[Scope]
    servers: list[MyServer]


def connection_view(api: ApiContext, server: ServerSettings, connection: AccountConnection) -> ConnectionView:
    """Return an account of a server as the API shows it."""
    name = connection.account.name
    place = server.name if name == DEFAULT_ACCOUNT else f"{server.name}@{name}"
    return ConnectionView(
        account=name,
        state=connection.word,
        address=f"{api.public_url}/{place}/mcp",
        grant=None if connection.grant is None else grant_view(api, connection.grant),
    )


async def show_me(call: Call[None, None]) -> Answer:
    """Return the caller, and the servers that it may use."""
    api, caller = call.api, call.caller
    modes = list(api.settings().inbound.modes)
    servers = []
    for name, connections in (await api.broker.stored_grants.connections(caller.principal)).items():
        server = api.servers.get(name)
        if server is not None:
            accounts = [connection_view(api, server, connection) for connection in connections]
            servers.append(
                MyServer(
                    id=server.server_id,
                    name=name,
                    grant_owner=server.grant_owner,
                    state=accounts[0].state,
                    accounts=accounts,
                )
            )
    return Answer(
        Me(
            principal=await principal_view(api, caller.principal),
            mode="none" if not modes else str(modes[0]) if len(modes) == 1 else [str(mode) for mode in modes],
            credential=caller.credential,
            scopes=sorted(caller.scopes),
            servers=servers,
        )
    )


OPERATIONS = (
    Operation(
        "GET",
        "/me",
        show_me,
        action="me.get",
        access=Access.SELF,
        summary="Return who calls, and how it is connected with each server that it may use",
        answers={200: Me},
    ),
)
