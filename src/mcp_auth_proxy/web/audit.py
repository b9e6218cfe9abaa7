"""The audit trail: what pages do leaves an event, as what the API does (``web.api.audit``)."""

import logging
import re
import secrets
from collections.abc import Callable, Iterable

from starlette.requests import Request

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import StoreError, excerpt
from mcp_auth_proxy.models import DEFAULT_PROJECT, Caller
from mcp_auth_proxy.observability.trace import trace_id_of
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.events import OK, Event, Events
from mcp_auth_proxy.web.api.limits import Rate, RateLimit

SIGN_IN = "sessions.create"
SIGN_OUT = "sessions.delete"
START = "flows.create"
CONFIRM = "consents.confirm"
CONSENT = "consents.give"
REFUSE = "consents.refuse"

FAILURES_OF_ADDRESS = Rate(10, 1 / 60)
FAILURES = Rate(100, 1 / 6)
"""Failures that leave an event: whoever makes more must not push the others out of the trail, which is bounded."""

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that a client gave its request (X-Request-Id, else the trace id), else a new one."""
    fields = list(headers)
    given = [value for name, value in fields if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode("ascii")
    return trace_id_of(fields) or secrets.token_hex(16)


async def store(database: Engine, event: Event) -> None:
    """Store an event; a store that fails is logged: what was done can't be taken back."""
    try:
        await Events(database).add(event)
    except StoreError as error:
        logger.error("no audit event for %s by %s: %s", event.action, event.principal, error)


class PageAudit:
    """Store the events of pages. ``clock`` returns Unix seconds."""

    def __init__(self, database: Engine, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._of_address = RateLimit(FAILURES_OF_ADDRESS, clock=clock)
        self._of_all = RateLimit(FAILURES, clock=clock)

    async def record(
        self,
        request: Request,
        caller: Caller | None,
        action: str,
        outcome: str = OK,
        *,
        target: str = "",
        server: ServerSettings | None = None,
    ) -> None:
        """Store an event. ``caller``: None if it is not known who it is.

        If it concerns a server, those see it who see the server, whoever has caused it.
        """
        address = request.client.host if request.client is not None else ""
        if outcome != OK and (self._of_address.take(address) or self._of_all.take("")):
            return
        project = caller.principal.project_id if caller is not None else DEFAULT_PROJECT
        event = Event(
            at=self._clock(),
            project_id=server.project if server is not None else project,
            principal=caller.principal.id if caller is not None else "",
            credential=caller.credential if caller is not None else "",
            action=action,
            target=excerpt(target),
            server=server.server_id if server is not None else "",
            server_name=server.name if server is not None else "",
            outcome=outcome,
            address=address,
            request_id=request_id_of(request.headers.raw),
        )
        await store(self._database, event)
