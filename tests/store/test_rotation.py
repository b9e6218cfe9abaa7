"""Rotation: whatever a row holds, it opens with the new key alone afterwards, and says what it said before."""

import asyncio
import base64
import sqlite3
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import postgresql
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import StoreRejected, StoreUnavailable
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.cipher import Cipher, Key
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.keys import checked_keys
from mcp_auth_proxy.store.rotation import ROWS_IN_TRANSACTION, Progress, rotate
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, new_uid, row_columns
from mcp_auth_proxy.store.sealed_tables import SEALED_COLUMNS, rows_by_key
from store import samples
from store.builders import NOW, grant, store_settings, tokens

KEYS = {"OLD": base64.b64decode(postgresql.KEY), "NEW": b"n" * 32, "LOST": b"l" * 32}
ENVIRON = {name: base64.b64encode(secret).decode() for name, secret in KEYS.items()}
IDS = {name: Key.of(secret).id for name, secret in KEYS.items()}
BOTH = Cipher([Key.of(KEYS["NEW"]), Key.of(KEYS["OLD"])])
NEW_ALONE = Cipher([Key.of(KEYS["NEW"])])

VALUES: Mapping[str, st.SearchStrategy[object]] = {
    "TEXT": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    "INTEGER": st.integers(min_value=-(2**31), max_value=2**31),
    # SQLite turns -0.0 into 0.
    "DOUBLE PRECISION": st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0),
    "BOOLEAN": st.booleans().map(int),
}


def store_with(folder: Path, *names: str) -> StoreSettings:
    keys = tuple(KeySource(kind="env", name=name) for name in names)
    return replace(store_settings(folder), keys=keys, default_key=False, keys_named=True)


@asynccontextmanager
async def opened(folder: Path, *names: str) -> AsyncIterator[Engine]:
    engine = await open_store(store_with(folder, *names), environ=ENVIRON)
    try:
        yield engine
    finally:
        await engine.close()


def quiet(progress: Progress) -> None:
    pass


@asynccontextmanager
async def filled(folder: Path) -> AsyncIterator[Engine]:
    """A store that was filled under the old key and is opened with the new one in front."""
    async with opened(folder, "OLD") as engine:
        await samples.write(engine, samples.contents(samples.NEWEST))
    async with opened(folder, "NEW", "OLD") as engine:
        yield engine


def columns_of(connection: sqlite3.Connection, table: str) -> list[tuple[str, str, bool]]:
    """Return name, type and whether it may be NULL of the columns of a table."""
    rows = connection.execute(f"PRAGMA table_info({table})").fetchall()
    return [(name, kind, not (required or key)) for _, name, kind, required, _, key in rows]


@pytest.mark.sqlite
async def test_every_sealed_column_of_the_schema_is_known(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD"):
        pass
    connection = sqlite3.connect(tmp_path / "store.db")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    found = {
        table: {name for name, kind, _ in columns_of(connection, table) if kind == "BLOB"}
        for table in tables - {"meta", "sqlite_sequence"}
    }
    assert found == {table: set(columns) for table, columns in SEALED_COLUMNS.items()}


async def test_everything_opens_with_the_new_key_alone(tmp_path: Path) -> None:  # F12
    async with filled(tmp_path) as engine:
        before = await Grants(engine).all()
        done = await rotate(engine, quiet)
        assert set(await rows_by_key(engine)) == {IDS["NEW"]}
        assert await checked_keys(engine) == {IDS["NEW"]}
    assert (done.skipped, done.left, done.late, done.broken) == (0, 0, False, {})
    assert done.resealed == done.total > 10
    async with opened(tmp_path, "NEW") as engine:
        assert await Grants(engine).all() == before
        again = await rotate(engine, quiet)
    assert (again.resealed, again.skipped) == (0, done.resealed)
    with pytest.raises(StoreRejected, match="Wrong key"):
        async with opened(tmp_path, "OLD"):
            pass


def values_for(data: st.DataObject, kinds: list[tuple[str, str, bool]], sealed: tuple[str, ...]) -> dict[str, object]:
    """Draw the columns of a row. Those that are sealed are texts here."""
    found: dict[str, object] = {}
    for name, kind, optional in kinds:
        if name == SEAL:
            continue
        if optional and data.draw(st.booleans()):
            found[name] = None
        else:
            found[name] = data.draw(VALUES["TEXT" if name in sealed else kind])
    return found


def seal(cipher: Cipher, table: str, values: dict[str, object], sealed: tuple[str, ...]) -> dict[str, object]:
    row = RowCipher(cipher, table, str(values["uid"]))
    columns = {
        name: row.seal(name, str(value)) if name in sealed and value is not None else value
        for name, value in values.items()
    }
    return {**columns, SEAL: row.seal_row(columns)}


@pytest.mark.sqlite
def test_any_row_of_any_table_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_auth_proxy.store.rotation._PASS_PAUSE", 0)
    with asyncio.Runner() as runner:
        store = opened(tmp_path, "NEW", "OLD")
        engine = runner.run(store.__aenter__())
        connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)

        @settings(max_examples=40)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            table = data.draw(st.sampled_from(sorted(SEALED_COLUMNS)))
            values = {**values_for(data, columns_of(connection, table), SEALED_COLUMNS[table]), "uid": new_uid()}
            cipher = Cipher([Key.of(KEYS[data.draw(st.sampled_from(["OLD", "NEW"]))])])
            try:
                runner.run(check_survival(engine, connection, table, values, cipher))
            finally:
                connection.execute(f"DELETE FROM {table}")

        check()
        connection.close()
        runner.run(store.__aexit__(None, None, None))


async def check_survival(
    engine: Engine, connection: sqlite3.Connection, table: str, values: dict[str, object], cipher: Cipher
) -> None:
    sealed = SEALED_COLUMNS[table]
    row = seal(cipher, table, values, sealed)
    # References to other tables are not checked on this connection.
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})", row)
    done = await rotate(engine, quiet)
    assert (done.resealed + done.skipped, done.broken) == (1, {})
    found = await engine.fetch_one(f"SELECT * FROM {table}")
    assert found is not None
    opening = RowCipher(NEW_ALONE, table, str(values["uid"]))
    opening.check_row(row_columns(found))
    for name, value in values.items():
        assert (opening.open_if(name, found[name]) if name in sealed else found[name]) == value


async def rows_but_kept(engine: Engine) -> list[Columns]:
    rows = await engine.fetch_all("SELECT * FROM grants WHERE server <> 'kept' ORDER BY id")
    return [row_columns(row) for row in rows]


async def test_rows_that_do_not_open_are_left_alone_and_named(tmp_path: Path) -> None:
    async with opened(tmp_path, "LOST", "OLD") as engine:
        await Grants(engine).add(grant("lost"))
        engine.cipher = Cipher([Key.of(KEYS["OLD"])])
        await Grants(engine).add(grant("kept"))
        await Grants(engine).add(grant("changed"))
    async with opened(tmp_path, "NEW", "OLD") as engine:
        async with engine.transaction() as transaction:
            sql = "UPDATE grants SET token_endpoint = 'https://evil.example' WHERE server = 'changed'"
            await transaction.execute(sql)
        before = await rows_but_kept(engine)
        done = await rotate(engine, quiet)
        assert await rows_but_kept(engine) == before
    uids = {str(row["server"]): str(row["uid"]) for row in before}
    assert (done.resealed, done.left) == (1, 0)
    assert {row.uid: row.table for row in done.broken.values()} == {uids["lost"]: "grants", uids["changed"]: "grants"}
    problems = {row.uid: row.problem for row in done.broken.values()}
    assert IDS["LOST"] in problems[uids["lost"]]
    assert "has changed it" in problems[uids["changed"]]
    assert "canary" not in str(problems)


@pytest.mark.sqlite
async def test_rows_that_others_have_put_there_do_not_stop_it(tmp_path: Path) -> None:
    async with filled(tmp_path) as engine:
        connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        for uid in ("", "zzz", b"\xff", "\x1b[31m" * 50):
            connection.execute(
                "INSERT INTO client_bindings (uid, server, client_id, issuer, seal) VALUES (?, ?, '', '', ?)",
                (uid, repr(uid), b"x" * 40),
            )
        connection.execute(
            "INSERT INTO client_bindings (uid, server, client_id, issuer, seal)"
            " VALUES (CAST(x'c328' AS TEXT), 's', '', '', 'text')"
        )
        connection.close()
        done = await rotate(engine, quiet)
    assert {row.uid for row in done.broken.values()} == {"?"}
    # An empty id comes before every other, and is not looked at.
    assert len(done.broken) == 4
    async with opened(tmp_path, "NEW") as engine:
        assert len(await Grants(engine).all()) == 3


async def test_a_rotation_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.resealed >= ROWS_IN_TRANSACTION:
            raise Stopped

    async with opened(tmp_path, "OLD") as engine:
        for number in range(2 * ROWS_IN_TRANSACTION):
            await Grants(engine).add(grant(f"s{number}"))
    async with opened(tmp_path, "NEW", "OLD") as engine:
        with pytest.raises(Stopped):
            await rotate(engine, stop)
        assert len(await Grants(engine).all()) == 2 * ROWS_IN_TRANSACTION
        done = await rotate(engine, quiet)
    assert (done.skipped, done.resealed) == (ROWS_IN_TRANSACTION, ROWS_IN_TRANSACTION)


async def test_a_row_that_another_process_changes_meanwhile_keeps_the_change(tmp_path: Path) -> None:
    """Renewals go on while the store is rotated, each by a process that has both keys."""
    async with filled(tmp_path) as engine, opened(tmp_path, "NEW", "OLD") as other:
        grants = Grants(other)
        rotating = asyncio.create_task(rotate(engine, quiet))
        renewals = 0
        while not rotating.done() or not renewals:
            held = await grants.current(Account("local", "linear"))
            assert held is not None
            owner = f"elsewhere:1:{renewals}"
            assert await grants.begin_refresh(
                held.id, version=held.version, owner=owner, now=NOW + 1000 + renewals * 100
            )
            renewals += 1
            new = tokens(f"r{renewals}")
            assert await grants.renewed(held.id, version=held.version, owner=owner, tokens=new)
        done = await rotating
        assert done.broken == {}
    async with opened(tmp_path, "NEW") as engine:
        found = await Grants(engine).current(Account("local", "linear"))
        assert found is not None
        assert found.tokens.access_token == f"canary-access-r{renewals}"


async def test_what_others_seal_with_another_key_meanwhile_is_found(tmp_path: Path) -> None:
    async with filled(tmp_path) as engine, opened(tmp_path, "OLD", "NEW") as other:

        async def add(number: int) -> None:
            await Grants(other).add(grant(f"late{number}"))

        added: list[asyncio.Task[None]] = []

        def show(progress: Progress) -> None:
            added.append(asyncio.ensure_future(add(len(added))))

        done = await rotate(engine, show)
        await asyncio.gather(*added)
        assert done.late
        # A process that goes on sealing with another key does not keep the rotation from its end.
        await rotate(engine, quiet)
        assert set(await rows_by_key(engine)) == {IDS["NEW"]}


@pytest.mark.sqlite
async def test_a_store_that_cannot_be_written_for_a_moment_is_tried_again(tmp_path: Path) -> None:
    async with filled(tmp_path) as engine:
        connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        connection.execute("CREATE TRIGGER full BEFORE UPDATE ON grants BEGIN SELECT RAISE(FAIL, 'full'); END")
        asyncio.get_running_loop().call_later(0.5, connection.execute, "DROP TRIGGER full")
        done = await rotate(engine, quiet)
        connection.close()
    assert done.resealed == done.total


@pytest.mark.sqlite
async def test_a_store_that_cannot_be_written_at_all_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp_auth_proxy.store.rotation._RETRY_PAUSE", 0.01)
    async with filled(tmp_path) as engine:
        connection = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        connection.execute("CREATE TRIGGER full BEFORE UPDATE ON grants BEGIN SELECT RAISE(FAIL, 'full'); END")
        connection.close()
        with pytest.raises(StoreUnavailable):
            await rotate(engine, quiet)


async def test_a_row_counts_once_for_each_key_that_it_needs(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD") as engine:
        await Grants(engine).add(grant())
    async with opened(tmp_path, "NEW", "OLD") as engine:
        held = (await Grants(engine).all())[0]
        await Grants(engine).set_label(held.id, "me")
        # The seal of the row is new, the secrets in it are old.
        assert await rows_by_key(engine) == {IDS["OLD"]: 1, IDS["NEW"]: 1}


async def test_a_key_whose_check_is_there_but_no_row_is_wrong(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD") as engine:
        await Grants(engine).add(grant())
    # The new key leaves its check behind, and seals nothing.
    async with opened(tmp_path, "NEW", "OLD"):
        pass
    with pytest.raises(StoreRejected, match=f"Wrong key: every row .* with key {IDS['OLD']}, but .* has {IDS['NEW']}"):
        async with opened(tmp_path, "NEW", "LOST"):
            pass
    async with opened(tmp_path, "OLD") as engine:
        assert len(await Grants(engine).all()) == 1
        # The refused start has written nothing.
        assert await checked_keys(engine) == {IDS["OLD"], IDS["NEW"]}


async def test_an_empty_store_opens_with_each_key_that_has_its_check(tmp_path: Path) -> None:
    async with opened(tmp_path, "NEW", "OLD"):
        pass
    async with opened(tmp_path, "OLD"):
        pass
