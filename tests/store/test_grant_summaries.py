"""Grants in pages: filtered, in order, without their secrets, and only as they were sealed."""

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grant_summaries import GrantFilter, GrantState, GrantSummaries, GrantSummary, page_query
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.sqlite.indexes import INDEXES
from store.builders import NOW, flow, grant, store_settings


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = await open_store(store_settings(tmp_path))
    yield engine
    await engine.close()


async def add(engine: Engine, *accounts: Account) -> None:
    for account in accounts:
        given = grant(account.server)
        await Grants(engine).add(replace(given, key=replace(given.key, account=account)))


async def accounts(engine: Engine, count: int = 100, **wanted: Any) -> list[Account]:
    """Return the accounts of all pages."""
    found: list[GrantSummary] = []
    after: int | None = 0
    while after is not None:
        page, after = await GrantSummaries(engine).page(GrantFilter(**wanted), after=after, count=count, now=NOW)
        assert len(page) <= count
        found += page
    return [summary.key.account for summary in found]


THREE = [Account("ada", "a"), Account("ben", "a"), Account("ada", "b")]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_pages_have_every_grant_once_in_order(engine: Engine, count: int) -> None:
    await add(engine, *THREE)
    assert await accounts(engine, count) == THREE


async def test_grants_are_found_by_owner_and_server(engine: Engine) -> None:
    await add(engine, *THREE)
    assert await accounts(engine, principal="ada") == [THREE[0], THREE[2]]
    assert await accounts(engine, server="a") == THREE[:2]
    assert await accounts(engine, principal="ben", server="b") == []


async def test_a_project_has_the_grants_of_its_principals_and_its_shared_ones(engine: Engine) -> None:
    shared, others, local = Account("project:one", "a"), Account("project:two", "a"), Account(LOCAL, "c")
    await add(engine, *THREE, shared, others, local)
    async with engine.transaction() as transaction:
        for name, project in (("ada", "one"), ("ben", "default")):
            await transaction.execute(
                "INSERT INTO principals (uid, id, project_id, name, role, status, listed, created_at, seal)"
                " VALUES (:id, :id, :project, :id, 'member', 'active', 1, 0, 'x')",
                {"id": name, "project": project},
            )
    assert await accounts(engine, project="one") == [THREE[0], THREE[2], shared]
    assert await accounts(engine, project="default") == [THREE[1], local]
    assert await accounts(engine, project="none") == []


async def test_a_summary_has_no_secret_and_a_changed_row_is_missing(engine: Engine, tmp_path: Path) -> None:
    await add(engine, *THREE)
    summaries = GrantSummaries(engine)
    assert "canary" not in repr(await summaries.of_principal("ada"))
    with sqlite3.connect(tmp_path / "store.db") as other:
        other.execute("UPDATE grants SET principal = 'eve' WHERE principal = 'ben'")
    assert await accounts(engine, principal="eve") == await accounts(engine, principal="ben") == []
    assert await accounts(engine, count=1) == [THREE[0], THREE[2]]
    assert await summaries.get(2) is None


async def test_a_view_passes_no_grant_off_as_another_owners(engine: Engine, tmp_path: Path) -> None:
    await add(engine, *THREE)
    with sqlite3.connect(tmp_path / "store.db") as other:
        other.execute("ALTER TABLE grants RENAME TO real")
        columns = ", ".join(row[1] for row in other.execute("PRAGMA table_info(real)"))
        other.execute(f"CREATE VIEW grants AS SELECT {columns} FROM real UNION ALL SELECT {columns} FROM real")
        other.execute("DROP VIEW grants")
        swapped = columns.replace("principal", "'eve' AS principal")
        other.execute(f"CREATE VIEW grants AS SELECT {swapped} FROM real")
    assert await accounts(engine, principal="eve") == []


async def test_the_accounts_that_wait_for_their_user_are_found(engine: Engine) -> None:
    flows, summaries = Flows(engine), GrantSummaries(engine)
    await flows.save(flow())
    await flows.save(flow("flow-2", "notes", at=NOW - 10_000))
    assert await summaries.authorizing(LOCAL, NOW) == [(Account(LOCAL, "linear"), NOW)]
    assert await summaries.authorizing("ada", NOW) == []


BY_STATE = {
    GrantState.ACTIVE: "grants_renewable",
    GrantState.EXPIRED: "grants_renewable",
    GrantState.DEGRADED: "grants_not_renewable",
    GrantState.ENDED: "grants_not_renewable",
}
OWN = "grants_by_principal_and_server (principal=? AND server=? AND id>?)"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (GrantFilter(project="default"), "USING INTEGER PRIMARY KEY (rowid>?)"),
        (GrantFilter(project="default", server="a"), "USING INDEX grants_by_server (server=? AND id>?)"),
        (GrantFilter(principal="ada"), "USING INDEX grants_by_principal (principal=? AND id>?)"),
        (GrantFilter(principal="ada", server="a"), f"USING INDEX {OWN}"),
        *((GrantFilter(principal="ada", server="a", state=state), f"USING INDEX {OWN}") for state in GrantState),
        *(
            (GrantFilter(project="default", server=server, state=state), f"USING INDEX {index} (id>?)")
            for state, index in BY_STATE.items()
            for server in (None, "a")
        ),
    ],
)
async def test_no_filter_reads_all_rows_or_sorts_them(engine: Engine, wanted: GrantFilter, expected: str) -> None:
    names = {row["name"] for row in await engine.fetch_all("SELECT name FROM sqlite_master", {})}
    sql, values = page_query(wanted, now=NOW)
    async with engine.transaction() as transaction:
        for statement in () if "grants_renewable" in names else INDEXES:
            await transaction.execute(statement, {})
    plan = await engine.fetch_all(f"EXPLAIN QUERY PLAN {sql}", {**values, "after": 0, "count": 51})
    assert plan[0]["detail"] == f"SEARCH grants {expected}"
    assert not any("TEMP B-TREE" in row["detail"] for row in plan)
