"""Stores that are rejected, which leaves no trace; first starts, crashes and keys."""

import asyncio
import base64
import hashlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import StoreRejected, StoreUnavailable
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.cipher import Cipher, Key
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.sqlite import schema
from store.builders import grant, store_settings

OTHER_KEY = base64.b64encode(b"x" * 32).decode()
CRASHING = """
import asyncio, os, pathlib, signal, sys
from store.builders import grant, store_settings
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.grants import Grants

async def main():
    engine = await open_store(store_settings(pathlib.Path(sys.argv[1])))
    await Grants(engine).add(grant())
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def make(settings: StoreSettings) -> None:
    engine = await open_store(settings)
    await Grants(engine).add(grant())
    await engine.close()


async def names(settings: StoreSettings) -> list[str]:
    engine = await open_store(settings)
    try:
        return [found.tokens.access_token for found in await Grants(engine).all()]
    finally:
        await engine.close()


def digest(folder: Path) -> dict[str, str]:
    """Return a digest of every file except the -shm file, which SQLite maps into memory."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if not path.name.endswith("-shm")
    }


async def rejected(settings: StoreSettings, environ: dict[str, str] | None = None) -> str:
    """Open a store that must be rejected without changing its folder, and return the error."""
    before, listed = digest(settings.path.parent), sorted(os.listdir(settings.path.parent))
    with pytest.raises(StoreRejected) as caught:
        await open_store(settings, environ=environ or {})
    assert digest(settings.path.parent) == before
    assert sorted(os.listdir(settings.path.parent)) == listed
    return str(caught.value)


async def test_a_first_start_creates_store_and_key_and_announces_it_once(tmp_path: Path) -> None:
    settings = store_settings(tmp_path / "a" / "b")
    lines: list[str] = []
    for _ in range(2):
        engine = await open_store(settings, announce=lines.append)
        await engine.close()
    (line,) = lines
    assert settings.keys[0].name in line
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["store.db", "store.key"]


async def test_all_files_are_private_whatever_the_umask(tmp_path: Path) -> None:  # T46
    settings = store_settings(tmp_path / "new" / "folder")
    before = os.umask(0)
    try:
        engine = await open_store(settings)
        await Grants(engine).add(grant())
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in settings.path.parent.iterdir()}
    await engine.close()
    assert modes == dict.fromkeys(("store.db", "store.db-wal", "store.db-shm", "store.key"), 0o600)
    assert stat.S_IMODE(settings.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(settings.path.parent.parent.stat().st_mode) == 0o700


async def test_a_store_that_others_may_read_is_made_private(tmp_path: Path) -> None:  # T46
    settings = store_settings(tmp_path)
    await make(settings)
    settings.path.chmod(0o664)
    engine = await open_store(settings)
    await Grants(engine).add(grant("other"))
    modes = [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("store.db*")]
    await engine.close()
    assert modes == [0o600] * 3


async def test_no_secret_is_readable_in_the_files(tmp_path: Path) -> None:  # T45
    settings = store_settings(tmp_path)
    await make(settings)
    assert not any(b"canary" in path.read_bytes() for path in tmp_path.iterdir())
    assert await names(settings) == ["canary-access-1"]


async def test_a_wrong_key_is_rejected_and_nothing_written(tmp_path: Path) -> None:  # T48
    settings = store_settings(tmp_path)
    await make(settings)
    Path(settings.keys[0].name).write_text(OTHER_KEY)
    assert "key" in await rejected(settings)


async def test_a_wrong_key_is_rejected_even_with_the_log_of_a_crash(tmp_path: Path) -> None:  # T48
    settings = store_settings(tmp_path)
    crash(tmp_path)
    assert (tmp_path / "store.db-wal").stat().st_size > 0
    right = Path(settings.keys[0].name).read_text()
    Path(settings.keys[0].name).write_text(OTHER_KEY)
    assert "key" in await rejected(settings)
    Path(settings.keys[0].name).write_text(right)
    assert await names(settings) == ["canary-access-1"]


async def test_a_missing_key_file_is_rejected_and_not_replaced(tmp_path: Path) -> None:  # T48
    settings = store_settings(tmp_path)
    await make(settings)
    Path(settings.keys[0].name).unlink()
    text = await rejected(settings)
    assert str(settings.path) in text
    assert settings.keys[0].name in text


async def test_a_key_file_that_was_configured_is_never_created(tmp_path: Path) -> None:
    text = await rejected(replace(store_settings(tmp_path), default_key=False))
    assert "store.key" in text


@pytest.mark.parametrize("size", [0, 50, 100, 4096, 5000, 20480])
async def test_a_store_that_was_cut_off_is_rejected(tmp_path: Path, size: int) -> None:  # T48
    settings = store_settings(tmp_path)
    await make(settings)
    os.truncate(settings.path, size)
    assert str(settings.path) in await rejected(settings)


async def test_a_file_that_is_not_a_database_is_rejected(tmp_path: Path) -> None:  # T48
    settings = store_settings(tmp_path)
    await make(settings)
    for content in (b"", b"hello\n", b"x" * 10_000, b"SQLite format 3\0" + b"\xff" * 5000):
        settings.path.write_bytes(content)
        await rejected(settings)


@pytest.mark.parametrize("mode", ["delete", "wal"])
async def test_a_database_of_another_program_is_rejected(tmp_path: Path, mode: str) -> None:  # T48
    settings = store_settings(tmp_path)
    await make(settings)
    settings.path.unlink()
    foreign = sqlite3.connect(settings.path)
    foreign.execute(f"PRAGMA journal_mode = {mode}")
    foreign.execute("CREATE TABLE meta (name, value)")
    foreign.close()
    assert "another program" in await rejected(settings)


async def test_a_newer_schema_is_rejected(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    await make(settings)
    newer = sqlite3.connect(settings.path)
    newer.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    newer.close()
    assert "newer version" in await rejected(settings)


async def test_a_log_without_its_store_is_rejected(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    crash(tmp_path)
    settings.path.unlink()
    assert "-wal" in await rejected(settings)


async def test_a_second_key_in_front_takes_over_and_both_open(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    await make(settings)
    both = replace(settings, keys=(KeySource(kind="env", name="NEW"), *settings.keys), default_key=False)
    engine = await open_store(both, environ={"NEW": OTHER_KEY})
    await Grants(engine).add(grant("second", name="2"))
    assert len(await Grants(engine).all()) == 2
    await engine.close()
    # The new key alone opens the store too, but not the rows that were sealed with the old one.
    alone = replace(both, keys=both.keys[:1])
    engine = await open_store(alone, environ={"NEW": OTHER_KEY})
    assert [found.key.account.server for found in await Grants(engine).all()] == ["second"]
    await engine.close()


async def test_two_first_starts_at_once_share_one_store_and_key(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    opened = await asyncio.gather(*(open_store(settings) for _ in range(4)))
    for number, engine in enumerate(opened):
        await Grants(engine).add(grant(f"s{number}"))
    assert len(await Grants(opened[0]).all()) == 4
    for engine in opened:
        await engine.close()
    assert sorted(os.listdir(tmp_path)) == ["store.db", "store.key"]


async def test_an_acknowledged_grant_survives_a_kill(tmp_path: Path) -> None:  # F7
    crash(tmp_path)
    assert await names(store_settings(tmp_path)) == ["canary-access-1"]


async def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="can't be created"):
        await open_store(store_settings(tmp_path / "file" / "folder"))


def test_a_failed_migration_leaves_the_schema_as_it_was() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    cipher = Cipher([Key.of(b"k" * 32)])
    schema.migrate(connection, cipher)
    broken = (*schema.MIGRATIONS, ("CREATE TABLE extra (a)", "NONSENSE"))
    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(connection, cipher, broken)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)
    assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'extra'").fetchall()
    schema.migrate(connection, cipher, (*schema.MIGRATIONS, ("CREATE TABLE extra (a)",)))
    schema.migrate(connection, cipher, (*schema.MIGRATIONS, ("CREATE TABLE extra (a)",)))
    assert connection.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS) + 1,)
    connection.close()


def crash(folder: Path) -> None:
    """Add a grant in a process that is killed right after."""
    paths = os.pathsep.join(str(Path(__file__).parents[depth] / name) for depth, name in ((2, ""), (3, "src")))
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, str(folder)], env={**os.environ, "PYTHONPATH": paths}, timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
