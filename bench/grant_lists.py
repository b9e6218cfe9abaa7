"""The API's list of grants, as a client sees it: how long one page takes, by filter, over many grants."""

import http.client
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import cast

from bench.contenders import Endpoint
from bench.measures import UnexpectedResponse
from bench.workloads import JSON
from mcp_auth_proxy.models import (
    Account,
    ClientAuth,
    Endpoints,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.engine import Transaction
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.sqlite.indexes import INDEXES

PAGE = 50
BATCH = 5_000
"""Grants that are stored in one transaction."""

CALLS = 11
"""Calls for each filter. Of all filters they stay below the limit of the API, 200 at once."""

RARE = 20
"""Grants at the end that have expired, and as many that have ended: whoever looks for them passes all others."""

FILTERS = (
    "",
    f"server={JSON.key}",
    "server=no-such-server",
    "principal=caller-7",
    f"principal=caller-7&server={JSON.key}",
    "state=active",
    "state=degraded",
    "state=expired",
    "state=ended",
    f"server={JSON.key}&state=expired",
    f"server={JSON.key}&state=degraded",
    f"principal=caller-7&server={JSON.key}&state=expired",
)
"""Among them are those that match no grant at all."""


class _Joined:
    """An engine whose transactions are parts of one: 100,000 of their own would each wait for the disk."""

    def __init__(self, engine: Engine, transaction: Transaction) -> None:
        self._engine = engine
        self._transaction = transaction

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        yield self._transaction


async def add_grants(engine: Engine, count: int, principals: int) -> None:
    """Store grants of one server, of all principals in turn."""
    for start in range(0, count, BATCH):
        async with engine.transaction() as transaction:
            store = Grants(cast(Engine, _Joined(engine, transaction)))
            await _add_batch(store, range(start, min(count, start + BATCH)), count, principals)


async def _add_batch(store: Grants, numbers: range, count: int, principals: int) -> None:
    now = time.time()
    for number in numbers:
        account = Account(f"prn_{number % principals:024x}", JSON.key, f"a{number // principals}")
        left = count - number
        given = _grant(account, now, expires_at=now - 1 if left <= RARE else now + 36_000)
        stored = await store.add(given)
        if RARE < left <= 2 * RARE:
            await store.end(stored.id, version=stored.version, reason="invalid_grant", now=now)


def add_indexes(store: Path) -> None:
    """Add the indexes that the schema does not have yet."""
    with sqlite3.connect(store) as database:
        names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        for statement in () if "grants_renewable" in names else INDEXES:
            database.execute(statement)
    database.close()


def page_seconds(endpoint: Endpoint) -> dict[str, float]:
    """Return how long a page takes an admin, by filter: the median of calls that follow the list from page to page."""
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=30)
    try:
        # The first call imports the API.
        _page(connection, endpoint, "", "")
        return {filters: _median(connection, endpoint, filters) for filters in FILTERS}
    finally:
        connection.close()


def _median(connection: http.client.HTTPConnection, endpoint: Endpoint, filters: str) -> float:
    token, found = "", []
    for _ in range(CALLS):
        begun = time.perf_counter()
        token = _page(connection, endpoint, filters, token)
        found.append(time.perf_counter() - begun)
    return median(found)


def _page(connection: http.client.HTTPConnection, endpoint: Endpoint, filters: str, token: str) -> str:
    """Return the token of the next page, empty after the last one."""
    query = f"page_size={PAGE}&page_token={token}" + (f"&{filters}" if filters else "")
    connection.request("GET", f"/api/v1/grants?{query}", headers=dict(endpoint.headers))
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise UnexpectedResponse(f"GET /grants: {response.status} {body[:300].decode(errors='replace')}")
    next_token: str = json.loads(body)["page"]["next_page_token"] or ""
    return next_token


def _grant(account: Account, now: float, *, expires_at: float) -> Grant:
    registration = Registration(
        server=account.server,
        account=account.name,
        issuer="https://as.bench",
        client_id="bench",
        client_auth=ClientAuth.NONE,
        kind=RegistrationKind.DYNAMIC,
    )
    tokens = TokenSet(access_token="a" * 200, refresh_token="r" * 200, obtained_at=now, expires_at=expires_at)
    return Grant(
        key=GrantKey(account=account, resource="http://127.0.0.1", issuer="https://as.bench"),
        grant_type=GrantType.AUTHORIZATION_CODE,
        registration=registration,
        endpoints=Endpoints(token="https://as.bench/token"),
        tokens=tokens,
        scopes=("read",),
        granted_at=now,
    )
