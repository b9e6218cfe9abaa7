"""Find grants whose refresh tokens should be used before they lapse, a page at a time: there may be 100,000 of them."""

from dataclasses import dataclass
from typing import NamedTuple

from mcp_auth_proxy.models import GrantType, OAuthClientStatus, PrincipalStatus
from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import Columns

JITTER = 0.1
"""Share of the time by which a grant may be refreshed earlier: those given together are not all due together."""

LIFETIME_SHARE = 3
"""A grant is refreshed after this part of the lifetime of its refresh token, if its server has told that."""

_REPEATED = ", ".join(f"'{kind}'" for kind in GrantType if kind.repeatable)
# Which grant is due earlier than others follows from its id, so that all processes agree.
_DUE = f"""(obtained_at + (1.0 - {JITTER} * (id % 100) / 100.0) * CASE
    WHEN refresh_expires_at IS NOT NULL AND (refresh_expires_at - obtained_at) / {LIFETIME_SHARE} < :keep_alive
    THEN (refresh_expires_at - obtained_at) / {LIFETIME_SHARE} ELSE :keep_alive END)"""
# The first line is the condition of the index ``grants_by_refresh``, which has what the lines below compare.
_IDLE = """
    ended_at IS NULL AND refresh_token IS NOT NULL
    AND renewal_refused_at IS NULL AND (next_try_at IS NULL OR next_try_at <= :now)
"""
_WANTED = f"""
    grant_type NOT IN ({_REPEATED})
    AND principal NOT IN (SELECT id FROM principals WHERE status = '{PrincipalStatus.DISABLED}')
    AND (oauth_client IS NULL
        OR oauth_client NOT IN (SELECT id FROM oauth_clients WHERE status = '{OAuthClientStatus.REVOKED}'))
"""  # noqa: S608 - texts of our own
_PAGE = f"""
    SELECT id, server, issuer FROM grants WHERE {_IDLE} AND id > :after AND {_DUE} <= :now AND {_WANTED}
    ORDER BY id LIMIT :count
"""  # noqa: S608 - texts of our own
_NEXT = f"SELECT min({_DUE}) AS due FROM grants WHERE {_IDLE} AND {_DUE} > :now"  # noqa: S608 - texts of our own
_UNMENDED = """
    SELECT id FROM grants
    WHERE ended_at IS NULL AND refresh_token IS NOT NULL AND next_try_at IS NOT NULL AND next_try_at <= :now
        AND id > :after AND rejected_since <= :before
    ORDER BY id LIMIT :count
"""


class UnusedGrant(NamedTuple):
    """A grant that is due, as its columns say."""

    id: int
    server: str
    issuer: str


@dataclass(frozen=True, slots=True)
class UnusedGrants:
    """Every method raises StoreUnavailable if the store can't be used now. Nothing here reads a secret or a seal."""

    engine: Engine

    async def due(self, *, keep_alive: float, now: float, after: int, count: int) -> list[UnusedGrant]:
        """Return the next grants by id that have not been refreshed for ``keep_alive`` seconds.

        Or for a third of the lifetime of their refresh token, if that is less. Those of disabled principals and revoked
        clients are left out, and those whose renewal waits for something.
        """
        values: Columns = {"keep_alive": keep_alive, "now": now, "after": after, "count": count}
        rows = await self.engine.fetch_all(_PAGE, values)
        return [UnusedGrant(row["id"], row["server"], row["issuer"]) for row in rows]

    async def next_due(self, *, keep_alive: float, now: float) -> float | None:
        """Return when the next grant will be due, in Unix seconds; None if there is none."""
        rows = await self.engine.fetch_all(_NEXT, {"keep_alive": keep_alive, "now": now})
        due: float | None = rows[0]["due"]
        return due

    async def unmended(self, *, before: float, now: float, after: int, count: int) -> list[int]:
        """Return the ids of grants that a person should have mended since before a time."""
        values: Columns = {"before": before, "now": now, "after": after, "count": count}
        return [_id(row) for row in await self.engine.fetch_all(_UNMENDED, values)]


def _id(row: Row) -> int:
    grant_id: int = row["id"]
    return grant_id
