"""``/servers``: those of the configuration, which are only shown, and those that are made, changed and deleted here."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from mcp_auth_proxy.broker.made_servers import merged
from mcp_auth_proxy.broker.stored_grants import AccountConnection
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.errors import without_query_values
from mcp_auth_proxy.models import MadeServer
from mcp_auth_proxy.web.api.grants import HealthView, health_view
from mcp_auth_proxy.web.api.models import Body, Fault, View, moment, moment_or_none
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation, etag_of
from mcp_auth_proxy.web.api.pages import PageInfo, PageQuery, info, position
from mcp_auth_proxy.web.api.problems import Problem, forbidden, not_found
from mcp_auth_proxy.web.api.reach import answered, config_fault, sees, visible_server

ServerName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,62}$", description="The first part of its address.")]
Url = Annotated[str, Meta(min_length=1, max_length=2000, description="Where the MCP server is.")]
Keys = Annotated[
    dict[str, Any], Meta(description="As in the configuration file, but for files and environment variables.")
]


class AccountView(View):
    """The connection of the caller's account with a server."""

    account: str
    word: Annotated[str, Meta(description="The state in one or two words, such as connected or needs consent.")]
    state: Annotated[str | None, Meta(description="The state of the grant; null if there is none.")]
    health: HealthView | None
    reason: str | None
    label: Annotated[str | None, Meta(description="Whose account it is, as far as that is known.")]
    granted_at: datetime | None
    expires_at: datetime | None


class OAuthView(View):
    """How tokens are obtained for a server. Secrets are never shown."""

    grant: str
    client_id: str | None
    client_auth: str | None
    has_client_secret: bool
    scopes: list[str] | None
    issuer: str | None
    resource: str
    dpop: str
    authorization_params: dict[str, str]
    allow_missing_pkce: bool


class ServerView(View):
    """A server. ``accounts`` are those of the caller; they are no part of its ETag."""

    id: str
    name: str
    project_id: str
    address: Annotated[str, Meta(description="Where MCP clients reach it at this proxy.")]
    url: Annotated[str, Meta(description="Where the MCP server is; values in its query are masked.")]
    oauth: OAuthView
    origin: Literal["config", "api", "adhoc"]
    owner: Annotated[str | None, Meta(description="The principal that an ad-hoc server belongs to.")]
    grant_owner: Literal["caller", "shared"]
    allow: list[str]
    status: Literal["active"]
    created_at: datetime | None
    updated_at: datetime | None
    accounts: list[AccountView]


class ServerList(View):
    """Servers: first those of the configuration, then the others as they were made."""

    items: list[ServerView]
    page: PageInfo


class NewServer(Body):
    """A server to make."""

    name: ServerName
    url: Url
    oauth: Keys | None = None
    grant_owner: Literal["caller", "shared"] | None = None
    allow: list[str] | None = None
    accounts: Keys | None = None
    allow_http: bool | None = None
    upstream_timeout: Annotated[str, Meta(description="As in the configuration: 30s, 2m.")] | None = None


class ServerPatch(Body):
    """Changes of a server, as a merge patch (RFC 7396): absent leaves, null removes, objects are merged."""

    name: ServerName | UnsetType = UNSET
    url: Url | UnsetType = UNSET
    oauth: Keys | UnsetType | None = UNSET
    grant_owner: Literal["caller", "shared"] | UnsetType | None = UNSET
    allow: list[str] | UnsetType | None = UNSET
    accounts: Keys | UnsetType | None = UNSET
    allow_http: bool | UnsetType | None = UNSET
    upstream_timeout: str | UnsetType | None = UNSET


async def list_servers(call: Call[None, PageQuery]) -> Answer:
    """Return the servers that the caller sees."""
    last, size = position(call), call.query.page_size
    servers = [server for server in call.api.servers.values() if sees(call, server)]
    ids = [server.server_id for server in servers]
    begin = ids.index(last) + 1 if last in ids else 0 if last is None else len(ids)
    shown = servers[begin : begin + size]
    connections = await call.api.broker.stored_grants.connections(call.caller.principal) if shown else {}
    items = [_view(call, server, connections.get(server.name, ())) for server in shown]
    following = shown[-1].server_id if begin + size < len(servers) else None
    return Answer(ServerList(items=items, page=info(call, following)))


async def read_server(call: Call[None, None]) -> Answer:
    """Return a server with the connections of the caller."""
    server = visible_server(call)
    connections = await call.api.broker.stored_grants.connections(call.caller.principal)
    return _answer(call, server, connections.get(server.name, ()))


async def create_server(call: Call[NewServer, None]) -> Answer:
    """Make a server; it is served at once."""
    given = {name: value for name, value in msgspec.structs.asdict(call.body).items() if value is not None}
    name = given.pop("name")
    with answered():
        made = await call.api.made.add(name, given, project=call.caller.principal.project_id)
    call.target, call.server = made.id, (made.id, made.name)
    return _answer(call, call.api.servers[made.name], (), status=201)


def faults_of_new(call: Call[NewServer, None], given: Mapping[str, Any]) -> list[Fault]:
    """Return what the rules of the configuration find in a body that has other faults."""
    return _faults(call, {name: value for name, value in given.items() if value is not None})


def faults_of_change(call: Call[ServerPatch, None], given: Mapping[str, Any]) -> list[Fault]:
    """Return what the rules of the configuration find in a change that has other faults."""
    made = _made(call)
    return _faults(call, merged({"name": made.name, "url": made.url, **made.document}, given))


def _faults(call: Call[Any, Any], document: dict[str, Any]) -> list[Fault]:
    name = document.pop("name", "")
    return [config_fault(error) for error in call.api.made.errors(name if isinstance(name, str) else "", document)]


async def change_server(call: Call[ServerPatch, None]) -> Answer:
    """Change a server that was made here."""
    made = _made(call)
    server = visible_server(call)
    call.check_match(_view(call, server, ()))
    patch = {
        name: value for name, value in msgspec.structs.asdict(call.body).items() if not isinstance(value, UnsetType)
    }
    name = patch.pop("name", made.name)
    since = made.updated_at if call.if_match is not None else None
    with answered():
        changed = await call.api.made.change(made, name, patch, unchanged_since=since)
    if changed.name != made.name:
        # Grants are kept by the server's name.
        await call.api.broker.disconnector.server_deleted(server)
        await call.api.made.forget(made.name)
    connections = await call.api.broker.stored_grants.connections(call.caller.principal)
    return _answer(call, call.api.servers[changed.name], connections.get(changed.name, ()))


async def delete_server(call: Call[None, None]) -> Answer:
    """Delete a server that was made here: it is served no longer, and its grants are revoked."""
    made = _made(call)
    server = visible_server(call)
    call.check_match(_view(call, server, ()))
    if not await call.api.made.delete(made):
        raise not_found("server")
    await call.api.broker.disconnector.server_deleted(server)
    await call.api.made.forget(made.name)
    return Answer(status=204)


def _made(call: Call[Any, Any]) -> MadeServer:
    """Return the made server that the path names, if the caller may change it. Raises Problem (403, 404, 409)."""
    server = visible_server(call)
    may_change = call.is_admin or (server.origin == "adhoc" and server.owner == call.caller.principal.id)
    if not may_change:
        raise forbidden("This is for admins, with a credential that has the scope admin.")
    made = call.api.made.get(server.id)
    if server.origin == "config" or made is None:
        raise Problem(409, "config-owned", f"The configuration file defines {server.name}: change it there.")
    return made


def _answer(
    call: Call[Any, Any],
    server: ServerSettings,
    connections: Sequence[AccountConnection],
    *,
    status: int = 200,
) -> Answer:
    # What changes with every renewal is no part of the tag: else nobody could change a server that is in use.
    headers = {"etag": etag_of(_view(call, server, ()))}
    if status == 201:
        headers["location"] = f"/api/v1/servers/{server.server_id}"
    return Answer(_view(call, server, connections), status=status, headers=headers)


def _view(call: Call[Any, Any], server: ServerSettings, connections: Sequence[AccountConnection]) -> ServerView:
    made = call.api.made.get(server.id)
    return ServerView(
        id=server.server_id,
        name=server.name,
        project_id=server.project,
        address=f"{call.api.public_url}/{server.name}/mcp",
        url=without_query_values(server.url),
        oauth=_oauth_view(server.oauth),
        origin=server.origin,
        owner=server.owner or None,
        grant_owner=server.grant_owner,
        allow=list(server.allow),
        status="active",
        created_at=moment(made.created_at) if made is not None else None,
        updated_at=moment(made.updated_at) if made is not None else None,
        accounts=[_account_view(connection) for connection in connections],
    )


def _oauth_view(oauth: OAuthSettings) -> OAuthView:
    return OAuthView(
        grant=oauth.grant.value,
        client_id=oauth.client_id,
        client_auth=None if oauth.client_auth is None else oauth.client_auth.value,
        has_client_secret=oauth.client_secret is not None,
        scopes=None if oauth.scopes is None else list(oauth.scopes),
        issuer=oauth.issuer,
        resource=oauth.resource,
        dpop=oauth.dpop.value,
        authorization_params=dict(oauth.authorization_params),
        allow_missing_pkce=oauth.allow_missing_pkce,
    )


def _account_view(connection: AccountConnection) -> AccountView:
    grant, status = connection.grant, connection.status
    return AccountView(
        account=connection.account.name,
        word=connection.word.value,
        state=None if status is None else status.state.value,
        health=None if status is None else health_view(status),
        reason=None if status is None else status.reason or None,
        label=None if grant is None else grant.label or None,
        granted_at=moment_or_none(None if grant is None else grant.granted_at),
        expires_at=moment_or_none(None if grant is None else grant.expires_at),
    )


OPERATIONS = (
    Operation(
        "GET",
        "/servers",
        list_servers,
        action="servers.list",
        access=Access.SELF,
        summary="List the servers, with the state of each account",
        query=PageQuery,
        answers={200: ServerList},
    ),
    Operation(
        "POST",
        "/servers",
        create_server,
        action="servers.create",
        access=Access.ADMIN,
        summary="Make a server; it is served at once",
        body=NewServer,
        answers={201: ServerView},
        problems=(409,),
        more_faults=faults_of_new,
    ),
    Operation(
        "GET",
        "/servers/{id}",
        read_server,
        action="servers.read",
        access=Access.SELF,
        summary="Return a server, with the state of each account",
        answers={200: ServerView},
        etag=True,
    ),
    Operation(
        "PATCH",
        "/servers/{id}",
        change_server,
        action="servers.update",
        access=Access.ADMIN,
        summary="Change a server that was made by the API",
        body=ServerPatch,
        answers={200: ServerView},
        problems=(409,),
        etag=True,
        more_faults=faults_of_change,
    ),
    Operation(
        "DELETE",
        "/servers/{id}",
        delete_server,
        action="servers.delete",
        access=Access.SELF,
        summary="Delete a server that was made at run time, and revoke its grants (an ad-hoc one: its owner too)",
        answers={204: None},
        problems=(409,),
        etag=True,
    ),
)
