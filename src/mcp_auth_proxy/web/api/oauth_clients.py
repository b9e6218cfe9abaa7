"""``/oauth-clients``: clients that were registered by hand at a provider. Their secrets go in and never come out."""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mcp_auth_proxy.broker import CLIENT_CHANGED, CLIENT_REVOKED
from mcp_auth_proxy.models import ClientAuth, OAuthClient, OAuthClientStatus
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth.discovery import issuer_of_document
from mcp_auth_proxy.store.oauth_clients import OAuthClientChanged, OAuthClientConflict, OAuthClients
from mcp_auth_proxy.web.api.models import Body, Check, Name, PartsInvalid, Text, View, moment
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.pages import PageInfo, PageQuery, info, position
from mcp_auth_proxy.web.api.problems import Problem, invalid_field, not_found

MAX_METADATA = 16 * 1024
"""Bytes of ``metadata`` as JSON."""

_METHODS = (str(ClientAuth.BASIC), str(ClientAuth.POST), str(ClientAuth.NONE))


def _endpoint(text: str) -> None:
    if text:
        urls.check(text, http_loopback=True)


def _scope(text: str) -> None:
    if any(not 0x21 <= ord(char) <= 0x7E or char in '"\\' for char in text):
        raise ValueError("is not a scope (RFC 6749 §3.3)")


def _metadata(values: dict[str, Any]) -> None:
    if len(msgspec.json.encode(values)) > MAX_METADATA:
        raise ValueError("is larger than 16 KiB")
    faulty: list[tuple[str, str]] = []
    for name, test in _METADATA.items():
        try:
            if name in values:
                test(values[name])
        except ValueError as error:
            faulty.append((name, str(error)))
    if faulty:
        raise PartsInvalid(faulty)


def _metadata_url(value: object) -> None:
    if not isinstance(value, str):
        raise ValueError("must be a URL")
    _endpoint(value)


def _discovery_url(value: object) -> None:
    _metadata_url(value)
    issuer_of_document(str(value))


def _auth_method(value: object) -> None:
    if value not in _METHODS:
        raise ValueError(f"must be one of {', '.join(_METHODS)}")


_METADATA: Mapping[str, Callable[[object], None]] = {
    "issuer": _metadata_url,
    "discovery_url": _discovery_url,
    "token_auth_method": _auth_method,
}
"""The keys that are used; others are kept."""


Url = Annotated[str, Meta(max_length=2000), Check(_endpoint)]
NeededUrl = Annotated[str, Meta(min_length=1, max_length=2000), Check(_endpoint)]
Secret = Annotated[str, Meta(max_length=4000)]
Scopes = Annotated[list[Annotated[str, Meta(min_length=1, max_length=200), Check(_scope)]], Meta(max_length=200)]
Uris = Annotated[list[NeededUrl], Meta(max_length=50)]
Ids = Annotated[list[Name], Meta(max_length=200)]
Metadata = Annotated[dict[str, Any], Check(_metadata)]
Status = Literal["active", "inactive", "revoked", ""]
"""Empty is as good as absent."""


class NewOAuthClient(Body):
    """A client that was registered by hand at a provider."""

    provider: Name
    client_id: Annotated[str, Meta(min_length=1, max_length=2000)]
    authorization_url: NeededUrl
    token_url: NeededUrl
    provider_name: Text | None = None
    client_secret: Secret | None = None
    scopes: Scopes | None = None
    redirect_uris: Uris | None = None
    metadata: Metadata | None = None
    server_ids: Ids | None = None
    status: Status | None = None


class OAuthClientChange(Body):
    """What to change. What is absent, null or empty stays, unless its ``replace_`` field is true."""

    provider: Annotated[str, Meta(max_length=100)] | None = None
    provider_name: Text | None = None
    client_id: Annotated[str, Meta(max_length=2000)] | None = None
    client_secret: Secret | None = None
    authorization_url: Url | None = None
    token_url: Url | None = None
    scopes: Scopes | None = None
    redirect_uris: Uris | None = None
    metadata: Metadata | None = None
    server_ids: Ids | None = None
    status: Status | None = None
    replace_scopes: bool | None = None
    replace_redirect_uris: bool | None = None
    replace_metadata: bool | None = None
    replace_server_ids: bool | None = None


class OAuthClientView(View):
    """A client, without its secret."""

    id: str
    customer_id: str
    project_id: str
    provider: str
    provider_name: str
    client_id: str
    has_client_secret: bool
    authorization_url: str
    token_url: str
    scopes: list[str]
    redirect_uris: list[str]
    metadata: dict[str, Any]
    server_ids: list[str]
    status: OAuthClientStatus
    created_at: datetime
    updated_at: datetime


class OAuthClientList(View):
    """Clients, oldest first."""

    items: list[OAuthClientView]
    page: PageInfo


async def list_clients(call: Call[None, PageQuery]) -> Answer:
    """Return the clients of the caller's project."""
    found = await _store(call).of_project(call.caller.principal.project_id)
    start, size = int(position(call) or 0), call.query.page_size
    following = str(start + size) if len(found) > start + size else None
    items = [_view(client) for client in found[start : start + size]]
    return Answer(OAuthClientList(items=items, page=info(call, following)))


async def get_client(call: Call[None, None]) -> Answer:
    """Return one client of the caller's project."""
    return Answer(_view(await _found(call)), etag=True)


async def create_client(call: Call[NewOAuthClient, None]) -> Answer:
    """Store a new client."""
    body, now = call.body, call.api.clock()
    status = OAuthClientStatus(body.status or OAuthClientStatus.ACTIVE)
    if status is OAuthClientStatus.REVOKED:
        raise invalid_field(("body", "status"), "A new client can't be revoked.")
    client = OAuthClient(
        id=f"oac_{secrets.token_hex(12)}",
        customer_id=call.api.settings().admin.customer_id,
        project_id=call.caller.principal.project_id,
        provider=body.provider,
        provider_name=body.provider_name or body.provider,
        client_id=body.client_id,
        client_secret=body.client_secret or None,
        authorization_url=body.authorization_url,
        token_url=body.token_url,
        scopes=tuple(body.scopes or ()),
        redirect_uris=tuple(body.redirect_uris or ()),
        metadata=body.metadata or {},
        server_ids=tuple(dict.fromkeys(body.server_ids or ())),
        status=status,
        created_at=now,
        updated_at=now,
    )
    await _write(client, _store(call).add)
    call.target = client.id
    return Answer(_view(client), status=201, headers={"location": f"/api/v1/oauth-clients/{client.id}"}, etag=True)


async def change_client(call: Call[OAuthClientChange, None]) -> Answer:
    """Change a client; what depends on the old one ends."""
    before = await _found(call)
    call.check_match(_view(before))
    after = _changed(before, call.body, call.api.clock())
    if before.status is OAuthClientStatus.REVOKED:
        if replace(after, version=before.version, updated_at=before.updated_at) == before:
            return Answer(_view(before), etag=True)
        raise Problem(409, "client-revoked", "A revoked client can't be changed. Delete it, and make a new one.")
    another = (after.client_id, after.token_url) != (before.client_id, before.token_url)
    if another and before.client_secret is not None and not call.body.client_secret:
        # Else whoever may change the address would be sent the secret (T68).
        changed = "token_url" if after.token_url != before.token_url else "client_id"
        raise invalid_field(("body", "client_secret"), f"A new {changed} needs the client_secret in the same request.")
    revoked = after.status is OAuthClientStatus.REVOKED
    if revoked:
        after = replace(after, client_secret=None)
    await _write(after, _store(call).change)
    if revoked or another:
        reason = CLIENT_REVOKED if revoked else CLIENT_CHANGED
        await call.api.broker.disconnector.end_client(before, reason, revoke=revoked)
    return Answer(_view(after), etag=True)


async def delete_client(call: Call[None, None]) -> Answer:
    """Revoke a client and hide it; its provider is free again."""
    before = await _found(call)
    call.check_match(_view(before))
    now = call.api.clock()
    hidden = replace(
        before,
        status=OAuthClientStatus.REVOKED,
        client_secret=None,
        version=before.version + 1,
        updated_at=now,
        deleted_at=now,
    )
    await _write(hidden, _store(call).change)
    await call.api.broker.disconnector.end_client(before, CLIENT_REVOKED, revoke=True)
    return Answer(status=204)


def _store(call: Call[Any, Any]) -> OAuthClients:
    return OAuthClients(call.api.database)


async def _found(call: Call[Any, Any]) -> OAuthClient:
    client = await _store(call).get(call.path["id"])
    if client is None or client.deleted_at is not None or client.project_id != call.caller.principal.project_id:
        raise not_found("OAuth client")
    return client


async def _write(client: OAuthClient, write: Callable[[OAuthClient], Awaitable[None]]) -> None:
    try:
        await write(client)
    except OAuthClientConflict as conflict:
        raise Problem(409, "conflict", conflict.reason, existing_id=conflict.existing_id) from None
    except OAuthClientChanged:
        raise Problem(412, "changed", "The client was changed at the same time: read it again.") from None


def _changed(before: OAuthClient, body: OAuthClientChange, now: float) -> OAuthClient:
    """Return a client with the changes: what is null or empty stays, unless it is to be replaced."""
    single = ("provider", "provider_name", "client_id", "client_secret", "authorization_url", "token_url")
    changes: dict[str, Any] = {name: value for name in single if (value := getattr(body, name))}
    if body.status:
        changes["status"] = OAuthClientStatus(body.status)
    for name in ("scopes", "redirect_uris", "server_ids"):
        value = getattr(body, name) or ()
        if value or getattr(body, f"replace_{name}") is True:
            changes[name] = tuple(dict.fromkeys(value))
    if body.metadata or body.replace_metadata is True:
        changes["metadata"] = body.metadata or {}
    return replace(before, **changes, version=before.version + 1, updated_at=now)


def _view(client: OAuthClient) -> OAuthClientView:
    return OAuthClientView(
        id=client.id,
        customer_id=client.customer_id,
        project_id=client.project_id,
        provider=client.provider,
        provider_name=client.provider_name,
        client_id=client.client_id,
        has_client_secret=client.client_secret is not None,
        authorization_url=client.authorization_url,
        token_url=client.token_url,
        scopes=list(client.scopes),
        redirect_uris=list(client.redirect_uris),
        metadata=dict(client.metadata),
        server_ids=list(client.server_ids),
        status=client.status,
        created_at=moment(client.created_at),
        updated_at=moment(client.updated_at),
    )


OPERATIONS = (
    Operation(
        "GET",
        "/oauth-clients",
        list_clients,
        action="oauth-clients.list",
        access=Access.SELF,
        summary="List the OAuth clients of the project",
        query=PageQuery,
        answers={200: OAuthClientList},
    ),
    Operation(
        "POST",
        "/oauth-clients",
        create_client,
        action="oauth-clients.create",
        access=Access.ADMIN,
        summary="Add an OAuth client",
        body=NewOAuthClient,
        answers={201: OAuthClientView},
        problems=(409,),
    ),
    Operation(
        "GET",
        "/oauth-clients/{id}",
        get_client,
        action="oauth-clients.get",
        access=Access.SELF,
        summary="Read an OAuth client",
        answers={200: OAuthClientView},
        problems=(404,),
        etag=True,
    ),
    Operation(
        "PATCH",
        "/oauth-clients/{id}",
        change_client,
        action="oauth-clients.change",
        access=Access.ADMIN,
        summary="Change an OAuth client",
        body=OAuthClientChange,
        answers={200: OAuthClientView},
        problems=(404, 409, 412),
        etag=True,
    ),
    Operation(
        "DELETE",
        "/oauth-clients/{id}",
        delete_client,
        action="oauth-clients.delete",
        access=Access.ADMIN,
        summary="Revoke an OAuth client and delete it",
        answers={204: None},
        problems=(404, 412),
        etag=True,
    ),
)
