"""The servers that were made at run time, as the store keeps them."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import FlowStatus, MadeServer
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.store.servers import KEPT_ADHOC, NEVER_CONNECTED, Servers
from store.builders import NOW, flow, grant, registration
from store.test_sealed_rows import attacker, other_values, write

SECRET = "canary-made-secret"
MADE = MadeServer(
    id="srv_1",
    name="tickets",
    url="https://tickets.example/mcp",
    document={"oauth": {"client_id": "c", "client_secret": SECRET}, "grant_owner": "shared"},
    created_at=NOW,
    updated_at=NOW,
)
ADHOC = MadeServer(
    id="srv_2",
    name="adhoc-notes-1",
    origin="adhoc",
    owner="p-ann",
    url="https://notes.example/mcp",
    created_at=NOW,
    updated_at=NOW,
)


def columns() -> list[str]:
    newest = max((Path(__file__).parent / "stores").glob("schema-*.db"), key=lambda path: int(path.stem.split("-")[1]))
    with closing(sqlite3.connect(newest)) as store:
        return [name for (name,) in store.execute("SELECT name FROM pragma_table_info('servers')")]


async def test_a_server_is_stored_and_read_with_its_settings(engine: Engine) -> None:
    servers = Servers(engine)
    assert await servers.add(MADE)
    assert await servers.add(ADHOC)
    assert await servers.all() == [MADE, ADHOC]
    assert await servers.get("srv_1") == MADE
    assert await servers.get("srv_3") is None
    assert await servers.by_url("p-ann", ADHOC.url) == ADHOC
    assert await servers.by_url("p-bob", ADHOC.url) is None
    assert SECRET not in repr(MADE)


async def test_a_name_belongs_to_one_server_whatever_its_project(engine: Engine) -> None:
    servers = Servers(engine)
    assert await servers.add(MADE)
    assert not await servers.add(replace(MADE, id="srv_3", project_id="other"))
    await servers.add(ADHOC)
    assert await servers.change(replace(ADHOC, name="tickets")) is False
    assert await servers.get("srv_2") == ADHOC


async def test_a_change_is_stored_unless_somebody_was_faster(engine: Engine) -> None:
    servers = Servers(engine)
    await servers.add(MADE)
    changed = replace(MADE, name="issues", url="https://issues.example/mcp", document={}, updated_at=NOW + 5)
    assert await servers.change(changed, unchanged_since=NOW)
    assert await servers.get("srv_1") == changed
    assert await servers.change(replace(changed, name="x"), unchanged_since=NOW) is None
    assert await servers.change(replace(changed, id="srv_9")) is None
    assert await servers.all() == [changed]


async def test_a_principal_has_one_adhoc_server_for_a_url_and_not_too_many(engine: Engine) -> None:
    servers = Servers(engine)
    assert await servers.add_adhoc(ADHOC) == ADHOC
    assert await servers.add_adhoc(replace(ADHOC, id="srv_3", name="adhoc-notes-2")) == ADHOC
    for number in range(1, KEPT_ADHOC):
        one = replace(ADHOC, id=f"x{number}", name=f"adhoc-{number}", url=f"https://{number}.example/")
        assert await servers.add_adhoc(one) == one
    assert await servers.add_adhoc(replace(ADHOC, id="y", name="adhoc-y", url="https://y.example/")) is None
    other = replace(ADHOC, id="y", name="adhoc-y", owner="p-bob")
    assert await servers.add_adhoc(other) == other


async def test_adhoc_servers_that_nobody_connects_are_purged(engine: Engine) -> None:
    servers, flows = Servers(engine), Flows(engine)
    for number, name in enumerate(("never", "granted", "done", "waiting", "noted")):
        url = f"https://{name}.example/"
        await servers.add(replace(ADHOC, id=f"srv_{name}", name=f"adhoc-{name}", url=url, created_at=NOW + number))
    await servers.add(MADE)
    await Grants(engine).add(grant("adhoc-granted"))
    later = NOW + NEVER_CONNECTED + 10
    await flows.save(flow("f-done", "adhoc-done"))
    await flows.finish("f-done", FlowStatus.DONE)
    await flows.save(replace(flow("f-waiting", "adhoc-waiting"), expires_at=later + 60))
    await servers.connected("srv_noted", NOW + 1)
    assert await servers.purge(NOW + NEVER_CONNECTED - 1) == []
    assert [server.name for server in await servers.purge(later)] == ["adhoc-never"]
    # What was connected once stays, even if it is disconnected.
    await servers.forget("adhoc-granted")
    assert [server.name for server in await servers.purge(later + 1000)] == ["adhoc-waiting"]
    assert [server.name for server in await servers.all()] == [
        "tickets", "adhoc-granted", "adhoc-done", "adhoc-noted"
    ]  # fmt: skip


async def test_what_is_stored_for_a_deleted_server_is_forgotten(engine: Engine) -> None:
    servers, flows, registrations = Servers(engine), Flows(engine), Registrations(engine)
    await servers.add(MADE)
    for name in ("tickets", "linear"):
        await Grants(engine).add(grant(name))
        await flows.save(flow(f"f-{name}", name))
        await registrations.save(registration(name))
        await registrations.bind_client(name, "c", "https://as.example")
    assert await servers.delete("srv_1")
    assert not await servers.delete("srv_1")
    await servers.forget("tickets")
    assert [it.key.account.server for it in await Grants(engine).all()] == ["linear"]
    assert [await flows.get("f-tickets"), (await flows.get("f-linear")) is not None] == [None, True]
    assert await registrations.bound_issuer("tickets", "c") is None
    assert await registrations.bound_issuer("linear", "c") == "https://as.example"


@pytest.mark.sqlite
@pytest.mark.parametrize("column", columns())
async def test_a_row_with_a_changed_column_is_missing(engine: Engine, tmp_path: Path, column: str) -> None:
    servers = Servers(engine)
    await servers.add(MADE)
    await servers.add(ADHOC)
    await servers.connected("srv_1", NOW)
    with attacker(tmp_path) as connection:
        row, sibling = connection.execute("SELECT rowid AS place, * FROM servers ORDER BY place").fetchall()
    for value in other_values(column, row, sibling):
        if write(tmp_path, "servers", column, value, sibling):
            left = [server.id for server in await servers.all()]
            assert left == (["srv_1", "srv_2"] if column == "connected_at" else ["srv_2"]), value
            assert write(tmp_path, "servers", column, row[column], sibling)
            assert len(await servers.all()) == 2


@pytest.mark.sqlite
async def test_a_view_passes_no_server_off_as_another(engine: Engine, tmp_path: Path) -> None:
    servers = Servers(engine)
    await servers.add(MADE)
    await servers.add(ADHOC)
    with attacker(tmp_path) as connection:
        names = ", ".join(name for name in columns() if name != "id")
        connection.executescript(
            "ALTER TABLE servers RENAME TO hidden;"
            f"CREATE VIEW servers AS SELECT 'srv_2' AS id, {names} FROM hidden WHERE id = 'srv_1'"
        )
    assert await servers.get("srv_2") is None


@pytest.mark.sqlite
async def test_a_changed_row_does_not_keep_its_name(engine: Engine, tmp_path: Path) -> None:
    servers = Servers(engine)
    await servers.add(MADE)
    with attacker(tmp_path) as connection:
        connection.execute("UPDATE servers SET url = 'https://evil.example/mcp'")
    assert await servers.all() == []
    again = replace(MADE, id="srv_3")
    assert await servers.add(again)
    assert await servers.all() == [again]


@pytest.mark.sqlite
async def test_no_secret_of_a_server_is_in_clear_in_the_file(engine: Engine, tmp_path: Path) -> None:
    """T76."""
    await Servers(engine).add(MADE)
    assert all(SECRET.encode() not in path.read_bytes() for path in tmp_path.iterdir())
