"""Notes on connections: each process changes what it knows, sealed, and bounded in number."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store import Engine, connection_notes
from mcp_auth_proxy.store.connection_notes import StoredNote, StoredNotes
from mcp_auth_proxy.store.servers import Servers
from store.builders import NOW

LINEAR = Account(LOCAL, "linear")
WORK = Account(LOCAL, "linear", "work")


async def test_fields_are_changed_one_by_one(engine: Engine) -> None:
    notes = StoredNotes(engine)
    await notes.change({LINEAR: {"used_at": NOW}, WORK: {"failure": "It is down.", "failed_at": NOW}})
    await notes.change({LINEAR: {"unreachable_since": NOW + 1, "remedy": "Wait."}})
    assert await notes.all() == {
        LINEAR: StoredNote(used_at=NOW, unreachable_since=NOW + 1, remedy="Wait."),
        WORK: StoredNote(failure="It is down.", failed_at=NOW),
    }
    await notes.change({LINEAR: None, WORK: {"failure": "", "failed_at": None}})
    assert await notes.all() == {WORK: StoredNote()}


COLUMNS = ("principal", "account", "server", "used_at", "unreachable_since", "failed_at", "failure", "remedy", "seal")


@pytest.mark.sqlite
@pytest.mark.parametrize("column", COLUMNS)
async def test_a_changed_note_is_missing_and_written_again(engine: Engine, tmp_path: Path, column: str) -> None:
    notes = StoredNotes(engine)
    everything = {"unreachable_since": NOW, "failed_at": NOW, "failure": "It is down.", "remedy": "Wait."}
    await notes.change({LINEAR: {"used_at": NOW, **everything}})
    with closing(sqlite3.connect(tmp_path / "store.db")) as other, other:
        other.execute(f"UPDATE connection_notes SET {column} = 7")
    assert await notes.all() == {}
    await notes.change({LINEAR: {"used_at": NOW + 1}})
    assert (await notes.all())[LINEAR] == StoredNote(used_at=NOW + 1)


async def test_the_number_of_notes_is_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_notes, "KEPT_OF_PRINCIPAL", 2)
    monkeypatch.setattr(connection_notes, "KEPT_NOTES", 3)
    notes, other = StoredNotes(engine), Account("prn_1", "linear")
    named = [Account("greedy", "linear", f"a{number}") for number in range(5)]
    await notes.change({other: {"used_at": NOW - 10}})
    await notes.change({account: {"failed_at": NOW + number} for number, account in enumerate(named)})
    assert set(await notes.all()) == {other, *named[3:]}
    await notes.change({LINEAR: {"used_at": NOW}})
    assert set(await notes.all()) == {LINEAR, other, named[4]}


async def test_a_deleted_server_leaves_no_notes(engine: Engine) -> None:
    await StoredNotes(engine).change({LINEAR: {"used_at": NOW}})
    await Servers(engine).forget("linear")
    assert await StoredNotes(engine).all() == {}
