"""Rows that are changed by somebody without the key count as missing, whichever column is changed (T80)."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy.config.settings import KeySource
from mcp_auth_proxy.errors import StoreRejected, StoreUnavailable
from mcp_auth_proxy.models import Account, FlowMode, FlowStatus
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.cipher import Cipher, generate_key_file
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.leases import Leases
from mcp_auth_proxy.store.registrations import Registrations
from mcp_auth_proxy.store.sqlite import bootstrap
from mcp_auth_proxy.store.sqlite import engine as sqlite_engine
from store import samples
from store.builders import NOW, attempt, flow, grant, registration, sha256, store_settings, tokens

OWN_TABLES = {"grants", "registrations", "client_bindings", "flows", "attempts", "confirmations"}
OTHER_TABLES = {
    "principals",
    "identities",
    "api_keys",
    "sessions",
    "shared_secrets",
    "servers",
    "oauth_clients",
    "events",
    "catalogs",
    "mcp_sessions",
    "connection_notes",
}
"""Tables of which the tests beside their modules prove the same."""
LEFT_OUT = {("grants", "refresh_begun_at"), ("grants", "refresh_owner"), ("flows", "poll_owner")} | {
    ("flows", "next_poll_at")
}
"""The columns that nothing but the pace of renewals and polls depends on. Every other one is sealed."""

VALID = {
    "client_auth": "none",
    "client_kind": "configured",
    "grant_type": "device_code",
    "token_type": "DPoP",
    "status": "done",
    "mode": "device",
    "extra_params": '[["audience", "evil"]]',
    "scopes": "read write admin",
}
"""Other values that a row could really have, for columns that do not take any text."""

ASKED_FOR = {
    "grants": ("id", "principal", "server", "account", "issuer"),
    "flows": ("id", "principal", "server", "account"),
    "attempts": ("state_hash",),
    "registrations": ("server", "issuer", "account", "client_redirect_uri"),
    "client_bindings": ("server", "client_id"),
    "confirmations": ("issuer",),
}
"""Columns that rows are looked up by."""

pytestmark = pytest.mark.sqlite
NOT_UTF8 = "\udcff"
LINEAR = Account("local", "linear")
CALLBACK = registration().redirect_uri
ISSUER = "https://as.example"
UPSTREAM = "https://mcp.example"


async def fill(engine: Engine) -> None:
    """Store two rows in each table of OWN_TABLES. The first one has a value in every column that may be NULL."""
    grants, flows, registrations = Grants(engine), Flows(engine), Registrations(engine)
    key = grant().key
    given = replace(grant(), key=replace(key, upstream="https://linear.example", path="/mcp"), dpop_key="canary-dpop")
    client = replace(given.registration, oauth_client="client-1")
    await grants.add(replace(given, label="me", registration=client))
    await grants.add(grant("notes", name="2"))
    device = samples.DEVICE
    waiting = replace(flow(), key=given.key, device=device, dpop_key="canary-dpop", registration=client)
    await flows.save(replace(waiting, mode=FlowMode.HEADLESS, return_origin="https://app.example"))
    await flows.save(flow("flow-2", "notes"))
    for name in ("linear", "notes"):
        await registrations.save(registration(name))
        await registrations.bind_client(name, "c", ISSUER)
    await flows.add_attempt(attempt("state"))
    await flows.add_attempt(attempt("other", "flow-2"))
    for account in (LINEAR, Account("local", "notes")):
        await Confirmations(engine).add(
            account, upstream=UPSTREAM, issuer=ISSUER, sign_in_host="login.example", now=NOW
        )


def columns() -> list[tuple[str, str]]:
    """Return every table and column of the newest schema but those of OTHER_TABLES."""
    with closing(sqlite3.connect(Path(__file__).parent / "stores" / f"schema-{samples.NEWEST}.db")) as store:
        found = store.execute(
            "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
        ).fetchall()
    left_out = {"meta", "sqlite_sequence"} | OTHER_TABLES
    return [(table, column) for table, column in found if table not in left_out]


@contextmanager
def attacker(folder: Path) -> Iterator[sqlite3.Connection]:
    """Write to the store without a key."""
    with closing(sqlite3.connect(folder / "store.db")) as connection, connection:
        connection.row_factory = sqlite3.Row
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        yield connection


def other_values(column: str, row: sqlite3.Row, sibling: sqlite3.Row) -> list[Any]:
    """Return other values for a column of ``row``: valid ones first, then those that no row of ours has."""
    now = row[column]
    values: list[Any]
    match now:
        case str():
            values = [VALID.get(column, now + "2"), "", b"blob", 7, NOT_UTF8]
        case bytes():
            values = [sibling[column], now[:-1] + bytes([now[-1] ^ 1]), b"", "text", None]
        case int() | float():
            values = [now + 1, 0, -now, 9e18, "text", None]
        case _:
            values = ["text", 1.5, b"blob"]
    return [value for value in values if value != now]


async def seen(engine: Engine, folder: Path, table: str) -> int:
    """Return how many rows of a table some look-up returns, asked for with what is in their columns now."""
    with attacker(folder) as connection:
        rows = connection.execute(f"SELECT * FROM {table}").fetchall()
    grants, flows, registrations = Grants(engine), Flows(engine), Registrations(engine)

    async def found(row: sqlite3.Row) -> object:
        match table:
            case "grants":
                account = Account(row["principal"], row["server"], row["account"])
                by_key = [it for it in await grants.servers_of_issuer(row["issuer"]) if it.account == account]
                listed = [it for it in await grants.all() if it.id == row["id"]]
                return by_key or listed or await grants.get(row["id"]) or await grants.current(account)
            case "flows":
                account = Account(row["principal"], row["server"], row["account"])
                polled = [it for it in await flows.devices(NOW) if it.id == row["id"]]
                shown = [it for it in await flows.unanswered() if it.id == row["id"]] or await flows.newest(
                    account, NOW
                )
                return polled or shown or await flows.get(row["id"]) or await flows.live(account, NOW)
            case "attempts":
                return await flows.find_attempt(row["state_hash"])
            case "registrations":
                uri = row["client_redirect_uri"]
                return await registrations.find(row["server"], row["issuer"], uri, account=row["account"])
            case "client_bindings":
                return await registrations.bound_issuer(row["server"], row["client_id"])
            case _:
                account = Account(row["principal"], row["server"], row["account"])
                return await Confirmations(engine).contains(
                    account, upstream=row["upstream"], issuer=row["issuer"], sign_in_host=row["sign_in_host"]
                )

    total = 0
    for row in rows:
        # A text that is not UTF-8 can't be asked for.
        if not any(isinstance(value, str) and not value.isprintable() for value in tuple(row)):
            total += bool(await found(row))
    return total


def test_the_tables_are_those_that_are_known_here() -> None:
    assert {table for table, _ in columns()} == OWN_TABLES
    assert set(columns()) > LEFT_OUT


@pytest.mark.parametrize(("table", "column"), [pytest.param(*it, id=".".join(it)) for it in columns()])
async def test_a_row_with_a_changed_column_is_missing(engine: Engine, tmp_path: Path, table: str, column: str) -> None:
    await fill(engine)
    with attacker(tmp_path) as connection:
        row, sibling = connection.execute(f"SELECT rowid AS place, * FROM {table} ORDER BY place").fetchall()
    values = other_values(column, row, sibling)
    for value in values:
        if not write(tmp_path, table, column, value, sibling):
            continue
        if (table, column) not in LEFT_OUT:
            assert await seen(engine, tmp_path, table) == 1, value
        elif value == values[0]:
            assert await seen(engine, tmp_path, table) == 2, value
        assert write(tmp_path, table, column, row[column], sibling)
        assert await seen(engine, tmp_path, table) == 2


def write(folder: Path, table: str, column: str, value: object, sibling: sqlite3.Row) -> bool:
    """Set a column of the row that is not ``sibling``. Return False if the database does not take the value."""
    new = "CAST(x'ff' AS TEXT)" if value == NOT_UTF8 else ":value"
    sql = f"UPDATE {table} SET {column} = {new} WHERE rowid <> :sibling"
    with attacker(folder) as connection:
        try:
            changed = connection.execute(sql, {"value": value, "sibling": sibling["place"]}).rowcount
        except sqlite3.IntegrityError:
            return False
    assert changed == 1
    return True


EVIL = "https://evil.example/token"


def tamper(folder: Path, sql: str, **values: object) -> None:
    with attacker(folder) as connection:
        connection.execute(sql, values)


@pytest.mark.parametrize("column", ["token_endpoint", "server", "version", "id", "upstream", "dpop_key"])
async def test_a_changed_grant_does_not_block_the_next_one(engine: Engine, tmp_path: Path, column: str) -> None:
    await fill(engine)
    grants = Grants(engine)
    highest = 9223372036854775807
    values = {"version": highest, "id": highest, "server": "warehouse", "dpop_key": None}
    tamper(tmp_path, f"UPDATE grants SET {column} = :it WHERE server = 'linear'", it=values.get(column, EVIL))
    for name in ("linear", "warehouse"):
        account = Account("local", name)
        assert await grants.current(account) is None
        stored = await grants.add(grant(name, name="new"))
        assert stored.version == 1
        assert await grants.current(account) == stored
        assert await grants.begin_refresh(stored.id, version=1, owner="o", now=NOW)
        renewed = await grants.renewed(stored.id, version=1, owner="o", tokens=tokens("newer"))
        assert renewed == await grants.current(account)


async def test_other_changed_rows_do_not_block_the_next_ones(engine: Engine, tmp_path: Path) -> None:
    await fill(engine)
    registrations, flows = Registrations(engine), Flows(engine)
    for table in ("registrations", "client_bindings", "confirmations"):
        tamper(tmp_path, f"UPDATE {table} SET issuer = :evil", evil=EVIL)
        assert await seen(engine, tmp_path, table) == 0
    await registrations.save(registration(issuer=EVIL))
    assert await registrations.find("linear", EVIL, CALLBACK) == registration(issuer=EVIL)
    assert await registrations.bind_client("linear", "c", ISSUER) == ISSUER
    assert await registrations.bound_issuer("linear", "c") == ISSUER
    await Confirmations(engine).add(LINEAR, upstream=UPSTREAM, issuer=EVIL, sign_in_host="login.example", now=NOW)
    assert await Confirmations(engine).contains(LINEAR, upstream=UPSTREAM, issuer=EVIL, sign_in_host="login.example")
    tamper(tmp_path, "UPDATE flows SET token_endpoint = :evil", evil=EVIL)
    await flows.save(flow())
    assert await flows.get("flow-1") == flow()


async def test_no_later_write_seals_what_was_changed(engine: Engine, tmp_path: Path) -> None:
    grants, flows = Grants(engine), Flows(engine)
    stored = await grants.add(grant())
    assert await grants.begin_refresh(stored.id, version=1, owner="o", now=NOW)
    await flows.save(flow())
    await flows.add_attempt(attempt("state"))
    for table in ("grants", "flows"):
        tamper(tmp_path, f"UPDATE {table} SET token_endpoint = :evil", evil=EVIL)
    assert await grants.renewed(stored.id, version=1, owner="o", tokens=tokens("2")) is None
    assert not await grants.begin_refresh(stored.id, version=1, owner="o", now=NOW)
    assert not await grants.end(stored.id, version=1, reason="r", now=NOW)
    assert not await flows.claim_poll("flow-1", owner="o", now=NOW, next_poll_at=NOW)
    assert await grants.add_from(grant("notes"), "flow-1") is None
    assert await flows.take_attempt(sha256("state"), NOW) is None
    await flows.cancel(LINEAR)
    assert not await flows.finish("flow-1", FlowStatus.FAILED)
    assert await grants.all() == []
    assert await flows.get("flow-1") is None
    # The new grant of this account ends the others, but only those that are ours.
    new = await grants.add(grant("linear", "https://b.example"))
    assert await grants.all() == [new]


async def test_what_has_ended_does_not_come_back(engine: Engine, tmp_path: Path) -> None:
    grants, flows = Grants(engine), Flows(engine)
    stored = await grants.add(grant())
    await grants.end(stored.id, version=1, reason="r", now=NOW)
    await flows.save(flow())
    await flows.finish("flow-1", FlowStatus.DONE)
    tamper(tmp_path, "UPDATE grants SET ended_at = NULL, ended_reason = ''")
    tamper(tmp_path, "UPDATE flows SET status = 'pending'")
    assert await grants.all() == []
    assert await flows.get("flow-1") is None


async def test_two_grants_whose_ids_were_exchanged_do_not_get_each_others_tokens(
    engine: Engine, tmp_path: Path
) -> None:
    grants = Grants(engine)
    linear, notes = await grants.add(grant()), await grants.add(grant("notes"))
    assert await grants.begin_refresh(linear.id, version=1, owner="o", now=NOW)
    for old, new in ((linear.id, 1000), (notes.id, linear.id), (1000, notes.id)):
        tamper(tmp_path, "UPDATE grants SET id = :new, refresh_owner = 'o' WHERE id = :old", old=old, new=new)
    assert await grants.renewed(linear.id, version=1, owner="o", tokens=tokens("of linear")) is None
    assert await grants.all() == []


@pytest.mark.parametrize("event", ["INSERT", "UPDATE OF version", "UPDATE OF ended_at", "UPDATE OF seal"])
async def test_a_trigger_in_the_database_gets_nothing_sealed(engine: Engine, tmp_path: Path, event: str) -> None:
    tamper(
        tmp_path,
        f"CREATE TRIGGER evil AFTER {event} ON grants BEGIN UPDATE grants SET token_endpoint = '{EVIL}'; END",
    )
    grants = Grants(engine)
    stored = await grants.add(grant())
    await grants.begin_refresh(stored.id, version=1, owner="o", now=NOW)
    await grants.renewed(stored.id, version=1, owner="o", tokens=tokens("2"))
    await grants.end(stored.id, version=2, reason="r", now=NOW)
    assert EVIL not in [it.endpoints.token for it in await grants.all()]


@pytest.mark.parametrize(
    "sql",
    [
        *(f"ALTER TABLE {table} RENAME COLUMN {it} TO evil" for table in ("grants", "flows") for it in ("seal", "uid")),
        *(f"ALTER TABLE grants RENAME COLUMN {it} TO evil" for it in ("server", "issuer", "access_token")),
        *(f"DROP TABLE {table}" for table in ("grants", "flows", "attempts")),
        "ALTER TABLE grants RENAME TO evil; CREATE VIEW grants AS SELECT * FROM evil",
        "CREATE TRIGGER evil BEFORE INSERT ON grants BEGIN SELECT RAISE(IGNORE); END",
        "CREATE TRIGGER evil BEFORE INSERT ON grants BEGIN SELECT RAISE(ABORT, '\x1b[31m'); END",
        "CREATE TRIGGER evil BEFORE DELETE ON flows BEGIN SELECT RAISE(ROLLBACK, 'evil'); END",
        "INSERT INTO meta VALUES (NULL, 5); INSERT INTO meta VALUES (x'00', 5)",
    ],
)
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
async def test_other_tables_are_an_error_of_the_store_at_most(tmp_path: Path, sql: str, running: bool) -> None:
    engine = await open_store(store_settings(tmp_path))
    await fill(engine)
    if not running:
        await engine.close()
    with attacker(tmp_path) as connection:
        connection.executescript(sql)
    if not running:
        engine = await open_store(store_settings(tmp_path))
    grants, flows = Grants(engine), Flows(engine)
    for work in (
        grants.all,
        lambda: grants.current(LINEAR),
        lambda: grants.add(grant()),
        lambda: grants.delete(LINEAR),
        lambda: flows.live(LINEAR, NOW),
        lambda: flows.newest(LINEAR, NOW),
        flows.unanswered,
        lambda: flows.save(flow()),
        lambda: flows.begin(flow("flow-3"), adopts=lambda other: False, opened_by="elsewhere:1:a"),
        lambda: flows.tell(flow(), "https://app.example"),
        lambda: flows.purge(NOW * 2),
        lambda: Registrations(engine).add(registration(), replaces=None),
        lambda: Leases(engine).claim("name", owner="elsewhere:1:a", now=NOW, longest=1.0),
        lambda: Leases(engine).purge(NOW),
        lambda: flows.find_attempt("state"),
    ):
        try:
            await work()
        except StoreUnavailable as error:
            assert len(str(error)) < 500
    await engine.close()


@pytest.mark.parametrize("table", sorted(OWN_TABLES))
async def test_a_view_can_not_pass_one_row_off_as_another(engine: Engine, tmp_path: Path, table: str) -> None:
    await fill(engine)
    with attacker(tmp_path) as connection:
        names = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
        lies = {name: f"CASE WHEN random() & 1 THEN {name} ELSE asked_for.other END" for name in ASKED_FOR[table]}
        connection.execute(f"ALTER TABLE {table} RENAME TO true_{table}")
        connection.execute("CREATE TABLE asked_for (other)")
        connection.execute(
            f"CREATE VIEW {table} AS SELECT {', '.join(f'{lies.get(it, it)} AS {it}' for it in names)} "
            f"FROM true_{table}, asked_for"
        )
        connection.execute("INSERT INTO asked_for VALUES ('another'), (77)")
    grants, flows, registrations = Grants(engine), Flows(engine), Registrations(engine)
    another = Account("another", "another", "another")
    for _ in range(300):
        match table:
            case "grants":
                assert await grants.get(77) is None
                assert await grants.servers_of_issuer("another") == []
                assert await grants.current(another) is None
            case "flows":
                assert await flows.get("another") is None
                assert await flows.live(another, NOW) is None
                assert await flows.newest(another, NOW) is None
            case "attempts":
                assert await flows.find_attempt("another") is None
            case "registrations":
                assert await registrations.find("another", "another", "another", account="another") is None
            case "client_bindings":
                assert await registrations.bound_issuer("another", "another") is None
            case _:
                confirmed = await Confirmations(engine).contains(
                    LINEAR, upstream=UPSTREAM, issuer="another", sign_in_host="login.example"
                )
                assert not confirmed


async def test_a_view_without_an_end_is_interrupted(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(engine)
    monkeypatch.setattr(sqlite_engine, "_STATEMENT_TIMEOUT", 0.2)
    tamper(tmp_path, "ALTER TABLE grants RENAME TO true_grants")
    endless = "WITH RECURSIVE it(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM it)"
    tamper(tmp_path, f"CREATE VIEW grants AS {endless} SELECT true_grants.* FROM true_grants, it WHERE n < 0")
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            await Grants(engine).all()
    assert await Flows(engine).get("flow-1") is not None


async def test_thousands_of_forged_rows_stop_nobody_and_do_not_fill_the_log(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(engine)
    numbers = "WITH RECURSIVE it(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM it LIMIT 20000)"
    names = "principal, account, server, upstream, issuer, sign_in_host, confirmed_at, seal"
    tamper(
        tmp_path,
        f"CREATE TABLE forged AS {numbers} SELECT lower(hex(randomblob(16))) AS uid, {names} FROM it, confirmations "
        "WHERE server = 'linear'",
    )
    with attacker(tmp_path) as connection:
        connection.execute("ALTER TABLE confirmations RENAME TO old")
        connection.execute("ALTER TABLE forged RENAME TO confirmations")
    host = "login.example"
    waiting = asyncio.ensure_future(
        Confirmations(engine).contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=host)
    )
    longest, before = 0.0, time.thread_time()
    while not waiting.done():
        await asyncio.sleep(0)
        longest, before = max(longest, time.thread_time() - before), time.thread_time()
    assert not await waiting
    assert longest < 0.2
    assert len(caplog.records) <= 21


async def test_rows_stay_valid_when_the_key_is_rotated(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    engine = await open_store(settings)
    await fill(engine)
    await engine.close()
    generate_key_file(tmp_path / "new.key")
    newer = KeySource(kind="file", name=str(tmp_path / "new.key"))
    settings = replace(settings, keys=(newer, *settings.keys), default_key=False)
    engine = await open_store(settings)
    for table in OWN_TABLES:
        assert await seen(engine, tmp_path, table) == 2
    grants = Grants(engine)
    held = await grants.current(LINEAR)
    assert held is not None
    assert await grants.begin_refresh(held.id, version=1, owner="o", now=NOW)
    renewed = await grants.renewed(held.id, version=1, owner="o", tokens=tokens("2"))
    assert renewed == await grants.current(LINEAR)
    row = await engine.fetch_one("SELECT seal FROM grants WHERE id = :id", {"id": held.id})
    assert row is not None
    assert row["seal"][1:5].hex() == engine.cipher.key_ids[0]
    tamper(tmp_path, "UPDATE grants SET token_endpoint = :evil", evil=EVIL)
    assert await grants.all() == []
    await engine.close()


async def test_the_log_has_one_line_for_a_changed_row_which_names_its_server(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(engine)
    tamper(tmp_path, "UPDATE grants SET token_endpoint = :evil WHERE server = 'linear'", evil=EVIL)
    with caplog.at_level(logging.DEBUG, "mcp_auth_proxy"):
        for _ in range(3):
            assert len(await Grants(engine).all()) == 1
            assert await Grants(engine).current(LINEAR) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert "a row of grants is skipped" in line
    assert "has changed it" in line
    assert "'linear'" in line
    assert "canary" not in line


async def test_what_is_in_a_changed_row_does_no_harm_in_the_log(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(engine)
    long = "\x1b[31m\n" * 10_000
    tamper(tmp_path, "UPDATE grants SET server = :it WHERE server = 'linear'", it=long)
    tamper(tmp_path, "UPDATE grants SET uid = :it WHERE server = 'notes'", it=long)
    with caplog.at_level(logging.DEBUG, "mcp_auth_proxy"):
        assert await Grants(engine).all() == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(len(line) < 500 and line.isprintable() for line in lines)


async def test_a_store_that_is_made_to_look_old_is_refused(tmp_path: Path) -> None:
    settings = store_settings(tmp_path)
    engine = await open_store(settings)
    await fill(engine)
    await engine.close()
    make_old(tmp_path)
    with pytest.raises(StoreRejected, match="was changed by something else"):
        await open_store(settings)


async def test_a_store_that_is_made_to_look_old_after_it_was_inspected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = store_settings(tmp_path)
    engine = await open_store(settings)
    await Registrations(engine).bind_client("linear", "client", ISSUER)
    await engine.close()
    inspected = bootstrap.inspect

    def inspect(path: Path, cipher: Cipher) -> int:
        found = inspected(path, cipher)
        make_old(tmp_path)
        return found

    monkeypatch.setattr(bootstrap, "inspect", inspect)
    with pytest.raises(StoreRejected, match="was changed by something else"):
        await open_store(settings)
    assert not list(tmp_path.glob("*.bak"))


async def test_the_key_check_of_an_older_copy_gets_no_row_sealed(tmp_path: Path) -> None:
    settings = samples.copy(5, tmp_path)
    engine = await open_store(settings)
    stored = await Grants(engine).add(grant("new"))
    await engine.close()
    make_old(tmp_path)
    with attacker(tmp_path) as connection, closing(sqlite3.connect(tmp_path / "store.db.schema-5.bak")) as copy:
        checks = copy.execute("SELECT name, value FROM meta").fetchall()
        connection.executemany("UPDATE meta SET value = ? WHERE name = ?", [(it[1], it[0]) for it in checks])
    engine = await open_store(settings)
    grants = Grants(engine)
    assert await grants.get(stored.id) is None
    assert await grants.all() == []
    await engine.close()


def make_old(folder: Path) -> None:
    """Make the store look like one of schema 5, whose rows the next start would seal."""
    with attacker(folder) as connection:
        connection.execute("UPDATE grants SET token_endpoint = :evil", {"evil": EVIL})
        indexes = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL AND tbl_name = 'grants'"
        for (index,) in connection.execute(indexes).fetchall():
            connection.execute(f"DROP INDEX {index}")
        for table in ("grants", "flows"):
            for column in ("path", "oauth_client"):
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        health = ("renewal_refused_at", "failing_since", "renewal_failure", "next_try_at", "rejected_since")
        for column in ("label", "refresh_expires_at", *health):
            connection.execute(f"ALTER TABLE grants DROP COLUMN {column}")
        for column in ("mode", "return_origin"):
            connection.execute(f"ALTER TABLE flows DROP COLUMN {column}")
        for table in ("grants", "flows", "attempts", "registrations"):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN seal")
        for table in ("confirmations", *OTHER_TABLES):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("PRAGMA user_version = 5")
