"""A newer version migrates the store while an older process serves it: nothing is refreshed in vain, and none is lost.

The newer version is this one with one migration more, as a process.
"""

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psycopg
import pytest

from fakes import postgresql
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.mcp_client import PlainClient
from fakes.proxy import ProxyProcess, link_in, run_command, serving, start_command, until, write_config
from mcp_auth_proxy.store.postgresql.schema import MARK
from mcp_auth_proxy.store.sqlite import schema

NEWER = """
from mcp_auth_proxy.store.sqlite import schema
schema.MIGRATIONS = (*schema.MIGRATIONS, ("CREATE TABLE later (name TEXT)",))
schema.migrate.__defaults__ = (schema.MIGRATIONS,)
from mcp_auth_proxy.store.postgresql import schema as other
other.MIGRATIONS, other.NEWEST = (*other.MIGRATIONS, ("CREATE TABLE later (name TEXT)",)), other.NEWEST + 1
from mcp_auth_proxy.cli.main import main
main()
"""
NEWER_PROGRAM = (sys.executable, "-c", NEWER)
OURS = len(schema.MIGRATIONS)
on_each_engine = pytest.mark.parametrize(
    "each_engine", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)], indirect=True
)
SAID = f"was migrated to schema {OURS + 1} by a newer version"


@dataclass
class Place:
    """An older process that serves, with a grant, and how to start a newer one on its store."""

    issuer: FakeAuthorizationServer
    config: Path
    older: ProxyProcess
    client: PlainClient
    url: str | None
    """That of the store's database; None if the store is a file."""

    @property
    def store(self) -> Path:
        return self.config.with_name("proxy.db")

    @asynccontextmanager
    async def newer(self) -> AsyncIterator[tuple[ProxyProcess, PlainClient]]:
        options = ("--config", str(self.config), "--listen", "127.0.0.1:0")
        async with serving(*options, program=NEWER_PROGRAM) as proxy, proxy.client("notes") as client:
            yield proxy, client

    async def until_unready(self) -> str:
        """Wait, bounded, until the older process is not ready; return why."""
        async with httpx2.AsyncClient(trust_env=False, timeout=20) as client:
            for _ in range(100):
                answer = await client.get(f"{self.older.origin}/readyz")
                if answer.status_code == 503:
                    return str(answer.json()["reason"])
                await asyncio.sleep(0.02)
        raise AssertionError("it stays ready")


@pytest.fixture
async def place(each_engine: str, servers: Servers, tmp_path: Path) -> AsyncIterator[Place]:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    url = postgresql.database_url(tmp_path)
    store = {} if url is None else {"url": url, "keys": [f"file:{postgresql.write_key(tmp_path)}"]}
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"}, store=store)
    async with (
        serving("--config", str(config), "--listen", "127.0.0.1:0") as older,
        older.client("notes") as client,
    ):
        assert (await consent(link_in((await client.call("echo")).message))).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"
        yield Place(issuer, config, older, client, url)


def rows(place: Place) -> list[tuple[object, ...]]:
    query = "SELECT * FROM grants ORDER BY id"
    if place.url is not None:
        with psycopg.connect(place.url) as database:
            return database.execute(query).fetchall()
    with closing(sqlite3.connect(place.store)) as connection:
        return connection.execute(query).fetchall()


@on_each_engine
async def test_an_older_process_is_unready_beside_a_newer_store_and_refreshes_nothing(place: Place) -> None:
    async with place.newer() as (newer, client):
        assert SAID in await place.until_unready()
        stored = rows(place)
        # What it has in memory is good until it ends.
        assert {(await place.client.call("echo", text="good")).text for _ in range(5)} == {"good"}
        place.issuer.end_access_tokens()
        for _ in range(3):
            reply = await place.client.call("echo")
            assert reply.status == 503
            assert SAID in reply.error["message"]
            assert "Restart" in reply.error["message"]
            assert int(reply.headers["retry-after"]) >= 1
        assert place.issuer.refreshes == 0
        assert rows(place) == stored
        # The newer one does what the older one can't.
        assert (await client.call("echo", text="renewed")).text == "renewed"
        assert (await place.client.call("echo")).status == 503
        assert await newer.stop() == 0
    assert place.older.process.returncode is None
    assert place.older.log.count(SAID) == 1, place.older.log
    assert (await place.older.stop(), place.issuer.refreshes, place.issuer.ledger.reused) == (0, 1, 0)


@on_each_engine
async def test_rows_that_an_older_process_cannot_read_are_not_missing_to_it(place: Place) -> None:
    changes = (
        "UPDATE grants SET seal = {0}, access_token = {0}, refresh_token = {0}",
        "ALTER TABLE grants RENAME COLUMN principal TO owner",
    )
    if place.url is None:
        with closing(sqlite3.connect(place.store)) as connection:
            for change in (*changes, f"PRAGMA user_version = {OURS + 1}"):
                connection.execute(change.format("x'00'"))
            connection.commit()
    else:
        with psycopg.connect(place.url) as database:
            for change in (*changes, f"UPDATE {MARK} SET version = {OURS + 1}"):
                database.execute(change.format("'\\x00'").encode())
    await place.until_unready()
    assert {(await place.client.call("echo", text="good")).text for _ in range(20)} == {"good"}
    assert "skipped" not in place.older.log
    place.issuer.end_access_tokens()
    reply = await place.client.call("echo")
    assert (reply.status, place.issuer.refreshes) == (503, 0)
    assert "/connect/" not in str(reply.message), "nobody is asked to authorize again"


@on_each_engine
async def test_a_migration_waits_for_the_refresh_that_an_older_process_has_begun(place: Place) -> None:
    place.issuer.gates["token"] = gate = asyncio.Event()
    place.issuer.end_access_tokens()
    call = asyncio.create_task(place.client.call("echo", text="in time"))
    await until(lambda: place.issuer.token_requests() == 2)
    starting = await start_command(
        "serve", "--config", str(place.config), "--listen", "127.0.0.1:0", program=NEWER_PROGRAM
    )
    assert starting.stderr is not None
    async with asyncio.timeout(20):
        while b"the migration waits for it" not in await starting.stderr.readline():
            pass
        assert not list(place.store.parent.glob("*.bak"))
        gate.set()
        while b"store: migrating from schema" not in await starting.stderr.readline():
            pass
    starting.terminate()
    await starting.communicate()
    assert (await call).text == "in time"
    async with place.newer() as (newer, client):
        assert (await client.call("echo", text="goes on")).text == "goes on"
        place.issuer.end_access_tokens()
        assert (await client.call("echo", text="and on")).text == "and on"
        assert await newer.stop() == 0
    assert (place.issuer.refreshes, place.issuer.ledger.reused, place.issuer.authorizations) == (2, 0, 1)


async def test_the_commands_of_an_older_version_name_the_copy_to_go_back_to(place: Place) -> None:
    async with place.newer() as (newer, _):
        await newer.stop()
    backup = place.store.with_name(f"proxy.db.schema-{OURS}.bak")
    assert backup.stat().st_mode & 0o777 == 0o600
    before = rows(place)
    commands = (["status"], ["api-keys", "list", "--json"], ["serve"], ["login", "notes"])
    done = await asyncio.gather(*(run_command(*command, "--config", str(place.config)) for command in commands))
    for code, out, err in done:
        assert (code, out, len(err.splitlines())) == (1, "", 1), err
        assert f"it has schema {OURS + 1}, and this version knows schemas up to {OURS}" in err
        assert f"go back to the copy {backup} " in err
    assert rows(place) == before
    await place.older.stop()
    # The way back.
    for name in ("proxy.db", "proxy.db-wal", "proxy.db-shm"):
        place.store.with_name(name).unlink(missing_ok=True)
    backup.rename(place.store)
    async with (
        serving("--config", str(place.config), "--listen", "127.0.0.1:0") as proxy,
        proxy.client("notes") as client,
    ):
        assert (await client.call("echo", text="back")).text == "back"
        assert await proxy.stop() == 0
    assert place.issuer.authorizations == 1
