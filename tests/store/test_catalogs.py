"""What is remembered of servers: sealed rows, bounded in size and number."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.models import LOCAL, Account, Catalog
from mcp_auth_proxy.store import Engine, catalogs
from mcp_auth_proxy.store.catalogs import MAX_CONTENT, Catalogs, size_of
from mcp_auth_proxy.store.servers import Servers
from store.builders import NOW

LINEAR = Account(LOCAL, "linear")
URL = "https://linear.example/mcp"
CANARY = "canary-of-a-tool"
CATALOG = Catalog(
    initialize={"2025-11-25": {"protocolVersion": "2025-11-25", "instructions": CANARY}},
    discover={"supportedVersions": ["2026-07-28"]},
    lists={"tools": [{"name": CANARY, "inputSchema": {"type": "object"}}], "prompts": []},
    fetched_at=NOW,
)


def change(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / "store.db")) as other, other:
        other.executescript(sql)


async def test_a_catalog_is_remembered_for_its_account_and_upstream(engine: Engine) -> None:
    stored = Catalogs(engine)
    assert await stored.put(LINEAR, CATALOG, upstream=URL) == CATALOG
    assert await stored.get(LINEAR, upstream=URL) == CATALOG
    for other in (Account(LOCAL, "linear", "work"), Account("prn_1", "linear"), Account(LOCAL, "notes")):
        assert await stored.get(other, upstream=URL) is None
    assert await stored.get(LINEAR, upstream="https://elsewhere.example/mcp") is None


async def test_a_newer_catalog_replaces_the_one_before(engine: Engine) -> None:
    stored, newer = Catalogs(engine), replace(CATALOG, lists={}, fetched_at=NOW + 1)
    await stored.put(LINEAR, CATALOG, upstream=URL)
    await stored.put(LINEAR, newer, upstream=f"{URL}2")
    assert await stored.get(LINEAR, upstream=URL) is None
    assert await stored.get(LINEAR, upstream=f"{URL}2") == newer
    assert await stored.tool_counts() == {}


async def test_tools_are_counted_without_reading_the_catalogs(engine: Engine) -> None:
    stored, work = Catalogs(engine), Account(LOCAL, "linear", "work")
    await stored.put(LINEAR, CATALOG, upstream=URL)
    await stored.put(work, replace(CATALOG, lists={"tools": [{}, {}, {}]}), upstream=URL)
    await stored.put(Account("prn_1", "notes"), replace(CATALOG, lists={}), upstream=URL)
    assert await stored.tool_counts() == {(LINEAR, URL): 1, (work, URL): 3}


LARGE = [{"name": "x" * 1000}] * 150


@pytest.mark.parametrize(
    ("lists", "kept"),
    [
        ({"tools": LARGE, "prompts": [], "resources": LARGE}, {"tools", "prompts"}),
        ({"tools": LARGE, "resourceTemplates": LARGE, "resources": []}, {"tools", "resources"}),
        ({"tools": [*LARGE, *LARGE], "prompts": LARGE}, set()),
    ],
)
async def test_what_does_not_fit_is_left_out(engine: Engine, lists: Mapping[str, Any], kept: set[str]) -> None:
    stored = await Catalogs(engine).put(LINEAR, replace(CATALOG, lists=lists), upstream=URL)
    assert stored == replace(CATALOG, lists={name: lists[name] for name in kept})
    assert stored == await Catalogs(engine).get(LINEAR, upstream=URL)
    assert size_of(stored) <= MAX_CONTENT


async def test_of_answers_that_are_too_long_nothing_is_kept(engine: Engine) -> None:
    long = replace(CATALOG, initialize={"2025-11-25": {"instructions": "x" * MAX_CONTENT}})
    await Catalogs(engine).put(LINEAR, long, upstream=URL)
    assert await Catalogs(engine).get(LINEAR, upstream=URL) == Catalog(fetched_at=NOW)


async def test_the_number_of_catalogs_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogs, "KEPT_OF_PRINCIPAL", 2)
    monkeypatch.setattr(catalogs, "KEPT_CATALOGS", 3)
    stored = Catalogs(engine)
    accounts = [Account("greedy", "linear", f"a{number}") for number in range(4)]
    others = [Account(f"prn_{number}", "linear") for number in range(2)]
    await stored.put(others[0], replace(CATALOG, fetched_at=NOW - 10), upstream=URL)
    for number, account in enumerate(accounts):
        await stored.put(account, replace(CATALOG, fetched_at=NOW + number), upstream=URL)
    assert {account for account, _ in await stored.tool_counts()} == {others[0], *accounts[2:]}
    # What was just written stays, also if its time is the oldest.
    await stored.put(others[1], replace(CATALOG, fetched_at=0.0), upstream=URL)
    assert {account for account, _ in await stored.tool_counts()} == {others[1], *accounts[2:]}


@pytest.mark.sqlite
async def test_nothing_of_a_catalog_is_in_clear(engine: Engine, tmp_path: Path) -> None:
    # T76
    await Catalogs(engine).put(LINEAR, CATALOG, upstream=URL)
    files = list(tmp_path.glob("store.db*"))
    assert files
    for file in files:
        assert CANARY.encode() not in file.read_bytes()


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE catalogs SET content = (SELECT content FROM catalogs WHERE server = 'notes') WHERE server = 'linear'",
        "UPDATE catalogs SET tools = 9 WHERE server = 'linear'",
        "UPDATE catalogs SET fetched_at = 9e12 WHERE server = 'linear'",
        "DELETE FROM catalogs WHERE server = 'linear'; UPDATE catalogs SET server = 'linear'",
        "DELETE FROM catalogs WHERE server = 'linear'; UPDATE catalogs SET principal = 'prn_1', server = 'linear'",
    ],
)
async def test_a_changed_row_is_missing(engine: Engine, tmp_path: Path, sql: str) -> None:
    stored, notes = Catalogs(engine), Account(LOCAL, "notes")
    await stored.put(LINEAR, CATALOG, upstream=URL)
    await stored.put(notes, replace(CATALOG, lists={"tools": []}), upstream=URL)
    change(tmp_path, sql)
    assert await stored.get(LINEAR, upstream=URL) is None
    assert (LINEAR, URL) not in await stored.tool_counts()


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "column", ["principal", "account", "server", "upstream", "content", "tools", "fetched_at", "seal", "uid"]
)
async def test_a_row_with_any_changed_column_is_missing(engine: Engine, tmp_path: Path, column: str) -> None:
    stored = Catalogs(engine)
    await stored.put(LINEAR, CATALOG, upstream=URL)
    change(tmp_path, f"UPDATE catalogs SET {column} = 7")
    assert await stored.get(LINEAR, upstream=URL) is None
    assert await stored.tool_counts() == {}


@pytest.mark.sqlite
async def test_no_view_passes_one_row_off_as_another(engine: Engine, tmp_path: Path) -> None:
    await Catalogs(engine).put(Account("victim", "linear"), CATALOG, upstream=URL)
    change(
        tmp_path,
        "ALTER TABLE catalogs RENAME TO kept; CREATE VIEW catalogs AS SELECT uid, 'local' AS principal, account,"
        " server, upstream, content, tools, fetched_at, seal FROM kept;",
    )
    assert await Catalogs(engine).get(LINEAR, upstream=URL) is None


async def test_a_deleted_server_leaves_no_catalog(engine: Engine) -> None:
    await Catalogs(engine).put(LINEAR, CATALOG, upstream=URL)
    await Servers(engine).forget("linear")
    assert await Catalogs(engine).tool_counts() == {}
