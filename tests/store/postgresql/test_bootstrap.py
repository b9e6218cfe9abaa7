"""What is made of an empty database, and what is done with one that is not ours, or not of this version."""

import asyncio
import base64
import logging
import os
import secrets
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.postgresql import PASSWORD, Server
from fakes.proxy import until
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import KeyRejected, StoreError, StoreMigrated, StoreRejected
from mcp_auth_proxy.store import open_store, open_store_read_only
from mcp_auth_proxy.store.cipher import load_keys
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.postgresql import schema
from mcp_auth_proxy.store.sqlite import schema as sqlite_schema
from store import samples
from store.builders import grant

pytestmark = pytest.mark.postgresql

Execute = Callable[..., list[tuple[object, ...]]]
COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns WHERE table_schema = 'public'
"""
TYPES = {"TEXT": "text", "BLOB": "bytea", "INTEGER": "integer", "BOOLEAN": "boolean"}
OPEN = """
import asyncio, sys
from pathlib import Path
from fakes.postgresql import settings_for
from mcp_auth_proxy.store import open_store

async def main():
    await (await open_store(settings_for(sys.argv[1], Path(sys.argv[2])))).close()

asyncio.run(main())
"""


async def error(settings: StoreSettings, *, read_only: bool = False) -> StoreError:
    with pytest.raises(StoreError) as caught:
        await (open_store_read_only(settings) if read_only else open_store(settings))
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def test_both_engines_count_schemas_alike() -> None:
    assert len(sqlite_schema.MIGRATIONS) == schema.NEWEST


async def test_both_engines_have_the_same_tables_and_columns(store: StoreSettings, execute: Execute) -> None:
    found = {(str(table), str(column)): (kind, null) for table, column, kind, null in execute(store, COLUMNS)}
    sql = """
        SELECT m.name, c.name, c.type, c."notnull" OR c.pk FROM sqlite_master m, pragma_table_info(m.name) c
        WHERE m.type = 'table' AND m.name <> 'sqlite_sequence'
    """
    with closing(sqlite3.connect(Path(samples.__file__).parent / "stores" / f"schema-{samples.NEWEST}.db")) as file:
        wanted = {
            (table, column): (TYPES.get(kind, kind.lower()), "NO" if required else "YES")
            for table, column, kind, required in file.execute(sql)
        }
        indexes = file.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
    for table in ("grants", "events"):
        wanted[table, "id"] = ("bigint", "NO")
    wanted[schema.MARK, "version"] = ("integer", "NO")
    assert found == wanted
    names = {name for (name,) in execute(store, "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")}
    assert {name for (name,) in indexes} <= names


async def test_ten_processes_may_start_at_once_on_an_empty_database(empty: StoreSettings) -> None:
    engines = await asyncio.gather(*(open_store(empty) for _ in range(10)))
    await Grants(engines[0]).add(grant())
    assert [len(await Grants(engine).all()) for engine in engines] == [1] * 10
    await asyncio.gather(*(engine.close() for engine in engines))


async def test_real_processes_may_start_at_once_on_an_empty_database(empty: StoreSettings, tmp_path: Path) -> None:
    assert empty.postgresql is not None
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(samples.__file__).parents[1], *sys.path)))}
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", OPEN, empty.postgresql.text, str(tmp_path / str(number)), env=environ
        )
        for number in range(3)
    ]
    assert [await process.wait() for process in processes] == [0, 0, 0]
    await (await open_store_read_only(empty)).close()


@pytest.mark.parametrize(
    "sql", ["CREATE TABLE accounts (id int)", "CREATE TABLE grants (id int)", "CREATE VIEW v AS SELECT 1"]
)
async def test_a_database_of_another_program_is_left_as_it_is(empty: StoreSettings, execute: Execute, sql: str) -> None:
    execute(empty, sql)
    before = execute(empty, COLUMNS)
    for read_only in (False, True):
        found = await error(empty, read_only=read_only)
        assert isinstance(found, StoreRejected)
        assert "tables of another program in the schema public" in str(found)
    assert execute(empty, COLUMNS) == before


async def test_a_schema_of_its_own_in_a_database_of_others_is_used(empty: StoreSettings, execute: Execute) -> None:
    execute(empty, "CREATE TABLE accounts (id int)")
    execute(empty, "CREATE SCHEMA map AUTHORIZATION proxy")
    execute(empty, f"ALTER ROLE proxy IN DATABASE {_name(empty)} SET search_path = map")
    engine = await open_store(empty)
    await Grants(engine).add(grant())
    await engine.close()
    assert execute(empty, "SELECT count(*) FROM map.grants") == [(1,)]
    execute(empty, f"ALTER ROLE proxy IN DATABASE {_name(empty)} SET search_path = nowhere")
    assert "no schema of search_path exists" in str(await error(empty))


async def test_a_role_that_may_create_nothing_is_told_so(empty: StoreSettings, execute: Execute) -> None:
    execute(empty, f"ALTER DATABASE {_name(empty)} OWNER TO postgres")
    execute(empty, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    assert "GRANT CREATE, USAGE ON SCHEMA public" in str(await error(empty))


async def test_another_encoding_is_refused(postgresql_server: Server, empty: StoreSettings) -> None:
    assert empty.postgresql is not None
    sql = "CREATE DATABASE latin OWNER proxy ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    postgresql_server.execute(sql)
    try:
        text = postgresql_server.url("latin")
        settings = replace(empty, postgresql=replace(empty.postgresql, text=text))
        assert "ENCODING 'UTF8'" in str(await error(settings))
    finally:
        postgresql_server.drop("latin")


async def test_a_reading_command_makes_no_store(empty: StoreSettings, execute: Execute) -> None:
    assert "Start the proxy once" in str(await error(empty, read_only=True))
    assert execute(empty, COLUMNS) == []


async def test_a_newer_store_is_refused_with_what_to_do(store: StoreSettings, execute: Execute) -> None:
    execute(store, f"UPDATE {schema.MARK} SET version = version + 1")
    for read_only in (False, True):
        found = await error(store, read_only=read_only)
        assert isinstance(found, StoreRejected)
        assert f"it has schema {schema.NEWEST + 1}" in str(found)
        assert "pg_dump" in str(found)


async def test_a_store_that_is_migrated_while_in_use_is_neither_read_nor_written(
    store: StoreSettings, execute: Execute
) -> None:
    engine = await open_store(store)
    try:
        stored = await Grants(engine).add(grant())
        for _ in range(5):
            assert await Grants(engine).get(stored.id) is not None
        await engine.changed()
        # As an upgrade would: also prepared statements must not fail with an error of their own.
        execute(store, f"ALTER TABLE grants ADD COLUMN new TEXT; UPDATE {schema.MARK} SET version = version + 1")
        for _ in range(2):
            with pytest.raises(StoreMigrated):
                await Grants(engine).get(stored.id)
            with pytest.raises(StoreMigrated):
                await Grants(engine).set_label(stored.id, "x")
            with pytest.raises(StoreMigrated):
                await engine.check_writable()
            with pytest.raises(StoreMigrated):
                await engine.check_schema()
    finally:
        await engine.close()


async def test_a_column_that_is_added_without_a_migration_disturbs_nobody(
    store: StoreSettings, execute: Execute
) -> None:
    engine = await open_store(store)
    try:
        stored = await Grants(engine).add(grant())
        for _ in range(5):
            assert await Grants(engine).get(stored.id) is not None
        execute(store, "ALTER TABLE grants ADD COLUMN note TEXT")
        assert await Grants(engine).get(stored.id) is not None
    finally:
        await engine.close()


async def test_a_wrong_key_is_named_and_writes_nothing(store: StoreSettings, execute: Execute, tmp_path: Path) -> None:
    other = tmp_path / "other.key"
    other.write_text(base64.b64encode(secrets.token_bytes(32)).decode())
    before = execute(store, "SELECT * FROM meta ORDER BY name")
    source = KeySource(kind="file", name=str(other))
    found = await error(replace(store, keys=(source,)))
    assert isinstance(found, KeyRejected)
    assert load_keys(replace(store, keys=(source,)))[0].id in str(found)
    assert execute(store, "SELECT * FROM meta ORDER BY name") == before
    # A new key beside the old one is known from then on. While all rows are of the old one, it does not do alone.
    engine = await open_store(replace(store, keys=(*store.keys, source)))
    await Grants(engine).add(grant())
    await engine.close()
    assert "every row" in str(await error(replace(store, keys=(source,))))


async def test_a_migration_happens_once_and_waits_for_a_running_refresh(
    store: StoreSettings, execute: Execute, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = await open_store(store)
    stored = await Grants(engine).add(grant())
    owner = engine.owners.new()
    now = engine.now()
    assert await Grants(engine).begin_refresh(stored.id, version=stored.version, owner=owner, now=now)
    monkeypatch.setattr(schema, "MIGRATIONS", (("ALTER TABLE grants ADD COLUMN new TEXT",),))
    monkeypatch.setattr(schema, "NEWEST", schema.NEWEST + 1)
    opening = asyncio.gather(*(open_store(store) for _ in range(3)))
    await until(lambda: caplog.text.count("the migration waits for it") == 3, "three that wait")
    assert not opening.done()
    await Grants(engine).release_refresh(stored.id, version=stored.version, owner=owner)
    migrated = await opening
    with pytest.raises(StoreMigrated):
        await Grants(engine).all()
    for each in migrated:
        assert [found.id for found in await Grants(each).all()] == [stored.id]
        await each.close()
    await engine.close()
    assert execute(store, "SELECT count(new) FROM grants") == [(0,)]


def _name(settings: StoreSettings) -> str:
    assert settings.postgresql is not None
    return settings.postgresql.text.rpartition("/")[2]
