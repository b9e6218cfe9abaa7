"""The audit trail of the API: each call that may change something leaves an event, also if it was refused."""

from typing import Any

from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.store.events import OK, Event
from mcp_auth_proxy.web.api.operations import Call
from mcp_auth_proxy.web.audit import request_id_of, store

__all__ = ["OK", "record", "request_id_of"]


async def record(call: Call[Any, Any], outcome: str) -> None:
    """Store the event of a call."""
    event = Event(
        at=call.api.clock(),
        project_id=call.caller.principal.project_id,
        principal=call.caller.principal.id,
        credential=call.caller.credential,
        action=call.operation.action,
        target=excerpt(call.target or next(iter(call.path.values()), "")),
        server=call.server[0],
        server_name=call.server[1],
        outcome=outcome,
        address=call.address,
        request_id=call.request_id,
    )
    await store(call.api.database, event)
