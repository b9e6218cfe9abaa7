"""Random values that all processes on one store share."""

import asyncio
from pathlib import Path

import pytest

from mcp_auth_proxy.errors import StoreUnavailable
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.shared_secrets import SIZE, SharedSecrets
from store.builders import store_settings


async def test_a_secret_is_made_once_and_is_the_same_for_every_process(tmp_path: Path) -> None:
    first, second = await open_store(store_settings(tmp_path)), await open_store(store_settings(tmp_path))
    try:
        values = await asyncio.gather(*(SharedSecrets(store).get("session-ids") for store in (first, second) * 4))
        assert len(set(values)) == 1
        assert len(values[0]) == SIZE
        assert await SharedSecrets(first).get("other") != values[0]
    finally:
        await first.close()
        await second.close()


async def test_a_secret_survives_a_restart_and_is_not_in_clear_in_the_file(tmp_path: Path) -> None:  # T76
    store = await open_store(store_settings(tmp_path))
    value = await SharedSecrets(store).get("session-ids")
    await store.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("*.db*"))
    assert value not in stored
    assert value.hex().encode() not in stored
    store = await open_store(store_settings(tmp_path))
    assert await SharedSecrets(store).get("session-ids") == value
    await store.close()


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE shared_secrets SET value = (SELECT value FROM shared_secrets WHERE name = 'b') WHERE name = 'a'",
        "UPDATE shared_secrets SET value = x'00' WHERE name = 'a'",
        "UPDATE shared_secrets SET seal = x'00' WHERE name = 'a'",
        "UPDATE shared_secrets SET name = CASE name WHEN 'a' THEN 'x' ELSE 'a' END WHERE name IN ('a', 'b')",
    ],
)
async def test_a_secret_that_somebody_has_changed_is_replaced(engine: Engine, change: str) -> None:
    shared = SharedSecrets(engine)
    a, b = await shared.get("a"), await shared.get("b")
    async with engine.transaction() as transaction:
        await transaction.execute(change)
    replaced = await shared.get("a")
    assert replaced not in (a, b)
    assert await shared.get("a") == replaced


@pytest.mark.sqlite
async def test_a_view_can_not_pass_one_secret_off_as_another(engine: Engine) -> None:
    b = await SharedSecrets(engine).get("b")
    async with engine.transaction() as transaction:
        await transaction.execute("ALTER TABLE shared_secrets RENAME TO hidden")
        columns = "uid, CASE WHEN random() & 1 THEN name ELSE 'a' END AS name, value, seal"
        await transaction.execute(f"CREATE VIEW shared_secrets AS SELECT {columns} FROM hidden")
        # As if it were a table: what is written is ignored.
        await transaction.execute("CREATE TRIGGER swallow INSTEAD OF INSERT ON shared_secrets BEGIN SELECT 1; END")
    for _ in range(300):
        try:
            assert await SharedSecrets(engine).get("a") != b
        except StoreUnavailable:
            continue
