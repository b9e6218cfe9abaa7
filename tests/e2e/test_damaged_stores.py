"""Stores that are cut off, foreign or damaged, or of which a row does not open, with every command that needs one."""

import asyncio
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fakes.proxy import proxy_process, run_command, until, write_config
from store import samples

COMMANDS = (
    ["status"],
    ["keys", "list"],
    ["principals", "list"],
    ["serve", "--listen", "127.0.0.1:0"],
    ["login", "linear"],
)


def cut_in_a_page(store: Path) -> None:
    os.truncate(store, 20_000)


def garbage(store: Path) -> None:
    store.write_bytes(os.urandom(20_000))


def foreign(store: Path) -> None:
    store.unlink()
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")


def no_key(store: Path) -> None:
    store.with_name("store.key").unlink()


def place(tmp_path: Path) -> tuple[Path, Path]:
    """Return a store of the newest schema and a configuration that names it."""
    (tmp_path / "store").mkdir()
    samples.copy(samples.NEWEST, tmp_path / "store")
    store = tmp_path / "store/store.db"
    config = write_config(tmp_path, {"linear": "http://127.0.0.1:9/mcp"}, store={"url": f"sqlite:///{store}"})
    return store, config


def traces(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.parent.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("damage", "says", "expected"),
    [
        (cut_in_a_page, "damaged or cut off", 1),
        (garbage, "not an SQLite database", 1),
        (foreign, "database of another program", 1),
        (no_key, "key file", 2),
    ],
)
async def test_each_command_says_in_one_line_what_is_wrong_and_changes_nothing(
    tmp_path: Path, damage: Callable[[Path], None], says: str, expected: int
) -> None:
    store, config = place(tmp_path)
    damage(store)
    before = traces(store)
    done = await asyncio.gather(*(run_command(*command, "--config", str(config)) for command in COMMANDS))
    for command, (code, out, err) in zip(COMMANDS, done, strict=True):
        assert (code, out, len(err.splitlines())) == (expected, "", 1), (command, err)
        assert says in err, command
        assert str(store) in err, command
    assert traces(store) == before


@pytest.mark.parametrize("damage", ["access_token = x'0102'", "token_endpoint = 'https://evil.example'", "seal = 17"])
async def test_a_row_that_does_not_open_is_named_and_the_others_are_shown_and_served(
    tmp_path: Path, damage: str
) -> None:
    store, config = place(tmp_path)
    with closing(sqlite3.connect(store)) as connection, connection:
        connection.execute(f"UPDATE grants SET {damage} WHERE id = 1")
    before = traces(store)
    code, out, err = await run_command("status", "--json", "--config", str(config))
    assert code == 0
    assert err.count("a row of grants is skipped") == 1
    assert "canary" not in err
    assert len(err.splitlines()) == 1
    assert "linear" in {row["server"] for row in json.loads(out)}
    assert traces(store) == before
    async with proxy_process(config) as proxy:
        # It is read as soon as the proxy may go on with the renewal that the store says was begun.
        await until(lambda: "a row of grants is skipped" in proxy.log, "a line about the row")
        assert await proxy.stop() == 0
