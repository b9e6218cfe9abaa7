"""``/keys``: API keys. The key itself is shown once, when it is made."""

from datetime import datetime
from typing import Annotated, Any

from msgspec import UNSET, Meta, UnsetType

from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ApiKey, Caller, Principal, Scope
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.models import Body, Check, Name, View, moment, moment_or_none
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation, is_admin
from mcp_auth_proxy.web.api.pages import PageInfo, PageQuery, info, position
from mcp_auth_proxy.web.api.problems import Problem, forbidden, not_found

MAX_KEYS = 1000
"""Keys of one principal."""

USUAL_SCOPES = frozenset({Scope.MCP, Scope.SELF})
"""What a key is for if nothing is said, as far as its maker may do that."""


def _can_be_shown(end: datetime) -> None:
    try:
        moment(end.timestamp())
    except OverflowError:
        raise ValueError("is too far away") from None


class NewKey(Body):
    """An API key to make."""

    name: Name = "api"
    scopes: Annotated[list[Scope], Meta(min_length=1, max_length=3)] | None = None
    expires_at: (
        Annotated[
            datetime,
            Meta(
                tz=True,
                description="A key that has ended can't be used. Default: never, or when its maker's key ends.",
            ),
            Check(_can_be_shown),
        ]
        | None
    ) = None
    principal: Annotated[str | None, Meta(description="The id or name of the key's owner, for admins.")] = None


class KeyQuery(PageQuery):
    """Whose keys to list."""

    principal: Annotated[str | UnsetType, Meta(description="The id or name of their owner; for admins.")] = UNSET


class KeyView(View):
    """An API key, without its secret."""

    id: str
    name: str
    principal: Annotated[str, Meta(description="The id of its owner.")]
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: Annotated[datetime | None, Meta(description="To the hour.")]


class CreatedKey(KeyView):
    """A new API key."""

    key: Annotated[str, Meta(description="The key itself. It is shown now and never again.")]


class KeyList(View):
    """API keys, the oldest first."""

    items: list[KeyView]
    page: PageInfo


def key_view(key: ApiKey) -> KeyView:
    """Return a key as the API shows it."""
    return KeyView(
        id=key.id,
        name=key.name,
        principal=key.principal,
        scopes=sorted(key.scopes),
        created_at=moment(key.created_at),
        expires_at=moment_or_none(key.expires_at),
        last_used_at=moment_or_none(key.last_used_at),
    )


async def create_key(call: Call[NewKey, None]) -> Answer:
    """Make a key, for no more than the caller may do itself."""
    body, now = call.body, call.api.clock()
    owner = _owner(call.api, call.caller, body.principal)
    if owner is None:
        raise not_found("principal")
    own = call.caller.scopes if is_admin(call.caller) else call.caller.scopes - {Scope.ADMIN}
    scopes = (own & USUAL_SCOPES or own) if body.scopes is None else frozenset(body.scopes)
    if not scopes <= own:
        more = ", ".join(sorted(scopes - own))
        raise forbidden(f"A key can't be for more than the credential that makes it: this one is not for {more}.")
    known = await call.api.directory.keys(owner.id)
    expires_at = _end(call, None if body.expires_at is None else body.expires_at.timestamp(), known)
    if len(known) >= MAX_KEYS:
        raise Problem(409, "too-many-keys", f"A principal has at most {MAX_KEYS} keys: delete some that are not used.")
    key, text = make_key(principal=owner.id, name=body.name, scopes=scopes, now=now, expires_at=expires_at)
    call.target = key.id
    await call.api.directory.add_key(key)
    view = key_view(key)
    created = CreatedKey(
        id=view.id,
        name=view.name,
        principal=view.principal,
        scopes=view.scopes,
        created_at=view.created_at,
        expires_at=view.expires_at,
        last_used_at=None,
        key=text,
    )
    return Answer(created, status=201)


async def list_keys(call: Call[None, KeyQuery]) -> Answer:
    """Return the caller's own keys; for admins, those of everybody in their project."""
    last, size = position(call), call.query.page_size
    wanted = None if call.query.principal is UNSET else call.query.principal
    if call.is_admin and wanted is None:
        found = [key for key in await call.api.directory.keys() if _is_in_project(call.api, key, call.caller)]
    else:
        owner = _owner(call.api, call.caller, wanted)
        found = [] if owner is None else await call.api.directory.keys(owner.id)
    left = [key for key in sorted(found, key=_position) if last is None or _position(key) > last]
    page, following = left[:size], _position(left[size - 1]) if len(left) > size else None
    return Answer(KeyList(items=[key_view(key) for key in page], page=info(call, following)))


async def delete_key(call: Call[None, None]) -> Answer:
    """Delete a key: it can't be used any more when this is answered."""
    key = next((each for each in await call.api.directory.keys() if each.id == call.path["key_id"]), None)
    if key is None or not (key.principal == call.caller.principal.id or _is_admins(call, key)):
        raise not_found("key")
    if not await call.api.directory.revoke_key(key.id):
        raise not_found("key")
    return Answer(status=204)


def _end(call: Call[NewKey, None], wanted: float | None, own: list[ApiKey]) -> float | None:
    """Return when a new key ends: not after the key that makes it, unless an admin does. Raises Problem (403).

    Otherwise whoever was given a key for a while could keep what it is for.
    """
    latest = next((key.expires_at for key in own if key.id == call.caller.key), None)
    if call.is_admin or latest is None:
        return wanted
    if wanted is not None and wanted > latest:
        raise forbidden("A key can't last longer than the key that makes it.")
    return latest if wanted is None else wanted


def _owner(api: ApiContext, caller: Caller, wanted: str | None) -> Principal | None:
    """Return whose keys are meant; None if there is no such principal. Raises Problem (403)."""
    me = caller.principal
    if wanted is None or wanted in (me.id, me.name):
        return me
    if not is_admin(caller):
        raise forbidden("Only admins can do that for others.")
    return api.find_principal(wanted, me.project_id)


def _is_admins(call: Call[Any, Any], key: ApiKey) -> bool:
    return call.is_admin and _is_in_project(call.api, key, call.caller)


def _is_in_project(api: ApiContext, key: ApiKey, caller: Caller) -> bool:
    owner = api.directory.principal(key.principal)
    return owner is not None and owner.project_id == caller.principal.project_id


def _position(key: ApiKey) -> str:
    return f"{key.created_at:020.6f} {key.id}"


OPERATIONS = (
    Operation(
        "POST",
        "/keys",
        create_key,
        action="keys.create",
        access=Access.SELF,
        summary="Make an API key: one's own, or, for admins, one of somebody else",
        body=NewKey,
        answers={201: CreatedKey},
        problems=(404, 409),
    ),
    Operation(
        "GET",
        "/keys",
        list_keys,
        action="keys.list",
        access=Access.SELF,
        summary="List API keys: one's own; for admins, those of their project",
        query=KeyQuery,
        answers={200: KeyList},
    ),
    Operation(
        "DELETE",
        "/keys/{key_id}",
        delete_key,
        action="keys.delete",
        access=Access.SELF,
        summary="Delete an API key",
        answers={204: None},
    ),
)
