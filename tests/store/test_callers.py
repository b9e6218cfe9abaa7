"""Principals and API keys: what the store gives back, and that nobody without its key can change it (T76)."""

import asyncio
import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.errors import NameTaken
from mcp_auth_proxy.models import ApiKey, Identity, Principal, PrincipalStatus, Role, Scope
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.principals import Principals, new_principal_id
from store import samples
from store.builders import NOW, store_settings

ALICE = Principal(id="prn_alice", name="alice", role=Role.ADMIN, created_at=NOW)
BOB = Principal(id="prn_bob", name="bob", project_id="other", status=PrincipalStatus.DISABLED, created_at=NOW + 1)
OF_ALICE = Identity("jwt:https://idp.example", "sub-1")
OF_BOB = Identity("header:x-user", "bob")
SECRET = "mapk_aaaaaaaaaaaa_canary"
TABLES = ("principals", "identities", "api_keys")
LEFT_OUT = ("api_keys", "last_used_at")
VALID: dict[str, Any] = {
    "role": "member",
    "status": "disabled",
    "listed": 0,
    "scopes": '["admin", "mcp", "self"]',
    "principal": "prn_bob",
    "key_hash": hashlib.sha256(b"known to the attacker").hexdigest(),
}


def key(number: int = 1, principal: str = ALICE.id) -> ApiKey:
    return ApiKey(
        id=f"key-{number}",
        principal=principal,
        name="laptop",
        key_hash=hashlib.sha256(f"{SECRET}{number}".encode()).hexdigest(),
        scopes=frozenset({Scope.MCP}),
        created_at=NOW + number,
        expires_at=NOW + 1000,
    )


async def fill(engine: Engine) -> None:
    principals, keys = Principals(engine), ApiKeys(engine)
    await principals.add(ALICE, [OF_ALICE])
    await principals.add(BOB, [OF_BOB])
    await keys.add(key())
    await keys.add(key(2, BOB.id))
    await keys.used(["key-1"], at=NOW)


@contextmanager
def attacker(folder: Path) -> Iterator[sqlite3.Connection]:
    """Write to the store without a key."""
    with closing(sqlite3.connect(folder / "store.db")) as connection, connection:
        connection.row_factory = sqlite3.Row
        yield connection


def columns() -> list[tuple[str, str]]:
    with closing(sqlite3.connect(Path(__file__).parent / "stores" / f"schema-{samples.NEWEST}.db")) as store:
        return [
            (table, row[0])
            for table in TABLES
            for row in store.execute("SELECT name FROM pragma_table_info(?)", (table,))
        ]


async def seen(engine: Engine, table: str) -> list[object]:
    """Return what some look-up returns, of the values that were stored and of those that an attacker would ask for."""
    principals, keys = Principals(engine), ApiKeys(engine)
    match table:
        case "principals":
            found: list[object] = [await principals.get(each) for each in (ALICE.id, BOB.id, f"{ALICE.id}2")]
            found += [await principals.by_name(each) for each in ("alice", "bob", "alice2")]
            return [*found, *await principals.all()]
        case "identities":
            others = [replaced for each in (OF_ALICE, OF_BOB) for replaced in _variants(each)]
            return [await principals.by_identity(each) for each in others] + list(await principals.all_identities())
        case _:
            return [await keys.get("key-1"), await keys.get("key-12"), *await keys.all(), *await keys.table().all()]


def _variants(identity: Identity) -> list[Identity]:
    source, subject = identity
    return [identity, Identity(f"{source}2", subject), Identity(source, f"{subject}2")]


def others(column: str, now: object) -> list[object]:
    if isinstance(now, str):
        return [VALID.get(column, f"{now}2"), b"blob", ""]
    if isinstance(now, bytes):
        return [now[:-1] + bytes([now[-1] ^ 1]), b"", "text"]
    return [1 if now == 0 else VALID.get(column, 9e9), "text"]


@pytest.mark.sqlite
@pytest.mark.parametrize(("table", "column"), [pytest.param(*it, id=".".join(it)) for it in columns()])
async def test_a_row_with_a_changed_column_is_missing(engine: Engine, tmp_path: Path, table: str, column: str) -> None:
    await fill(engine)
    good = await seen(engine, table)
    with attacker(tmp_path) as connection:
        row = connection.execute(f"SELECT rowid AS place, * FROM {table} ORDER BY place").fetchone()
    for value in others(column, row[column]):
        with attacker(tmp_path) as connection:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, row["place"]))
        found = await seen(engine, table)
        if (table, column) == LEFT_OUT:
            assert len(found) == len(good)
        else:
            rest = [each for each in found if each is not None]
            assert all(each in good for each in rest), value
            assert len(rest) < len([each for each in good if each is not None]), value
        with attacker(tmp_path) as connection:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (row[column], row["place"]))
    assert await seen(engine, table) == good


@pytest.mark.sqlite
async def test_a_view_can_not_pass_one_row_off_as_another(engine: Engine, tmp_path: Path) -> None:
    await fill(engine)
    with attacker(tmp_path) as connection:
        connection.executescript(
            """
            ALTER TABLE principals RENAME TO old_principals;
            CREATE VIEW principals AS SELECT uid, 'prn_bob' AS id, id AS "id:1", project_id, 'bob' AS name, role,
                status, listed, created_at, seal FROM old_principals;
            ALTER TABLE identities RENAME TO old_identities;
            CREATE VIEW identities AS SELECT uid, 'header:x-user' AS source, 'bob' AS subject, source AS "source:1",
                subject AS "subject:1", principal, created_at, seal FROM old_identities;
            """
        )
    principals = Principals(engine)
    assert (await principals.get(BOB.id), await principals.by_name("bob"), await principals.by_identity(OF_BOB)) == (
        None,
        None,
        None,
    )
    assert await principals.all() == []


@pytest.mark.sqlite
async def test_a_table_that_was_read_takes_no_change_without_a_seal(engine: Engine, tmp_path: Path) -> None:
    await fill(engine)
    table = Principals(engine).table()
    assert {each.name for each in await table.all()} == {"alice", "bob"}
    with attacker(tmp_path) as connection:
        connection.execute("UPDATE principals SET status = 'active', role = 'admin' WHERE name = 'bob'")
    assert BOB in await table.all()
    await Principals(engine).change(ALICE.id, role=Role.MEMBER)
    assert replace(ALICE, role=Role.MEMBER) in await table.all()
    with attacker(tmp_path) as connection:
        connection.execute("DELETE FROM principals WHERE name = 'bob'")
    assert [each.name for each in await table.all()] == ["alice"]


async def test_what_was_stored_is_found_in_every_way(engine: Engine) -> None:
    await fill(engine)
    principals, keys = Principals(engine), ApiKeys(engine)
    assert await principals.get(ALICE.id) == await principals.by_name("alice") == ALICE
    assert await principals.by_identity(OF_ALICE) == ALICE
    assert await principals.by_identity(Identity("jwt:https://idp.example/", "sub-1")) is None
    assert await principals.all() == [ALICE, BOB]
    assert await principals.identities(BOB.id) == [OF_BOB]
    assert await keys.of_principal(ALICE.id) == [replace(key(), last_used_at=NOW)]
    await keys.used(["key-1"], at=NOW - 3600)
    assert await keys.get("key-1") == replace(key(), last_used_at=NOW)
    assert (await keys.delete("key-1"), await keys.delete("key-1")) == (True, False)
    assert await keys.all() == [key(2, BOB.id)]


async def test_names_and_identities_belong_to_one_principal(engine: Engine) -> None:
    await fill(engine)
    principals = Principals(engine)
    other = replace(ALICE, id=new_principal_id())
    with pytest.raises(NameTaken) as caught:
        await principals.add(other)
    assert caught.value.existing_id == ALICE.id
    with pytest.raises(NameTaken):
        await principals.add(replace(other, name="carol"), [OF_ALICE])
    assert await principals.by_name("carol") is None
    with pytest.raises(NameTaken):
        await principals.add_identity(BOB.id, OF_ALICE, now=NOW)
    await principals.add_identity(BOB.id, OF_BOB, now=NOW)
    assert await principals.identities(BOB.id) == [OF_BOB]


async def test_a_caller_that_comes_twice_at_once_is_one_principal(engine: Engine, tmp_path: Path) -> None:
    await fill(engine)
    other = await open_store(store_settings(tmp_path))
    carol = Identity("jwt:https://idp.example", "carol")
    found = await asyncio.gather(
        *(
            Principals(each).provision(carol, ["alice", "alice@idp.example"], role=Role.MEMBER, now=NOW)
            for each in (engine, other, engine, other)
        )
    )
    await other.close()
    assert len({each.id for each in found}) == 1
    assert (found[0].name, found[0].listed, found[0].role) == ("alice@idp.example", False, Role.MEMBER)
    again = Identity("jwt:https://idp.example", "again")
    third = await Principals(engine).provision(again, ["alice", "bob"], role=Role.MEMBER, now=NOW)
    assert third.name == "bob#2"
    assert await Principals(engine).provision(OF_ALICE, ["x"], role=Role.MEMBER, now=NOW) == ALICE


@pytest.mark.sqlite
async def test_a_changed_identity_is_nobodys_and_its_caller_becomes_a_new_principal(
    engine: Engine, tmp_path: Path
) -> None:
    await fill(engine)
    with attacker(tmp_path) as connection:
        connection.execute("UPDATE identities SET principal = 'prn_alice' WHERE subject = 'bob'")
    principals = Principals(engine)
    assert await principals.by_identity(OF_BOB) is None
    found = await principals.provision(OF_BOB, ["bob"], role=Role.MEMBER, now=NOW)
    assert found.id not in (ALICE.id, BOB.id)
    assert await principals.by_identity(OF_BOB) == found


async def test_changes_of_a_principal_are_those_that_were_asked_for(engine: Engine) -> None:
    await fill(engine)
    principals = Principals(engine)
    changed = await principals.change(ALICE.id, status=PrincipalStatus.DISABLED, listed=False)
    assert changed == await principals.get(ALICE.id) == replace(ALICE, status=PrincipalStatus.DISABLED, listed=False)
    assert await principals.change("prn_nobody", role=Role.ADMIN) is None


@pytest.mark.sqlite
async def test_no_key_is_in_the_files_of_the_store(engine: Engine, tmp_path: Path) -> None:
    # T76
    await fill(engine)
    files = [file.read_bytes() for file in tmp_path.glob("store.db*")]
    assert files
    assert all(SECRET.encode() not in content for content in files)
