"""The audit trail: who did what by the API, a page or a command, when, from where, and with what outcome."""

from dataclasses import dataclass

from mcp_auth_proxy.models import DEFAULT_PROJECT
from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, new_uid

OK = "ok"

KEPT_SECONDS = 90 * 86_400.0
"""Seconds after which an event is deleted."""

KEPT_EVENTS = 100_000
"""Events that are kept at most."""

PRUNE_EVERY = 100
"""Events after which old ones are deleted."""

_TABLE = "events"
_ADD = """
    INSERT INTO events (
        uid, at, project_id, principal, credential, action, target, server, server_name, outcome, address, request_id,
        seal
    ) VALUES (
        :uid, :at, :project_id, :principal, :credential, :action, :target, :server, :server_name, :outcome, :address,
        :request_id, :seal
    ) RETURNING id
"""
_PAGE = """
    SELECT * FROM events WHERE project_id = :project_id AND id < :before ORDER BY id DESC LIMIT :count
"""
_PAGE_OF_PRINCIPAL = """
    SELECT * FROM events WHERE project_id = :project_id AND principal = :principal AND id < :before
    ORDER BY id DESC LIMIT :count
"""
_NEWEST = "SELECT max(id) AS id FROM events"
_PRUNE = "DELETE FROM events WHERE id <= :last OR at < :since"
_BEGINNING = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change, or the attempt of one. No text in it is a secret."""

    id: int = 0
    """0 until stored. Later events have higher ids."""
    at: float
    """Unix seconds."""
    project_id: str = DEFAULT_PROJECT
    principal: str
    """The id of the principal; ``local`` for commands, empty if it is not known who it was."""
    credential: str
    """As ``Caller.credential``, or ``command:USER``."""
    action: str
    """RESOURCE.VERB."""
    target: str
    """The id of what was changed; empty if there is none."""
    server: str = ""
    """The id of the server that it concerns, and its name at that time; empty if it concerns none."""
    server_name: str = ""
    outcome: str
    """``ok``, or the kind of the problem."""
    address: str
    request_id: str


class Events:
    """The audit trail in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def add(self, event: Event) -> None:
        """Store an event durably. Now and then, events that are too old or too many are deleted."""
        uid = new_uid()
        columns: Columns = {
            "at": event.at,
            "project_id": event.project_id,
            "principal": event.principal,
            "credential": event.credential,
            "action": event.action,
            "target": event.target,
            "server": event.server,
            "server_name": event.server_name,
            "outcome": event.outcome,
            "address": event.address,
            "request_id": event.request_id,
        }
        seal = RowCipher(self._engine.cipher, _TABLE, uid).seal_row(columns)
        async with self._engine.transaction() as transaction:
            row = await transaction.fetch_one(_ADD, {"uid": uid, **columns, SEAL: seal})
            if row is not None and row["id"] % PRUNE_EVERY == 0:
                limits = {"last": row["id"] - KEPT_EVENTS, "since": event.at - KEPT_SECONDS}
                await transaction.execute(_PRUNE, limits)

    async def newest(self) -> int:
        """Return the id of the newest event; 0 if there is none."""
        row = await self._engine.fetch_one(_NEWEST)
        return 0 if row is None else row["id"] or 0

    async def page(
        self, project_id: str, *, before: int | None, count: int, principal: str | None = None
    ) -> tuple[list[Event], int | None]:
        """Return up to ``count`` events of a project, newest first, and what ``before`` is for the next page, if any.

        ``principal``: the id of the only one whose events are returned. An event that was changed in the store is left
        out.
        """
        asked: Columns = {"project_id": project_id}
        if principal is not None:
            asked["principal"] = principal
        values = {**asked, "before": _BEGINNING if before is None else before, "count": count + 1}
        rows = await self._engine.fetch_all(_PAGE if principal is None else _PAGE_OF_PRINCIPAL, values)
        events = await decode_rows(self._engine, _TABLE, rows[:count], asked, _read)
        return events, rows[count - 1]["id"] if len(rows) > count else None


def _read(row: Row, _: RowCipher) -> Event:
    return Event(
        id=row["id"],
        at=row["at"],
        project_id=row["project_id"],
        principal=row["principal"],
        credential=row["credential"],
        action=row["action"],
        target=row["target"],
        server=row["server"],
        server_name=row["server_name"],
        outcome=row["outcome"],
        address=row["address"],
        request_id=row["request_id"],
    )
