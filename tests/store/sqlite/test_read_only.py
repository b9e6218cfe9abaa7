"""What commands that only read do with a store: they read it whatever its schema is, and leave no trace."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.other_users import NOBODY, as_root
from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.errors import KeyRejected, StoreRejected, StoreUnavailable
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import Engine, open_store, open_store_read_only
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.sqlite import untouched
from store import samples
from store.builders import grant, store_settings
from store.sqlite.test_bootstrap import crash
from store.sqlite.test_migration import assert_holds

USING = """
import asyncio, pathlib, sys
from store.builders import grant, store_settings
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.grants import Grants

async def main():
    engine = await open_store(store_settings(pathlib.Path(sys.argv[1])))
    await Grants(engine).add(grant())
    print("ready", flush=True)
    sys.stdin.read()
    await engine.close()

asyncio.run(main())
"""
READING = """
import asyncio, os, pathlib, sys
from store.builders import grant, store_settings
from mcp_auth_proxy.store import open_store_read_only
from mcp_auth_proxy.store.grants import Grants

async def read():
    engine = await open_store_read_only(store_settings(pathlib.Path(sys.argv[1])))
    found = [found.key.account.server for found in await Grants(engine).all()]
    await engine.close()
    return found

if sys.argv[2:]:
    asyncio.run(read())  # what Python imports on the way may be out of that user's reach
    os.chown(pathlib.Path(sys.argv[1]) / "store.key", int(sys.argv[2]), -1)  # a key must be its user's alone
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
print(*asyncio.run(read()))
"""
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[3] / "src"))),
}


def traces(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return content, time of change and mode of every file, the index of the log among them."""
    found = {path.name: (path.read_bytes(), path.stat()) for path in folder.iterdir()}
    return {name: (content, stat.st_mtime_ns, stat.st_mode) for name, (content, stat) in found.items()}


@asynccontextmanager
async def reading(settings: StoreSettings) -> AsyncIterator[Engine]:
    """Open a store for reading, which must not be seen in its folder."""
    folder = settings.path.parent
    before, changed_at = traces(folder), folder.stat().st_mtime_ns
    engine = await open_store_read_only(settings)
    try:
        yield engine
    finally:
        await engine.close()
    assert traces(folder) == before
    assert folder.stat().st_mtime_ns == changed_at, "a file was made there, and removed again"


async def servers(settings: StoreSettings) -> list[str]:
    async with reading(settings) as engine:
        return [found.key.account.server for found in await Grants(engine).all()]


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Have another process use the store, with a grant that is in its log alone."""
    with subprocess.Popen(
        [sys.executable, "-c", USING, str(folder)], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield
        process.communicate(timeout=20)


def read_by(*prefix: str, folder: Path, uid: int | None = None) -> str:
    """Read the store in another process, maybe as another user; return the servers of its grants, or its error."""
    command = [*prefix, sys.executable, "-c", READING, str(folder), *([str(uid)] if uid is not None else [])]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("schema", samples.ALL)
async def test_a_store_of_each_schema_is_read_as_it_is(tmp_path: Path, schema: int) -> None:
    settings = samples.copy(schema, tmp_path)
    async with reading(settings) as engine:
        await assert_holds(engine, samples.contents(schema))
    with closing(sqlite3.connect(settings.path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (schema,)


@pytest.mark.parametrize("schema", [1, samples.NEWEST])
async def test_what_was_opened_for_reading_is_not_written(tmp_path: Path, schema: int) -> None:
    async with reading(samples.copy(schema, tmp_path)) as engine:
        with pytest.raises(StoreUnavailable, match="can't be written"):
            await Grants(engine).delete(Account("local", "linear"))
        assert len(await Grants(engine).all()) == len(samples.contents(schema).grants)


async def test_a_store_in_use_is_read_with_what_is_in_its_log(tmp_path: Path) -> None:
    with in_use(tmp_path):
        assert (tmp_path / "store.db-shm").exists()
        assert await servers(store_settings(tmp_path)) == ["linear"]


async def test_reading_does_not_wait_for_who_is_writing(tmp_path: Path) -> None:
    settings = samples.copy(3, tmp_path)
    with closing(sqlite3.connect(settings.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM grants")
        async with reading(settings) as engine:
            await assert_holds(engine, samples.contents(3))


async def test_a_store_is_read_after_a_crash(tmp_path: Path) -> None:
    crash(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["store.db", "store.db-shm", "store.db-wal", "store.key"]
    assert await servers(store_settings(tmp_path)) == ["linear"]


async def test_a_log_without_its_index_is_read_and_gets_none(tmp_path: Path) -> None:
    crash(tmp_path)
    (tmp_path / "store.db-shm").unlink()
    assert await servers(store_settings(tmp_path)) == ["linear"]


async def test_an_older_store_with_a_log_is_read_with_it(tmp_path: Path) -> None:
    settings = samples.copy(4, tmp_path)
    with closing(sqlite3.connect(settings.path, isolation_level=None)) as other:
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("DELETE FROM grants WHERE id = 1")
        for name in ("store.db", "store.db-wal", "store.key"):
            (tmp_path / "copy").mkdir(exist_ok=True)
            shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    assert await servers(store_settings(tmp_path / "copy")) == ["notes"]


async def test_a_store_that_is_written_meanwhile_is_read_again(tmp_path: Path) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)
    seen: list[int] = []

    def count(connection: sqlite3.Connection) -> int:
        (number,) = connection.execute("SELECT count(*) FROM grants").fetchone()
        seen.append(number)
        if len(seen) == 1:
            with closing(sqlite3.connect(settings.path)) as other, other:
                other.execute("DELETE FROM grants WHERE id = 1")
        return int(number)

    assert untouched.read(settings.path, count, timeout=1.0) == seen[0] - 1
    assert seen == [len(samples.contents(samples.NEWEST).grants), seen[0] - 1]


async def test_a_store_that_never_rests_is_given_up(tmp_path: Path) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)

    def write(connection: sqlite3.Connection) -> None:
        with closing(sqlite3.connect(settings.path)) as other, other:
            other.execute("UPDATE grants SET label = label || 'x'")

    with pytest.raises(StoreUnavailable, match="Try again"):
        untouched.read(settings.path, write, timeout=1.0)


@as_root
@pytest.mark.parametrize("state", ["closed", "in use", "crashed", "older"])
def test_a_read_only_mount_is_enough(tmp_path: Path, state: str) -> None:
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'
    mounted = ("unshare", "--mount", "sh", "-euc", script, str(tmp_path))
    if state == "in use":
        with in_use(tmp_path):
            assert read_by(*mounted, folder=tmp_path) == "linear\n"
        return
    if state == "crashed":
        crash(tmp_path)
    else:
        samples.copy(4 if state == "older" else samples.NEWEST, tmp_path)
    before = traces(tmp_path)
    assert read_by(*mounted, folder=tmp_path).split()[0] == "linear"
    assert traces(tmp_path) == before


@as_root
@pytest.mark.parametrize("log", [False, True])
def test_a_user_who_may_only_read_can(tmp_path: Path, *, log: bool) -> None:
    if log:
        crash(tmp_path)
    else:
        samples.copy(samples.NEWEST, tmp_path)
    folder = tmp_path.parent / f"{tmp_path.name}-shown"
    shutil.copytree(tmp_path, folder)
    for path in folder.iterdir():
        path.chmod(0o400 if path.name == "store.key" else 0o644)
    folder.chmod(0o755)
    before = traces(folder)
    with reachable(folder):
        said = read_by(folder=folder, uid=NOBODY)
        assert said.split()[0] == "linear", said
    assert traces(folder) == before


@contextmanager
def reachable(folder: Path) -> Iterator[None]:
    """Let other users enter the folders above one, which pytest makes private, until the block ends."""
    closed = [(above, above.stat().st_mode) for above in folder.parents if not above.stat().st_mode & 0o001]
    for above, mode in closed:
        above.chmod(mode | 0o001)
    try:
        yield
    finally:
        for above, mode in closed:
            above.chmod(mode)


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + b"\xff" * 5000])
async def test_what_is_no_store_is_rejected(tmp_path: Path, content: bytes) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)
    settings.path.write_bytes(content)
    with pytest.raises(StoreRejected, match=r"store\.db"):
        async with reading(settings):
            pass


async def test_a_folder_in_the_place_of_a_store_is_named(tmp_path: Path) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)
    settings.path.unlink()
    settings.path.mkdir()
    with pytest.raises(StoreUnavailable, match="Is a directory"):
        await open_store_read_only(settings)


async def test_a_newer_store_is_not_read(tmp_path: Path) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection:
        connection.execute(f"PRAGMA user_version = {samples.NEWEST + 1}")
    with pytest.raises(StoreRejected, match="newer version"):
        async with reading(settings):
            pass


async def test_tables_that_are_not_ours_are_named(tmp_path: Path) -> None:
    settings = samples.copy(4, tmp_path)
    with closing(sqlite3.connect(settings.path)) as connection:
        connection.execute("CREATE TABLE new_registrations (in_the_way)")
    with pytest.raises(StoreUnavailable, match="new_registrations"):
        async with reading(settings):
            pass


@pytest.mark.parametrize("default", [True, False])
async def test_neither_a_key_nor_a_store_is_made(tmp_path: Path, *, default: bool) -> None:
    settings = replace(samples.copy(samples.NEWEST, tmp_path), default_key=default)
    Path(settings.keys[0].name).unlink()
    with pytest.raises(KeyRejected, match=r"store\.key"):
        async with reading(settings):
            pass
    settings.path.unlink()
    with pytest.raises((KeyRejected, StoreUnavailable)):
        async with reading(settings):
            pass
    assert os.listdir(tmp_path) == []


async def test_a_copy_that_is_read_does_not_change(tmp_path: Path) -> None:
    settings = samples.copy(samples.NEWEST, tmp_path)
    async with reading(settings) as engine:
        held = await Grants(engine).all()
    engine = await open_store_read_only(settings)
    writing = await open_store(settings)
    await Grants(writing).delete(Account("local", "linear"))
    assert await Grants(engine).all() == held
    await writing.close()
    await engine.close()


async def test_who_opens_a_store_while_it_is_read_in_the_same_process_can_write(tmp_path: Path) -> None:
    settings, is_read, may_end = store_settings(tmp_path), threading.Event(), threading.Event()

    def use(connection: sqlite3.Connection) -> int:
        (count,) = connection.execute("SELECT count(*) FROM grants").fetchone()
        is_read.set()
        assert may_end.wait(10)
        return int(count)

    with in_use(tmp_path):
        reading = asyncio.create_task(asyncio.to_thread(untouched.read, settings.path, use, timeout=1.0))
        assert await asyncio.to_thread(is_read.wait, 10)
        opening = asyncio.create_task(open_store(settings))
        # SQLite would open it meanwhile, for reading only.
        await asyncio.wait([opening], timeout=0.5)
        may_end.set()
        assert await reading == 1
        engine = await opening
        await Grants(engine).add(grant("second"))
        await engine.close()


async def test_a_log_whose_index_stays_locked_is_read_too(tmp_path: Path) -> None:
    """As while another process, which stands still, makes the index anew."""
    crash(tmp_path)
    settings = store_settings(tmp_path)
    locking = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 128); print(); input()"
    command = [sys.executable, "-c", locking, str(tmp_path / "store.db-shm")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # SQLite itself tries again for 10 s.
        found = untouched.read(settings.path, lambda it: it.execute("SELECT 1 FROM grants").fetchall(), timeout=0)
        process.communicate(b"\n", timeout=20)
    assert found == [(1,)]
