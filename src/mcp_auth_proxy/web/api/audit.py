"""The audit trail of the API: each call that may change something leaves an event, also if it was refused."""

import logging
import re
import secrets
from collections.abc import Iterable
from typing import Any

from mcp_auth_proxy.errors import StoreError, excerpt
from mcp_auth_proxy.observability.trace import trace_id_of
from mcp_auth_proxy.store.events import Event, Events
from mcp_auth_proxy.web.api.operations import Call

logger = logging.getLogger(__name__)

OK = "ok"

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that a client gave its request (X-Request-Id, else the trace id), else a new one."""
    fields = list(headers)
    given = [value for name, value in fields if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return trace_id_of(fields) or secrets.token_hex(16)


async def record(call: Call[Any, Any], outcome: str) -> None:
    """Store the event of a call; a store that fails is logged: what was done can't be taken back."""
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
    try:
        await Events(call.api.database).add(event)
    except StoreError as error:
        logger.error("no audit event for %s by %s: %s", event.action, event.principal, error)
