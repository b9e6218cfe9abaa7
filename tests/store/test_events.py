"""The audit trail: newest first, in pages, sealed, and bounded."""

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.store import Engine, events, open_store
from mcp_auth_proxy.store.events import KEPT_SECONDS, PRUNE_EVERY, Event, Events
from store.builders import NOW, store_settings

EVENT = Event(
    at=NOW,
    principal="prn_1",
    credential="key:1",
    action="grants.delete",
    target="7",
    outcome="ok",
    address="192.0.2.1",
    request_id="r",
)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    engine = await open_store(store_settings(tmp_path))
    yield engine
    await engine.close()


async def targets(engine: Engine, project: str = "default", count: int = 2) -> list[str]:
    found: list[Event] = []
    before: int | None = None
    while True:
        page, before = await Events(engine).page(project, before=before, count=count)
        found += page
        if before is None:
            return [event.target for event in found]


async def test_events_are_listed_newest_first_in_pages(engine: Engine) -> None:
    for number in range(5):
        await Events(engine).add(replace(EVENT, target=str(number)))
    await Events(engine).add(replace(EVENT, target="elsewhere", project_id="other"))
    for count in range(1, 7):
        assert await targets(engine, count=count) == ["4", "3", "2", "1", "0"]
    assert await targets(engine, "other") == ["elsewhere"]
    (found,), before = await Events(engine).page("other", before=None, count=1)
    assert (replace(found, id=0), before) == (replace(EVENT, target="elsewhere", project_id="other"), None)


async def test_events_of_one_principal_are_listed_alone(engine: Engine) -> None:
    assert await Events(engine).newest() == 0
    for number in range(4):
        who = "even" if number % 2 == 0 else "odd"
        await Events(engine).add(replace(EVENT, target=str(number), principal=who))
    for count in (1, 2, 5):
        found, before = await Events(engine).page(EVENT.project_id, before=None, count=count, principal="even")
        assert [event.target for event in found] == ["2", "0"][:count]
        assert (before is None) is (count > 1)
    assert await Events(engine).newest() == 4


@pytest.mark.parametrize("column", ["at", "principal", "action", "target", "outcome", "address", "credential"])
async def test_a_changed_event_is_missing_and_the_pages_go_on(engine: Engine, tmp_path: Path, column: str) -> None:
    for number in range(5):
        await Events(engine).add(replace(EVENT, target=str(number)))
    with sqlite3.connect(tmp_path / "store.db") as other:
        other.execute(f"UPDATE events SET {column} = '1.0' WHERE target = '3'")
    assert await targets(engine, count=1) == ["4", "2", "1", "0"]


async def test_old_events_are_deleted_and_so_are_those_beyond_the_number(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEPT_EVENTS", PRUNE_EVERY - 10)
    trail = Events(engine)
    for number in range(PRUNE_EVERY - 1):
        old = number in (50, 51)
        await trail.add(replace(EVENT, target=str(number), at=NOW - 2 * KEPT_SECONDS if old else NOW))
    await trail.add(replace(EVENT, target="last"))
    kept = [*(str(number) for number in range(10, PRUNE_EVERY - 1) if number not in (50, 51)), "last"]
    assert await targets(engine, count=200) == kept[::-1]
