"""The sessions that the proxy began itself, as rows of the store."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import Engine, mcp_sessions, open_store
from mcp_auth_proxy.store.mcp_sessions import KEPT_SESSIONS, McpSessions, SessionState
from store.builders import NOW, store_settings

ACCOUNT = Account("local", "notes")
URL = "https://notes.example/mcp"
STATE = SessionState(initialize=b'{"canary":"client"}', announced="2025-11-25")


@pytest.fixture
async def sessions(engine: Engine) -> McpSessions:
    return McpSessions(engine)


async def test_a_session_is_found_by_its_id_account_and_server_only(sessions: McpSessions) -> None:
    await sessions.add("map-1", ACCOUNT, STATE, upstream=URL, now=NOW)
    assert await sessions.find("map-1", ACCOUNT, upstream=URL) == STATE
    assert await sessions.find("map-2", ACCOUNT, upstream=URL) is None
    assert await sessions.find("map-1", Account("other", "notes"), upstream=URL) is None
    assert await sessions.find("map-1", ACCOUNT, upstream="https://other.example/mcp") is None


async def test_a_change_is_made_to_what_is_stored(sessions: McpSessions) -> None:
    await sessions.add("map-1", ACCOUNT, STATE, upstream=URL, now=NOW)
    opened = replace(STATE, opened=True, upstream_id="canary-id", negotiated="2025-06-18", lists=("tools",))
    assert await sessions.change("map-1", ACCOUNT, lambda _: opened, now=NOW) == opened
    changed = await sessions.change("map-1", ACCOUNT, lambda before: replace(before, log_level="debug"), now=NOW)
    assert changed == replace(opened, log_level="debug") == await sessions.find("map-1", ACCOUNT, upstream=URL)
    assert await sessions.change("map-1", Account("other", "notes"), lambda _: STATE, now=NOW) is None


async def test_a_session_that_has_ended_is_not_changed(sessions: McpSessions) -> None:
    await sessions.add("map-1", ACCOUNT, STATE, upstream=URL, now=NOW)
    await sessions.end("map-1")
    assert await sessions.change("map-1", ACCOUNT, lambda state: state, now=NOW) is None
    assert await sessions.find("map-1", ACCOUNT, upstream=URL) is None


async def test_the_sessions_that_were_used_last_are_kept(sessions: McpSessions) -> None:
    for number in range(KEPT_SESSIONS + 1):
        await sessions.add(f"map-{number}", ACCOUNT, STATE, upstream=URL, now=NOW + number)
    assert await sessions.find("map-0", ACCOUNT, upstream=URL) is None
    assert await sessions.find("map-1", ACCOUNT, upstream=URL) == STATE


async def test_a_changed_row_counts_as_missing_and_nothing_is_in_clear(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    engine = await open_store(settings)
    sessions = McpSessions(engine)
    await sessions.add("map-canary", ACCOUNT, replace(STATE, upstream_id="canary-id"), upstream=URL, now=NOW)
    await engine.close()
    assert b"canary" not in b"".join(path.read_bytes() for path in tmp_path.glob("*.db*"))
    with sqlite3.connect(settings.path) as connection:
        connection.execute("UPDATE mcp_sessions SET principal = 'thief'")
    connection.close()
    engine = await open_store(settings)
    found = await McpSessions(engine).find("map-canary", Account("thief", "notes"), upstream=URL)
    await engine.close()
    assert found is None


async def test_the_sessions_of_a_principal_are_bounded_and_no_other_loses_one(
    engine: Engine, sessions: McpSessions, monkeypatch: pytest.MonkeyPatch
) -> None:  # T90
    monkeypatch.setattr(mcp_sessions, "KEPT_OF_PRINCIPAL", 10)
    await sessions.add("map-other", Account("other", "notes"), STATE, upstream=URL, now=NOW - 1)
    for number in range(20):
        await sessions.add(f"map-{number}", Account("local", "notes", f"a{number}"), STATE, upstream=URL, now=NOW)
    rows = await engine.fetch_all("SELECT principal FROM mcp_sessions", {})
    found = sorted(row["principal"] for row in rows)
    assert found.count("local") in (10, 11)
    assert found[-1] == "other"
    assert await sessions.find("map-19", Account("local", "notes", "a19"), upstream=URL) == STATE


async def test_all_sessions_together_are_bounded(
    engine: Engine, sessions: McpSessions, monkeypatch: pytest.MonkeyPatch
) -> None:  # T90
    monkeypatch.setattr(mcp_sessions, "KEPT_IN_ALL", 10)
    for number in range(20):
        await sessions.add(f"map-{number}", Account(f"p{number}", "notes"), STATE, upstream=URL, now=NOW + number)
    assert len(await engine.fetch_all("SELECT uid FROM mcp_sessions", {})) in (10, 11)
    assert await sessions.find("map-19", Account("p19", "notes"), upstream=URL) == STATE
