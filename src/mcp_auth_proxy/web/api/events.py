"""``/events``: the audit trail, for admins."""

from datetime import datetime
from typing import Annotated

from msgspec import Meta

from mcp_auth_proxy.store.events import Event, Events
from mcp_auth_proxy.web.api.models import View, moment
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.pages import PageInfo, PageQuery, info, position


class EventView(View):
    """A change by the API, a page or a command, or the attempt of one."""

    id: str
    at: datetime
    principal: Annotated[
        str, Meta(description="The id of the principal; local for commands, empty if it is not known who it was.")
    ]
    credential: Annotated[str, Meta(description="What the principal was known by; command:USER for commands.")]
    action: Annotated[str, Meta(description="RESOURCE.VERB, such as grants.delete.")]
    target: str
    server: Annotated[str | None, Meta(description="The id of the server that it concerns.")]
    server_name: str | None
    outcome: Annotated[str, Meta(description="ok, or the kind of the problem.")]
    address: str
    request_id: str


class EventList(View):
    """Events, newest first."""

    items: list[EventView]
    page: PageInfo


async def list_events(call: Call[None, PageQuery]) -> Answer:
    """Return the events of the caller's project."""
    last, size = position(call), call.query.page_size
    events, before = await Events(call.api.database).page(
        call.caller.principal.project_id, before=None if last is None else int(last), count=size
    )
    following = None if before is None else str(before)
    return Answer(EventList(items=[_view(event) for event in events], page=info(call, following)))


def _view(event: Event) -> EventView:
    return EventView(
        id=str(event.id),
        at=moment(event.at),
        principal=event.principal,
        credential=event.credential,
        action=event.action,
        target=event.target,
        server=event.server or None,
        server_name=event.server_name or None,
        outcome=event.outcome,
        address=event.address,
        request_id=event.request_id,
    )


OPERATIONS = (
    Operation(
        "GET",
        "/events",
        list_events,
        action="events.list",
        access=Access.ADMIN,
        summary="List the audit trail, newest first",
        query=PageQuery,
        answers={200: EventList},
    ),
)
