"""Sessions: found by their secret alone, ended for good, bounded, and of no use if they are forged (T76, T80)."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import Scope, Session, SessionKind
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.sealed_rows import new_uid
from mcp_auth_proxy.store.sessions import KEPT_SESSIONS, Sessions
from store.builders import NOW, sha256


@pytest.fixture
def sessions(engine: Engine) -> Sessions:
    return Sessions(engine)


def session(principal: str = "anna", kind: SessionKind = SessionKind.BROWSER, *, at: float = NOW) -> Session:
    return Session(
        id=new_uid(),
        kind=kind,
        principal=principal,
        credential="key:1",
        scopes=frozenset({Scope.MCP, Scope.SELF}),
        created_at=at,
        expires_at=at + 60,
    )


def begun(link: Session) -> Session:
    return replace(link, id=new_uid(), kind=SessionKind.LINK, credential=f"link:{link.id}")


async def test_a_session_is_found_by_the_hash_of_its_secret_until_it_is_over(sessions: Sessions) -> None:
    stored = session()
    await sessions.add(stored, sha256("secret"))
    assert await sessions.find(sha256("secret"), NOW + 59) == stored
    assert await sessions.find(sha256("secret"), NOW + 60) is None
    for other in ("secret", "", sha256("other")):
        assert await sessions.find(other, NOW) is None


async def test_a_sign_in_ends_the_session_that_it_replaces_and_no_other(sessions: Sessions) -> None:
    for name in ("old", "kept"):
        await sessions.add(session(), sha256(name))
    await sessions.add(session(), sha256("new"), replaces=sha256("old"))
    assert [await sessions.find(sha256(name), NOW) is not None for name in ("old", "kept", "new")] == [
        False,
        True,
        True,
    ]


async def test_sessions_end_one_by_one_by_credential_or_all_of_a_principal(sessions: Sessions) -> None:
    await sessions.add(session(), sha256("1"))
    await sessions.add(replace(session(), credential="key:2"), sha256("2"))
    await sessions.add(session("bert"), sha256("3"))

    async def left() -> list[str]:
        return [name for name in ("1", "2", "3") if await sessions.find(sha256(name), NOW) is not None]

    await sessions.end_all("anna", credential="key:1")
    assert await left() == ["2", "3"]
    await sessions.end_all("anna")
    assert await left() == ["3"]
    await sessions.end(sha256("3"))
    assert await left() == []


async def test_only_the_newest_sessions_of_a_principal_are_kept_and_none_that_are_over(
    sessions: Sessions, engine: Engine
) -> None:
    await sessions.add(session("bert", at=NOW - 60), sha256("over"))
    await sessions.add(session("bert"), sha256("bert"))
    for number in range(KEPT_SESSIONS + 3):
        await sessions.add(session(at=NOW + number / 100), sha256(str(number)))
    rows = await engine.fetch_all("SELECT principal FROM sessions")
    assert sorted(row["principal"] for row in rows) == ["anna"] * KEPT_SESSIONS + ["bert"]
    assert await sessions.find(sha256("2"), NOW) is None
    assert await sessions.find(sha256("3"), NOW) is not None


async def test_a_link_begins_one_session_which_a_second_visit_ends(sessions: Sessions) -> None:
    await sessions.add(session(kind=SessionKind.UNUSED_LINK), sha256("link"))
    opened = await sessions.open_link(sha256("link"), begun, sha256("first"), now=NOW)
    assert opened == await sessions.find(sha256("first"), NOW)
    assert await sessions.open_link(sha256("link"), begun, sha256("second"), now=NOW) is None
    assert await sessions.find(sha256("first"), NOW) is None
    assert await sessions.find(sha256("second"), NOW) is None


@pytest.mark.parametrize("kind", [SessionKind.BROWSER, SessionKind.LINK])
async def test_a_session_is_no_link(sessions: Sessions, kind: SessionKind) -> None:
    await sessions.add(session(kind=kind), sha256("session"))
    assert await sessions.open_link(sha256("session"), begun, sha256("new"), now=NOW) is None
    assert await sessions.find(sha256("session"), NOW) is not None


async def test_a_link_that_is_over_or_unknown_begins_nothing(sessions: Sessions) -> None:
    await sessions.add(session(kind=SessionKind.UNUSED_LINK), sha256("link"))
    assert await sessions.open_link(sha256("link"), begun, sha256("new"), now=NOW + 60) is None
    assert await sessions.open_link(sha256("other"), begun, sha256("new"), now=NOW) is None
    assert await sessions.find(sha256("new"), NOW) is None


CHANGES = {
    "uid": "0" * 32,
    "id_hash": sha256("evil"),
    "kind": "link",
    "principal": "admin",
    "credential": "key:2",
    "scopes": "admin mcp self",
    "created_at": NOW + 1,
    "expires_at": NOW + 1e6,
    "seal": b"evil",
}


@pytest.mark.sqlite
@pytest.mark.parametrize("column", sorted(CHANGES))
async def test_a_row_with_a_changed_column_is_missing(
    sessions: Sessions, engine: Engine, tmp_path: Path, column: str
) -> None:
    await sessions.add(session(kind=SessionKind.UNUSED_LINK), sha256("secret"))
    tamper(tmp_path, f"UPDATE sessions SET {column} = :value", value=CHANGES[column])
    for name in ("secret", "evil"):
        assert await sessions.find(sha256(name), NOW) is None
        assert await sessions.open_link(sha256(name), begun, sha256("new"), now=NOW) is None
    assert set(CHANGES) == set((await engine.fetch_all("SELECT * FROM sessions"))[0].keys())


@pytest.mark.sqlite
async def test_one_session_can_not_be_passed_off_as_another(sessions: Sessions, tmp_path: Path) -> None:
    await sessions.add(session("admin"), sha256("admin"))
    columns = ", ".join(column for column in CHANGES if column != "id_hash")
    tamper(tmp_path, "ALTER TABLE sessions RENAME TO kept")
    tamper(
        tmp_path,
        f"CREATE VIEW sessions AS SELECT {columns}, id_hash FROM kept "
        f"UNION ALL SELECT {columns}, '{sha256('evil')}' AS id_hash FROM kept",
    )
    assert await sessions.find(sha256("evil"), NOW) is None
    assert await sessions.find(sha256("admin"), NOW) is not None


@pytest.mark.sqlite
async def test_no_secret_is_in_the_file(sessions: Sessions, engine: Engine, tmp_path: Path) -> None:
    await sessions.add(session(), sha256("canary-secret"))
    await engine.close()
    assert all(b"canary" not in path.read_bytes() for path in tmp_path.iterdir())


def tamper(folder: Path, sql: str, **values: object) -> None:
    with closing(sqlite3.connect(folder / "store.db")) as attacker, attacker:
        attacker.execute(sql, values)
