"""``/principals``: who may call, for admins."""

from datetime import datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType, field

from mcp_auth_proxy.errors import LastAdmin, NameTaken
from mcp_auth_proxy.models import LOCAL, Identity, Principal, PrincipalStatus, Role
from mcp_auth_proxy.store.principals import new_principal_id
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.grants import DeletedGrant, deletion_view
from mcp_auth_proxy.web.api.models import LINE, Body, Text, View, moment
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.pages import PageInfo, PageQuery, info, position
from mcp_auth_proxy.web.api.problems import Problem, not_found

Source = Annotated[str, Meta(max_length=1000, pattern=r"^(jwt|header):[!-~]+$")]

PrincipalName = Annotated[
    str, Meta(min_length=1, max_length=100, pattern=rf"^(?!local$|role:|project:|prn_|\s){LINE[1:-1]}(?<!\s)$")
]
"""As ``identity.naming.check_name``, but as a pattern, so that the OpenAPI document has it too."""


class NewIdentity(Body):
    """What a credential says about who calls: ``jwt:ISSUER`` and the subject, or ``header:NAME`` and its value."""

    source: Source
    subject: Annotated[Text, Meta(min_length=1)]


class NewPrincipal(Body):
    """A principal to add."""

    name: PrincipalName
    role: Role = Role.MEMBER
    identities: Annotated[list[NewIdentity], Meta(max_length=20)] = field(default_factory=list)


class PrincipalChange(Body):
    """What to change of a principal; what is absent stays."""

    status: PrincipalStatus | UnsetType = UNSET
    role: Role | UnsetType = UNSET


class IdentityView(View):
    """What a credential says about who calls."""

    source: str
    subject: str


class PrincipalView(View):
    """Somebody who calls: a person or a program."""

    id: str
    project_id: str
    name: str
    role: Role
    status: PrincipalStatus
    identities: list[IdentityView]
    created_at: datetime


class PrincipalList(View):
    """Principals, by name."""

    items: list[PrincipalView]
    page: PageInfo


class DeletedGrantOf(DeletedGrant):
    """A grant of the principal that was deleted."""

    id: str
    server_name: str
    account: str


class DeletedGrants(View):
    """All grants of a principal, which are deleted now."""

    items: list[DeletedGrantOf]


async def principal_view(api: ApiContext, principal: Principal) -> PrincipalView:
    """Return a principal as the API shows it."""
    identities = await api.directory.identities(principal.id)
    return PrincipalView(
        id=principal.id,
        project_id=principal.project_id,
        name=principal.name,
        role=principal.role,
        status=principal.status,
        identities=[IdentityView(source=each.source, subject=each.subject) for each in identities],
        created_at=moment(principal.created_at),
    )


async def list_principals(call: Call[None, PageQuery]) -> Answer:
    """Return the principals of the caller's project."""
    last, size = position(call), call.query.page_size
    project = call.caller.principal.project_id
    known = [each for each in call.api.directory.principals() if each.project_id == project]
    found = [each for each in known if last is None or each.name > last][: size + 1]
    following = found[size - 1].name if len(found) > size else None
    items = [await principal_view(call.api, each) for each in found[:size]]
    return Answer(PrincipalList(items=items, page=info(call, following)))


async def create_principal(call: Call[NewPrincipal, None]) -> Answer:
    """Add a principal to the caller's project."""
    body, me = call.body, call.caller.principal
    principal = Principal(
        id=new_principal_id(),
        name=body.name,
        project_id=me.project_id,
        role=body.role,
        created_at=call.api.clock(),
    )
    call.target = principal.id
    try:
        await call.api.directory.add(principal, [Identity(each.source, each.subject) for each in body.identities])
    except NameTaken as error:
        # Ids of other projects are nobody's business here (T65).
        other = call.api.find_principal(error.existing_id, me.project_id)
        raise Problem(409, "name-taken", str(error), existing_id=other.id if other else None) from None
    return Answer(await principal_view(call.api, principal), etag=True)


async def change_principal(call: Call[PrincipalChange, None]) -> Answer:
    """Change the status or the role of a principal. One that is disabled can't call a second later, anywhere."""
    principal, body = _find(call), call.body
    call.check_match(await principal_view(call.api, principal))
    if principal.id == LOCAL:
        raise Problem(
            409, "local", "The principal local can't be changed: it is everybody, since callers are not told."
        )
    try:
        changed = await call.api.directory.change(
            principal.id,
            status=None if body.status is UNSET else body.status,
            role=None if body.role is UNSET else body.role,
            keep_admin=True,
        )
    except LastAdmin as error:
        raise Problem(409, "last-admin", str(error)) from None
    if changed is None:
        raise not_found("principal")
    return Answer(await principal_view(call.api, changed), etag=True)


async def delete_grants(call: Call[None, None]) -> Answer:
    """Delete all grants of a principal, and revoke them."""
    deleted = await call.api.broker.stored_grants.delete_all(_find(call).id)
    items = []
    for grant, revoked in deleted:
        view = deletion_view(revoked)
        items.append(
            DeletedGrantOf(
                id=str(grant.id),
                server_name=grant.key.account.server,
                account=grant.key.account.name,
                revoked_upstream=view.revoked_upstream,
                detail=view.detail,
            )
        )
    return Answer(DeletedGrants(items=items))


def _find(call: Call[Any, None]) -> Principal:
    principal = call.api.directory.principal(call.path["principal_id"])
    if principal is None or principal.project_id != call.caller.principal.project_id:
        raise not_found("principal")
    return principal


OPERATIONS = (
    Operation(
        "GET",
        "/principals",
        list_principals,
        action="principals.list",
        access=Access.ADMIN,
        summary="List principals, by name",
        query=PageQuery,
        answers={200: PrincipalList},
    ),
    Operation(
        "POST",
        "/principals",
        create_principal,
        action="principals.create",
        access=Access.ADMIN,
        summary="Add a principal",
        body=NewPrincipal,
        answers={200: PrincipalView},
        problems=(409,),
    ),
    Operation(
        "PATCH",
        "/principals/{principal_id}",
        change_principal,
        action="principals.change",
        access=Access.ADMIN,
        summary="Change the status or the role of a principal",
        body=PrincipalChange,
        answers={200: PrincipalView},
        problems=(409,),
        etag=True,
    ),
    Operation(
        "DELETE",
        "/principals/{principal_id}/grants",
        delete_grants,
        action="principals.delete_grants",
        access=Access.ADMIN,
        summary="Delete all grants of a principal, and revoke them",
        answers={200: DeletedGrants},
    ),
)
