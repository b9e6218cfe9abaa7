"""``/grants``: whose tokens there are, and how they are. Never a token."""

from datetime import datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from mcp_auth_proxy.broker import ForgottenGrant, Revocation
from mcp_auth_proxy.broker.states import GrantStatus, Health
from mcp_auth_proxy.errors import AuthorizationError, GrantUnusable
from mcp_auth_proxy.models import DEFAULT_PROJECT, LOCAL, shared_principal
from mcp_auth_proxy.store.grant_summaries import GrantState, GrantSummary
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.models import View, moment, moment_or_none
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.pages import PageInfo, PageQuery, info, position
from mcp_auth_proxy.web.api.problems import Problem, forbidden, not_found, retry_after
from mcp_auth_proxy.web.api.reach import server_id_and_name

MAX_ID = 2**63 - 1

RETRY_SECONDS = 5.0
"""Seconds to wait after a failure that says nothing about that."""


class GrantQuery(PageQuery):
    """Which grants to list."""

    server: Annotated[str | UnsetType, Meta(description="The id or name of a server.")] = UNSET
    state: GrantState | UnsetType = UNSET
    principal: Annotated[str | UnsetType, Meta(description="The id or name of the owner; for admins.")] = UNSET


class HealthView(View):
    """How the renewal of a grant goes."""

    state: Health
    since: Annotated[datetime | None, Meta(description="Since when it is so.")]
    next_try: Annotated[datetime | None, Meta(description="When the renewal is tried again, if that is scheduled.")]
    reason: Annotated[
        str | None, Meta(description="Why it has ended, or why the last renewal failed; else what it may die of soon.")
    ]


class GrantView(View):
    """A grant, without its tokens."""

    id: str
    server: Annotated[str, Meta(description="The id of the server.")]
    server_name: str
    account: str
    owner: Annotated[str, Meta(description="The id of a principal, or project:ID if the grant is shared.")]
    owner_name: str
    issuer: str
    scopes: list[str]
    granted_at: datetime
    expires_at: Annotated[datetime | None, Meta(description="When the access token expires, if the server said so.")]
    label: Annotated[str, Meta(description="Whose account it is, as far as the authorization server said so.")]
    state: GrantState
    reason: Annotated[str, Meta(description="Why it has ended.")]
    health: HealthView


class GrantList(View):
    """Grants, the oldest first."""

    items: list[GrantView]
    page: PageInfo


class DeletedGrant(View):
    """What became of a grant at its authorization server."""

    revoked_upstream: bool
    detail: str


def health_view(status: GrantStatus) -> HealthView:
    """Return the health of a grant as the API shows it."""
    return HealthView(
        state=status.health,
        since=moment_or_none(status.since),
        next_try=moment_or_none(status.next_try),
        reason=status.reason or None,
    )


def grant_view(api: ApiContext, grant: GrantSummary) -> GrantView:
    """Return a grant as the API shows it."""
    account, status = grant.key.account, api.broker.stored_grants.status(grant)
    server, owner = api.servers.get(account.server), api.directory.principal(account.principal)
    ended = status.state is GrantState.ENDED
    return GrantView(
        id=str(grant.id),
        server=account.server if server is None else server.server_id,
        server_name=account.server,
        account=account.name,
        owner=account.principal,
        owner_name="" if owner is None else owner.name,
        issuer=grant.key.issuer,
        scopes=list(grant.scopes),
        granted_at=moment(grant.granted_at),
        expires_at=moment_or_none(grant.expires_at),
        label=grant.label,
        state=status.state,
        reason=status.reason if ended else "",
        health=health_view(status),
    )


async def list_grants(call: Call[None, GrantQuery]) -> Answer:
    """Return the caller's own grants; for admins, those of everybody in their project."""
    query, me, last = call.query, call.caller.principal, position(call)
    owner = project = None
    if query.principal is not UNSET:
        owner = _owner(call, query.principal)
    elif call.is_admin:
        project = me.project_id
    else:
        owner = me.id
    found, after = await call.api.broker.stored_grants.page(
        after=0 if last is None else int(last),
        count=query.page_size,
        state=None if query.state is UNSET else query.state,
        principal=owner,
        project=project,
        server=None if query.server is UNSET else _server_name(call.api, query.server),
    )
    items = [grant_view(call.api, grant) for grant in found if _may_see(call, grant)]
    return Answer(GrantList(items=items, page=info(call, None if after is None else str(after))))


async def show_grant(call: Call[None, None]) -> Answer:
    """Return one grant."""
    return Answer(grant_view(call.api, await _find(call)), etag=True)


async def refresh_grant(call: Call[None, None]) -> Answer:
    """Renew a grant now, whether or not its token has expired."""
    grant = await _find_own(call)
    try:
        renewed = await call.api.broker.stored_grants.refresh(grant.id)
    except GrantUnusable as error:
        raise Problem(409, "ended" if error.ended else "not-renewable", str(error)) from None
    except AuthorizationError as error:
        seconds = RETRY_SECONDS if error.retry_after is None else error.retry_after
        raise Problem(503, "refresh-failed", str(error), headers=retry_after(seconds)) from None
    if renewed is None:
        raise not_found("grant")
    return Answer(grant_view(call.api, renewed), etag=True)


async def delete_grant(call: Call[None, None]) -> Answer:
    """Delete a grant, and revoke it at its authorization server."""
    grant = await _find_own(call)
    call.check_match(grant_view(call.api, grant))
    deleted = await call.api.broker.stored_grants.delete(grant.id)
    if deleted is None:
        raise not_found("grant")
    return Answer(deletion_view(deleted.revoked))


def deletion_view(forgotten: ForgottenGrant | None) -> DeletedGrant:
    """Return what became of a deleted grant; None if it had ended before."""
    if forgotten is None:
        return DeletedGrant(revoked_upstream=False, detail="The grant had ended before, so nothing was revoked.")
    match forgotten.revocation:
        case Revocation.REVOKED:
            return DeletedGrant(revoked_upstream=True, detail=f"Revoked at {forgotten.issuer}.")
        case Revocation.NOT_OFFERED:
            detail = f"{forgotten.issuer} offers no revocation: the token is good there until it expires."
            return DeletedGrant(revoked_upstream=False, detail=detail)
        case _:
            detail = f"The grant is deleted here, but it could not be revoked: {forgotten.reason}"
            return DeletedGrant(revoked_upstream=False, detail=detail)


def _owner(call: Call[None, GrantQuery], wanted: str) -> str:
    """Return the owner of the grants that are asked for; somebody without grants if there is no such principal."""
    me = call.caller.principal
    if wanted in (me.id, me.name):
        return me.id
    if not call.is_admin:
        raise forbidden("Only admins can ask for the grants of others.")
    if wanted in (LOCAL, shared_principal(me.project_id)):
        return wanted
    found = call.api.find_principal(wanted, me.project_id)
    return "" if found is None else found.id


def _server_name(api: ApiContext, wanted: str) -> str:
    """Return the name of a server, given its id or name; what was given if there is none, for it may be gone."""
    named = next((server.name for server in api.servers.values() if server.server_id == wanted), None)
    return wanted if named is None else named


def _may_see(call: Call[Any, Any], grant: GrantSummary) -> bool:
    me, owner, server = call.caller.principal, grant.key.account.principal, grant.key.account.server
    if owner == me.id:
        return True
    if owner == shared_principal(me.project_id):
        settings = call.api.servers.get(server)
        return call.is_admin or (settings is not None and settings.admits(me))
    if not call.is_admin:
        return False
    if owner == LOCAL:
        return me.project_id == DEFAULT_PROJECT
    found = call.api.directory.principal(owner)
    return found is not None and found.project_id == me.project_id


async def _find(call: Call[None, None]) -> GrantSummary:
    """Return the grant that the path names. Raises Problem (404), also if the caller may not know of it (T65)."""
    text = call.path["grant_id"]
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    grant = await call.api.broker.stored_grants.get(number) if number <= MAX_ID and str(number) == text else None
    if grant is None or not _may_see(call, grant):
        raise not_found("grant")
    call.server = server_id_and_name(call, grant.key.account.server)
    return grant


async def _find_own(call: Call[None, None]) -> GrantSummary:
    """Return the grant that the path names, to change it. Raises Problem (403, 404)."""
    grant = await _find(call)
    if grant.key.account.principal != call.caller.principal.id and not call.is_admin:
        raise forbidden("This grant is shared by all: only an admin can change it.")
    return grant


OPERATIONS = (
    Operation(
        "GET",
        "/grants",
        list_grants,
        action="grants.list",
        access=Access.SELF,
        summary="List grants: one's own; for admins, those of their project",
        query=GrantQuery,
        answers={200: GrantList},
    ),
    Operation(
        "GET",
        "/grants/{grant_id}",
        show_grant,
        action="grants.get",
        access=Access.SELF,
        summary="Return a grant",
        answers={200: GrantView},
        etag=True,
    ),
    Operation(
        "POST",
        "/grants/{grant_id}/refresh",
        refresh_grant,
        action="grants.refresh",
        access=Access.SELF,
        summary="Renew a grant now",
        answers={200: GrantView},
        problems=(409,),
    ),
    Operation(
        "DELETE",
        "/grants/{grant_id}",
        delete_grant,
        action="grants.delete",
        access=Access.SELF,
        summary="Delete a grant, and revoke it at its authorization server",
        answers={200: DeletedGrant},
        etag=True,
    ),
)
