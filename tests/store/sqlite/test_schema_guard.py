"""A newer version migrates the store while an older process is using it."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mcp_auth_proxy.errors import StoreMigrated, StoreUnavailable
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.sqlite import schema
from store.builders import grant

NEWER = len(schema.MIGRATIONS) + 1
LINEAR = Account("local", "linear")


def migrate(path: Path, *statements: str, to: int = NEWER) -> None:
    """Change the store as a program of another version would, in one transaction."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {to}")
        connection.execute("COMMIT")


@pytest.fixture
async def migrated(engine: Engine, tmp_path: Path) -> Engine:
    """An engine of this version with a grant, on a store that a newer version has migrated since."""
    await Grants(engine).add(grant())
    await engine.changed()
    migrate(tmp_path / "store.db", "ALTER TABLE grants RENAME COLUMN seal TO seals")
    return engine


async def test_a_newer_schema_is_noticed_by_whoever_watches_the_store(migrated: Engine) -> None:
    for _ in range(2):
        with pytest.raises(StoreMigrated, match=f"migrated to schema {NEWER} by a newer version"):
            await migrated.changed()
        with pytest.raises(StoreMigrated):
            await migrated.check_schema()
        with pytest.raises(StoreMigrated):
            await migrated.check_writable()


async def test_rows_of_a_newer_schema_do_not_count_as_missing(migrated: Engine) -> None:
    with pytest.raises(StoreMigrated, match="Restart this one"):
        await Grants(migrated).current(LINEAR)
    # Also if the rows can be read, as an added column has another seal.
    with pytest.raises(StoreMigrated):
        await migrated.fetch_all("SELECT id FROM grants")
    # And if the newer version has no such table any more: nobody is told to put a backup there.
    with pytest.raises(StoreMigrated):
        await migrated.fetch_one("SELECT nothing FROM nowhere")


async def test_nothing_is_written_to_a_newer_schema(migrated: Engine, tmp_path: Path) -> None:
    before = (tmp_path / "store.db-wal").read_bytes()
    with pytest.raises(StoreMigrated):
        await Grants(migrated).add(grant("other"))
    with pytest.raises(StoreMigrated):
        await Grants(migrated).begin_refresh(1, version=1, owner="me", now=0.0)
    with pytest.raises(StoreMigrated):
        await migrated.check_writable()
    assert (tmp_path / "store.db-wal").read_bytes() == before


async def test_a_newer_schema_is_logged_once(migrated: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mcp_auth_proxy"):
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await migrated.changed()
            with pytest.raises(StoreUnavailable):
                await Grants(migrated).all()
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"migrated to schema {NEWER}" in line
    assert "renews nothing" in line


async def test_it_goes_on_if_the_store_has_its_schema_again(migrated: Engine, tmp_path: Path) -> None:
    migrate(tmp_path / "store.db", "ALTER TABLE grants RENAME COLUMN seals TO seal", to=NEWER - 1)
    await migrated.check_schema()
    assert await migrated.changed()
    await migrated.check_writable()
    assert [found.key.account for found in await Grants(migrated).all()] == [LINEAR]


async def test_a_store_that_an_older_one_has_replaced_in_place_is_not_used(engine: Engine, tmp_path: Path) -> None:
    migrate(tmp_path / "store.db", to=NEWER - 2)
    with pytest.raises(StoreMigrated, match=f"replaced by one of schema {NEWER - 2}"):
        await engine.changed()
