"""Grants without their secrets, for lists: in pages, filtered by SQL, and only the rows of the page are unsealed."""

from dataclasses import dataclass
from enum import StrEnum

from mcp_auth_proxy.models import (
    DEFAULT_PROJECT,
    LOCAL,
    Account,
    FlowStatus,
    Grant,
    GrantKey,
    GrantType,
    RenewalHealth,
    shared_principal,
)
from mcp_auth_proxy.store.codec import read_health
from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import Columns, RowCipher, decode_rows

_TABLE = "grants"
_REPEATED = ", ".join(f"'{kind}'" for kind in GrantType if kind.unattended)
_REPEATABLE = f"grant_type IN ({_REPEATED})"
_RENEWABLE = f"(refresh_token IS NOT NULL OR {_REPEATABLE})"
_DEAD = "(expires_at IS NOT NULL AND expires_at <= :now)"
_NOT_RENEWED = (
    "(ended_at IS NOT NULL OR refresh_token IS NULL OR renewal_refused_at IS NOT NULL OR rejected_since IS NOT NULL)"
)
"""True in both states that it stands in; it is the condition of an index."""
_CANNOT_RENEW = f"(refresh_token IS NULL AND NOT {_REPEATABLE})"
_UNDER_WAY = "(refresh_begun_at IS NOT NULL OR failing_since IS NOT NULL)"
"""A renewal is under way, or will be tried again."""
_REFUSED = "(renewal_refused_at IS NOT NULL OR rejected_since IS NOT NULL)"

_BY_ID = "SELECT * FROM grants WHERE id = :id"
_PAGE = "SELECT * FROM grants WHERE {conditions} ORDER BY id LIMIT :count"
_OF_PRINCIPAL = "SELECT * FROM grants WHERE principal = :principal ORDER BY id"
_OF_PROJECT = """
    ((principal || '') IN (SELECT id FROM principals WHERE project_id = :project)
        OR principal = :shared OR (principal = :local AND :project = :default_project))
"""
"""The ``||`` (see ``page_query``) because SQLite would look up the grants of each principal, and sort all of them."""
_WAITING = """
    SELECT * FROM flows WHERE principal = :principal AND status = :status AND expires_at > :now ORDER BY created_at
"""


class GrantState(StrEnum):
    """Whether a grant can be used, now and later."""

    ACTIVE = "active"
    DEGRADED = "degraded"
    """The token is good, and can't be renewed."""
    EXPIRED = "expired"
    """The token is dead, and will be renewed when it is needed."""
    ENDED = "ended"
    """Only a person can mend it."""


_STATES = {
    GrantState.ACTIVE: f"ended_at IS NULL AND {_RENEWABLE}"
    f" AND ((NOT {_DEAD} AND NOT {_REFUSED}) OR ({_DEAD} AND {_UNDER_WAY}))",
    GrantState.DEGRADED: f"{_NOT_RENEWED} AND ended_at IS NULL AND ({_REFUSED} OR {_CANNOT_RENEW}) AND NOT {_DEAD}",
    GrantState.EXPIRED: f"ended_at IS NULL AND {_RENEWABLE} AND {_DEAD} AND NOT {_UNDER_WAY}",
    GrantState.ENDED: f"{_NOT_RENEWED} AND (ended_at IS NOT NULL OR ({_CANNOT_RENEW} AND {_DEAD}))",
}
"""The same rules as in ``broker.states``. Each begins with the condition of its index (``store.sqlite.indexes``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantSummary:
    """A grant without its secrets. Times are Unix seconds."""

    id: int
    key: GrantKey
    grant_type: GrantType
    token_type: str
    scopes: tuple[str, ...]
    """Those that were granted."""
    granted_at: float
    expires_at: float | None
    has_refresh_token: bool
    refresh_begun_at: float | None
    ended_at: float | None
    ended_reason: str
    label: str
    oauth_client: str | None
    obtained_at: float
    refresh_expires_at: float | None
    health: RenewalHealth

    @classmethod
    def of(cls, grant: Grant) -> "GrantSummary":
        """Return the summary of a grant."""
        return cls(
            id=grant.id,
            key=grant.key,
            grant_type=grant.grant_type,
            token_type=grant.tokens.token_type,
            scopes=grant.tokens.scopes,
            granted_at=grant.granted_at,
            expires_at=grant.tokens.expires_at,
            has_refresh_token=grant.tokens.refresh_token is not None,
            refresh_begun_at=grant.refresh_begun_at,
            ended_at=grant.ended_at,
            ended_reason=grant.ended_reason,
            label=grant.label,
            oauth_client=grant.registration.oauth_client,
            obtained_at=grant.tokens.obtained_at,
            refresh_expires_at=grant.tokens.refresh_expires_at,
            health=grant.health,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantFilter:
    """Which grants to list. What is None or empty does not matter."""

    principal: str | None = None
    """The owner, as in accounts."""
    project: str | None = None
    """The project of the owners: of its principals, and of what it shares."""
    server: str | None = None
    """The name of the server."""
    state: GrantState | None = None


class GrantSummaries:
    """Read summaries. Every method raises StoreUnavailable if the store can't be used now.

    A row that was changed in the store is left out.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, grant_id: int) -> GrantSummary | None:
        """Return a grant, ended or not; None if it is gone."""
        asked: Columns = {"id": grant_id}
        return next(iter(await self._read(await self._engine.fetch_all(_BY_ID, asked), asked)), None)

    async def of_principal(self, principal: str) -> list[GrantSummary]:
        """Return all grants of an owner, the oldest first."""
        asked: Columns = {"principal": principal}
        return await self._read(await self._engine.fetch_all(_OF_PRINCIPAL, asked), asked)

    async def page(
        self, wanted: GrantFilter, *, after: int, count: int, now: float
    ) -> tuple[list[GrantSummary], int | None]:
        """Return up to ``count`` grants by id, and what ``after`` is for the next page, if there is one."""
        given = {"principal": wanted.principal, "server": wanted.server}
        asked: Columns = {name: value for name, value in given.items() if value is not None}
        sql, values = page_query(wanted, now=now)
        rows = await self._engine.fetch_all(sql, {**values, "after": after, "count": count + 1})
        return await self._read(rows[:count], asked), rows[count - 1]["id"] if len(rows) > count else None

    async def authorizing(self, principal: str, now: float) -> list[tuple[Account, float]]:
        """Return the accounts of an owner for which an authorization waits, with the time when it began."""
        asked: Columns = {"principal": principal, "status": str(FlowStatus.PENDING)}
        rows = await self._engine.fetch_all(_WAITING, {**asked, "now": now})
        return await decode_rows(self._engine, "flows", rows, asked, _read_waiting)

    async def _read(self, rows: list[Row], asked: Columns) -> list[GrantSummary]:
        return await decode_rows(self._engine, _TABLE, rows, asked, _read_summary)


def page_query(wanted: GrantFilter, *, now: float) -> tuple[str, Columns]:
    """Return the statement for a page, and its values without ``after`` and ``count``.

    A plus keeps SQLite from using the index of a column.
    """
    conditions, values = ["id > :after"], Columns()
    if wanted.principal is not None:
        conditions.append("principal = :principal")
        values["principal"] = wanted.principal
    if wanted.server is not None:
        # One server may have all grants, and its index does not tell their states.
        by_state = wanted.state is not None and wanted.principal is None
        conditions.append("+server = :server" if by_state else "server = :server")
        values["server"] = wanted.server
    if wanted.state is not None:
        conditions.append(_STATES[wanted.state])
        values |= {"now": now} if ":now" in conditions[-1] else {}
    if wanted.project is not None:
        # Last: it is what costs most for a row.
        conditions.append(_OF_PROJECT)
        values |= {"project": wanted.project, "shared": shared_principal(wanted.project)}
        values |= {"local": LOCAL, "default_project": DEFAULT_PROJECT}
    return _PAGE.format(conditions=" AND ".join(conditions)), values


def _read_waiting(row: Row, _: RowCipher) -> tuple[Account, float]:
    return Account(row["principal"], row["server"], row["account"]), row["created_at"]


def _read_summary(row: Row, _: RowCipher) -> GrantSummary:
    key = GrantKey(
        account=Account(row["principal"], row["server"], row["account"]),
        resource=row["resource"],
        issuer=row["issuer"],
        upstream=row["upstream"],
        path=row["path"],
    )
    return GrantSummary(
        id=row["id"],
        key=key,
        grant_type=GrantType(row["grant_type"]),
        token_type=row["token_type"],
        scopes=tuple(row["token_scopes"].split()),
        granted_at=row["granted_at"],
        expires_at=row["expires_at"],
        has_refresh_token=row["refresh_token"] is not None,
        refresh_begun_at=row["refresh_begun_at"],
        ended_at=row["ended_at"],
        ended_reason=row["ended_reason"],
        label=row["label"] or "",
        oauth_client=row["oauth_client"],
        obtained_at=row["obtained_at"],
        refresh_expires_at=row["refresh_expires_at"],
        health=read_health(row),
    )
