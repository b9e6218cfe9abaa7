"""Stores of earlier schemas: they keep their content, and a copy is made before they change."""

import asyncio
import hashlib
import json
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.config.settings import KeySource
from mcp_auth_proxy.errors import StoreRejected, StoreUnavailable
from mcp_auth_proxy.models import HEALTHY, Account, Grant
from mcp_auth_proxy.store import Engine, open_store, open_store_read_only
from mcp_auth_proxy.store.catalogs import Catalogs
from mcp_auth_proxy.store.cipher import generate_key_file
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.connection_notes import StoredNotes
from mcp_auth_proxy.store.engine import Row
from mcp_auth_proxy.store.flows import KEPT_UNANSWERED_SECONDS, Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.store.sealed_rows import RowCipher, decode_rows
from store import samples
from store.builders import NOW, grant, registration, sha256, store_settings

CALLBACK = registration().redirect_uri
SMALL_FILES = 40_000
"""Bytes: more than the other files of SQLite need (-shm has 32 KiB), less than a copy of the smallest store."""
OPENING = """
import asyncio, pathlib, resource, sys
from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import open_store
from store.builders import store_settings

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    asyncio.run(open_store(store_settings(pathlib.Path(sys.argv[1]))))
except StoreUnavailable as error:
    print(error)
"""


KILLED = """
import asyncio, os, pathlib, signal, sys
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.sqlite import schema
from store.builders import store_settings

def die(connection, cipher):
    os.kill(os.getpid(), signal.SIGKILL)

schema.MIGRATIONS = (*schema.MIGRATIONS, ("DELETE FROM grants", die))
schema.migrate.__defaults__ = (schema.MIGRATIONS,)
asyncio.run(open_store(store_settings(pathlib.Path(sys.argv[1]))))
"""


async def assert_holds(engine: Engine, held: samples.Contents) -> None:
    flows, registrations = Flows(engine), Registrations(engine)
    assert await Grants(engine).all() == held.grants
    assert [await flows.get(flow.id) for flow in held.flows] == held.flows
    for attempt in held.attempts:
        assert await flows.find_attempt(attempt.state_hash) == (held.flows[0], attempt)
    for client in held.registrations:
        assert await registrations.find(client.server, client.issuer, CALLBACK, account=client.account) == client
    for account, upstream, issuer, host in held.confirmations:
        assert await Confirmations(engine).contains(account, upstream=upstream, issuer=issuer, sign_in_host=host)
    for account, upstream, catalog in held.catalogs:
        assert await Catalogs(engine).get(account, upstream=upstream) == catalog
    for session_id, account, upstream, state in held.sessions:
        asked = {"id_hash": sha256(session_id), **account_params(account), "upstream": upstream}
        rows = await engine.fetch_all("SELECT * FROM mcp_sessions WHERE id_hash = :id_hash", asked)
        assert await decode_rows(engine, "mcp_sessions", rows, asked, _state) == [state]
    assert await StoredNotes(engine).all() == held.notes
    server, client_id, issuer = samples.BINDING
    assert await registrations.bound_issuer(server, client_id) == issuer


def _state(row: Row, cipher: RowCipher) -> object:
    return json.loads(cipher.open("state", row["state"]))


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file except the -shm file, which SQLite maps into memory."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.endswith("-shm")
    }


def backups(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.bak"))


def schema_of(path: Path) -> int:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


async def migrate(folder: Path) -> None:
    engine = await open_store(store_settings(folder))
    await engine.close()


@pytest.mark.parametrize("schema", samples.ALL)
async def test_a_store_of_each_schema_keeps_its_content(tmp_path: Path, schema: int) -> None:
    engine = await open_store(samples.copy(schema, tmp_path))
    await assert_holds(engine, samples.contents(schema))
    await engine.close()
    assert schema_of(tmp_path / "store.db") == samples.NEWEST


@pytest.mark.parametrize("schema", samples.ALL)
async def test_a_store_of_each_schema_can_still_be_used(tmp_path: Path, schema: int) -> None:
    engine = await open_store(samples.copy(schema, tmp_path))
    grants, flows, held = Grants(engine), Flows(engine), samples.contents(schema)
    first = held.grants[0]
    assert first.refresh_begun_at is not None
    renewed = await grants.renewed(first.id, version=1, owner=samples.OWNER, tokens=first.tokens)
    assert renewed == replace(first, version=2, refresh_begun_at=None, refresh_owner="", health=HEALTHY)
    assert await flows.take_attempt(sha256("state"), NOW) == (held.flows[0], held.attempts[0])
    for waiting in held.flows:
        await flows.save(waiting)
    await flows.purge(NOW + 600 + KEPT_UNANSWERED_SECONDS)
    assert await flows.get(held.flows[0].id) is None
    for client in held.registrations:
        await Registrations(engine).save(replace(client, client_id="new"))
    await engine.close()


@pytest.mark.parametrize("schema", samples.ALL)
async def test_the_id_of_a_deleted_grant_is_not_used_again_after_a_migration(tmp_path: Path, schema: int) -> None:
    engine = await open_store(samples.copy(schema, tmp_path))
    assert (await Grants(engine).add(grant("new"))).id == samples.contents(schema).last_id + 1
    await engine.close()


@pytest.mark.parametrize("schema", samples.OLDER)
async def test_a_store_in_which_every_grant_was_deleted_keeps_counting(tmp_path: Path, schema: int) -> None:
    settings = samples.copy(schema, tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection, connection:
        connection.execute("DELETE FROM grants")
    engine = await open_store(settings)
    assert (await Grants(engine).add(grant())).id == samples.contents(schema).last_id + 1
    await engine.close()


async def test_deleting_a_flow_deletes_its_attempts_after_a_migration(tmp_path: Path) -> None:
    engine = await open_store(samples.copy(1, tmp_path))
    async with engine.transaction() as transaction:
        await transaction.execute("DELETE FROM flows")
    assert await engine.fetch_all("SELECT * FROM attempts") == []
    await engine.close()


@pytest.mark.parametrize("schema", samples.OLDER)
async def test_a_copy_of_the_store_as_it_was_is_kept(
    tmp_path: Path, schema: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = os.umask(0)
    try:
        with caplog.at_level(logging.INFO, "mcp_auth_proxy"):
            settings = samples.copy(schema, tmp_path)
            await migrate(tmp_path)
    finally:
        os.umask(before)
    backup = tmp_path / f"store.db.schema-{schema}.bak"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.db", backup.name, "store.key"]
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert schema_of(backup) == schema
    (line,) = [record.getMessage() for record in caplog.records if ".bak" in record.getMessage()]
    assert str(backup) in line
    # The way back: the copy takes the place of the store.
    backup.replace(settings.path)
    engine = await open_store(settings)
    await assert_holds(engine, samples.contents(schema))
    await engine.close()


@pytest.mark.parametrize("schema", samples.OLDER)
async def test_after_a_migration_a_row_that_is_changed_is_missing(tmp_path: Path, schema: int) -> None:  # T80
    settings = samples.copy(schema, tmp_path)
    await migrate(tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection, connection:
        for table in ("grants", "flows"):
            connection.execute(f"UPDATE {table} SET token_endpoint = 'https://evil.example'")
        for table in ("client_bindings", "registrations"):
            connection.execute(f"UPDATE {table} SET issuer = 'https://evil.example'")
        connection.execute("UPDATE attempts SET browser_hash = 'evil'")
    engine = await open_store(settings)
    held, flows, registrations = samples.contents(schema), Flows(engine), Registrations(engine)
    assert await Grants(engine).all() == []
    assert [await flows.get(flow.id) for flow in held.flows] == [None] * len(held.flows)
    assert await flows.find_attempt(held.attempts[0].state_hash) is None
    assert await registrations.find("linear", "https://evil.example", CALLBACK) is None
    assert await registrations.bound_issuer(*samples.BINDING[:2]) is None
    await engine.close()


@pytest.mark.parametrize("damage", ["x'0102'", "'plain text'", "CAST(x'ff' AS TEXT)"])
async def test_a_row_that_cannot_be_read_before_a_migration_is_missing_after_it_and_stops_nothing(
    tmp_path: Path, damage: str
) -> None:
    settings = samples.copy(5, tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection, connection:
        connection.execute(f"UPDATE grants SET access_token = {damage} WHERE id = 1")
    engine = await open_store(settings)
    assert await Grants(engine).all() == samples.contents(5).grants[1:]
    await engine.close()


async def test_a_migration_seals_with_the_first_key_and_opens_with_the_others(tmp_path: Path) -> None:
    settings = samples.copy(5, tmp_path)
    generate_key_file(tmp_path / "new.key")
    newer = KeySource(kind="file", name=str(tmp_path / "new.key"))
    engine = await open_store(replace(settings, keys=(newer, *settings.keys), default_key=False))
    await engine.close()
    engine = await open_store(replace(settings, keys=(newer,), default_key=False))
    await assert_holds(engine, samples.contents(5))
    await engine.close()


async def test_nothing_is_copied_without_a_migration(tmp_path: Path) -> None:
    samples.copy(samples.NEWEST, tmp_path)
    await migrate(tmp_path)
    await migrate(tmp_path)
    assert backups(tmp_path) == []


async def test_a_copy_has_what_is_in_the_log_file_alone(tmp_path: Path) -> None:
    settings = samples.copy(4, tmp_path)
    with closing(sqlite3.connect(settings.path, isolation_level=None)) as other:
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("UPDATE grants SET ended_reason = 'in the log'")
        assert (tmp_path / "store.db-wal").stat().st_size > 0
        await migrate(tmp_path)
    with closing(sqlite3.connect(tmp_path / "store.db.schema-4.bak")) as copy:
        assert set(copy.execute("SELECT ended_reason FROM grants")) == {("in the log",)}


async def test_a_copy_from_an_earlier_migration_is_not_replaced(tmp_path: Path) -> None:
    samples.copy(4, tmp_path)
    (tmp_path / "store.db.schema-4.bak").write_bytes(b"an older copy")
    await migrate(tmp_path)
    assert (tmp_path / "store.db.schema-4.bak").read_bytes() == b"an older copy"
    assert schema_of(tmp_path / "store.db.schema-4.2.bak") == 4


async def test_a_migration_that_is_killed_changes_nothing(tmp_path: Path) -> None:
    settings = samples.copy(4, tmp_path)
    paths = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[3] / "src")))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
    engine = await open_store_read_only(settings)
    await assert_holds(engine, samples.contents(4))
    await engine.close()
    assert schema_of(settings.path) == 4
    engine = await open_store(settings)
    await assert_holds(engine, samples.contents(4))
    await engine.close()
    assert backups(tmp_path) == ["store.db.schema-4.bak"]


async def test_a_migration_that_fails_changes_nothing_and_is_copied_once(tmp_path: Path) -> None:
    settings = samples.copy(4, tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection:
        connection.execute("CREATE TABLE new_registrations (in_the_way)")
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="new_registrations"):
            await open_store(settings)
        assert schema_of(settings.path) == 4
        assert backups(tmp_path) == ["store.db.schema-4.bak"]
    with closing(sqlite3.connect(settings.path)) as connection:
        connection.execute("DROP TABLE new_registrations")
    engine = await open_store(settings)
    await assert_holds(engine, samples.contents(4))
    await engine.close()


async def test_without_disk_space_for_the_copy_nothing_changes(tmp_path: Path) -> None:
    settings = samples.copy(4, tmp_path)
    settings.path.chmod(0o600)
    before = digests(tmp_path)
    error = opened_with_small_files(tmp_path)
    assert "store.db.schema-4.bak" in error
    assert "free space" in error
    assert digests(tmp_path) == before
    await migrate(tmp_path)
    assert backups(tmp_path) == ["store.db.schema-4.bak"]


async def test_if_the_folder_is_not_writable_nothing_changes(tmp_path: Path) -> None:
    # With the longest name that a file may have, the name of a copy is too long.
    settings = replace(samples.copy(4, tmp_path), path=tmp_path / ("s" * 240))
    (tmp_path / "store.db").rename(settings.path)
    before = digests(tmp_path)
    with pytest.raises(StoreUnavailable, match=r"could not first be copied to .*\.schema-4\.bak"):
        await open_store(settings)
    assert digests(tmp_path) == before


async def test_a_store_that_is_opened_by_several_at_once_is_copied_and_migrated_once(tmp_path: Path) -> None:
    settings = samples.copy(3, tmp_path)
    opened = await asyncio.gather(*(open_store(settings) for _ in range(4)))
    for engine in opened:
        await assert_holds(engine, samples.contents(3))
    for engine in opened:
        await engine.close()
    assert backups(tmp_path) == ["store.db.schema-3.bak"]


@pytest.mark.parametrize(
    ("copies", "named"),
    [
        ((), None),
        (("store.db.schema-3.bak", "store.db.schema-4.bak"), "store.db.schema-4.bak"),
        (("store.db.schema-4.bak", "store.db.schema-4.2.bak"), "store.db.schema-4.2.bak"),
        ((f"store.db.schema-{samples.NEWEST + 1}.bak", "other.db.schema-4.bak"), None),
    ],
)
async def test_a_newer_store_is_rejected_and_the_copy_to_go_back_to_is_named(
    tmp_path: Path, copies: tuple[str, ...], named: str | None
) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection:
        connection.execute(f"PRAGMA user_version = {samples.NEWEST + 1}")
    for name in copies:
        (tmp_path / name).touch()
    before = digests(tmp_path)
    with pytest.raises(StoreRejected, match="newer version") as caught:
        await open_store(settings)
    assert digests(tmp_path) == before
    if named is None:
        assert ".bak" not in str(caught.value)
        assert "restore a backup" in str(caught.value)
    else:
        assert f"{tmp_path / named} " in str(caught.value)


async def test_accounts_of_one_server_have_grants_of_their_own_after_a_migration(tmp_path: Path) -> None:
    engine = await open_store(samples.copy(4, tmp_path))
    before = samples.contents(4).grants[0]
    client = replace(before.registration, account="work")
    second: Grant = replace(before, key=replace(before.key, account=samples.WORK), registration=client)
    stored = await Grants(engine).add(second)
    assert stored.id != before.id
    assert await Grants(engine).current(Account("local", "linear")) == before
    assert await Grants(engine).current(samples.WORK) == stored
    await engine.close()


def opened_with_small_files(folder: Path) -> str:
    """Open a store in a process that may write files of SMALL_FILES bytes at most, and return the error it prints."""
    paths = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[3] / "src")))
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(folder), str(SMALL_FILES)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout
