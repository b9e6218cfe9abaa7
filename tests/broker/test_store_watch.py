"""What other processes write to the store, noticed by a running one."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from broker.broker_setup import NOTES, BrokerSetup, broker_setup
from fakes import postgresql
from fakes.authorization_server import FakeAuthorizationServer
from fakes.proxy import until
from mcp_auth_proxy.broker import store_watch
from mcp_auth_proxy.errors import AuthorizationDenied, StoreUnavailable
from mcp_auth_proxy.models import LOCAL, Account, FlowStatus
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.flows import KEPT_UNANSWERED_SECONDS, Flows
from mcp_auth_proxy.store.postgresql import schema
from mcp_auth_proxy.store.sqlite.engine import SqliteEngine
from store.builders import dead_owner, flow, store_settings


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look every 20 ms."""
    monkeypatch.setattr(store_watch, "WATCH_INTERVAL", 0.02)


async def test_a_login_in_another_process_is_noticed_though_there_was_no_grant_before(
    setup: BrokerSetup, tmp_path: Path
) -> None:
    assert await setup.broker.token(NOTES) is None
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        await another.connect()
    await until(lambda: setup.broker.token_nowait(NOTES) != (True, None), "what is known to be out of date")
    assert await setup.broker.token(NOTES) is not None


async def test_a_logout_in_another_process_takes_the_token_away(setup: BrokerSetup, tmp_path: Path) -> None:
    await setup.connect()
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        await another.broker.disconnect(NOTES)
    await until(lambda: setup.broker.token_nowait(NOTES)[1] is None, "the token to go")
    assert await setup.broker.token(NOTES) is None


async def test_a_renewal_in_another_process_replaces_the_token(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, tmp_path: Path
) -> None:
    old = await setup.connect()
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        token = await another.broker.token(NOTES)
        issuer.end_access_tokens()
        assert await another.challenged(token) is not None
    await until(lambda: setup.broker.token_nowait(NOTES)[1] != old, "another token")
    new = await setup.broker.token(NOTES)
    assert (await setup.ask(new))[0] == 200
    assert issuer.refreshes == 1


async def test_what_waits_is_told_of_a_flow_that_failed_elsewhere(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    async with broker_setup(tmp_path) as another:
        await another.flows.finish(pending.flow.id, FlowStatus.FAILED, "The user said no.")
    with pytest.raises(AuthorizationDenied, match="said no"):
        await pending.wait(5)
    assert setup.broker.pending(NOTES) is None


async def test_what_waits_is_told_of_a_flow_that_was_deleted(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    async with broker_setup(tmp_path) as another, another.database.transaction() as transaction:
        await transaction.execute("DELETE FROM flows")
    with pytest.raises(AuthorizationDenied, match="cancelled"):
        await pending.wait(5)


def set_schema(folder: Path, number: int) -> None:
    """Change what the store says of its schema, and tell so: nobody can use it while it is another one."""
    url = postgresql.database_url(folder)
    if url is None:
        with closing(sqlite3.connect(folder / "store.db")) as connection:
            connection.execute(f"PRAGMA user_version = {number}")
        return
    with psycopg.connect(url) as server:
        server.execute(f"UPDATE {schema.MARK} SET version = {number}".encode())
        server.execute("SELECT pg_notify('mcp_auth_proxy_' || current_schema()::regnamespace::oid::bigint, 'newer')")


@asynccontextmanager
async def out_of_reach(setup: BrokerSetup, folder: Path) -> AsyncIterator[None]:
    """Let the store be of no use, until a look after the block has failed."""
    set_schema(folder, schema.NEWEST + 1)
    yield
    watch = setup.broker._watch
    before = watch._settling_since
    await until(lambda: watch._settling_since > before, "a look that fails")
    set_schema(folder, schema.NEWEST)


async def test_a_store_that_fails_for_a_while_does_not_end_the_watch(setup: BrokerSetup, tmp_path: Path) -> None:
    pending = await setup.pending()
    async with out_of_reach(setup, tmp_path):
        pass
    async with broker_setup(tmp_path) as another:
        await another.flows.cancel(NOTES)
    with pytest.raises(AuthorizationDenied):
        await pending.wait(5)


async def test_after_an_outage_the_renewal_of_a_dead_process_is_started_again_at_once(
    setup: BrokerSetup, issuer: FakeAuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server accepts the refresh token that it may have used for some seconds only. Others may come back."""
    await setup.connect()
    (grant,) = await setup.grants.all()
    watch = setup.broker._watch
    looks = 0

    async def broken(reader: str = "") -> bool:
        nonlocal looks
        looks += 1
        raise StoreUnavailable("It is out of reach.")

    with monkeypatch.context() as patch:
        patch.setattr(setup.database, "changed", broken)
        owner = dead_owner(setup.database.owners)
        assert await setup.grants.begin_refresh(grant.id, version=grant.version, owner=owner, now=setup.clock())
        looks = 0
        await until(lambda: looks >= 2, "two looks")
        assert issuer.refreshes == 0
    await until(lambda: issuer.refreshes == 1, "the renewal", timeout=store_watch.SETTLED_SECONDS / 2)
    assert not watch.is_settled


async def test_who_begins_or_has_stood_still_knows_of_no_outage(
    setup: BrokerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = setup.broker._watch
    assert not watch.is_settled
    monkeypatch.setattr(store_watch, "WATCH_INTERVAL", 0.2)
    monkeypatch.setattr(store_watch, "SETTLED_SECONDS", 0.4)
    await until(lambda: watch.is_settled, "the watch to settle")
    last = watch._looked_at
    await until(lambda: watch._looked_at != last, "a look")
    # It waits for the next look now, and nothing runs meanwhile.
    time.sleep(0.5)
    assert not watch.is_settled
    since = time.monotonic()
    await until(lambda: watch.is_settled, "the watch to settle")
    assert time.monotonic() - since >= 0.4


async def test_old_flows_are_deleted_each_hour_also_if_the_clock_is_set_back(
    setup: BrokerSetup, tmp_path: Path
) -> None:
    async def leave(name: str) -> None:
        await setup.flows.save(flow(name, "notes", at=time.time() - 2 * KEPT_UNANSWERED_SECONDS))

    pending = await setup.pending()
    # The first time, the store can't be used.
    async with out_of_reach(setup, tmp_path):
        setup.clock.ahead = 3601
    for ahead in (0, 3601):
        setup.clock.ahead = ahead
        await leave("old")
        async with asyncio.timeout(10):
            while await setup.flows.get("old") is not None:  # noqa: ASYNC110 - it is the store that is looked at
                await asyncio.sleep(0.01)
    setup.clock.ahead += 3000
    await leave("kept")
    # What another process writes shows that it has looked again. A broker would delete old flows at its start.
    another = await open_store(store_settings(tmp_path))
    await Flows(another).finish(pending.flow.id, FlowStatus.FAILED, "The user said no.")
    await another.close()
    with pytest.raises(AuthorizationDenied, match="said no"):
        await pending.wait(5)
    assert await setup.flows.get("kept") is not None


ACCOUNTS = 2000


@pytest.mark.sqlite
async def test_one_change_among_thousands_of_cached_accounts_costs_a_few_queries(
    setup: BrokerSetup, tmp_path: Path
) -> None:
    """It takes some seconds: the accounts are stored and read one by one."""
    await setup.connect()
    (grant,) = await setup.grants.all()
    accounts = [Account(LOCAL, "notes", f"work-{number}") for number in range(ACCOUNTS)]
    for account in accounts:
        await setup.grants.add(replace(grant, key=replace(grant.key, account=account)))
        assert await setup.broker.token(account) is not None
    for number in range(ACCOUNTS):
        assert await setup.broker.token(Account(LOCAL, "notes", f"none-{number}")) is None
    statements: list[str] = []
    assert isinstance(setup.database, SqliteEngine)
    await setup.database._connection.set_trace_callback(statements.append)
    async with broker_setup(tmp_path, *setup.servers.values()) as another:
        await another.broker.disconnect(accounts[7])
        await another.grants.add(replace(grant, key=replace(grant.key, account=Account(LOCAL, "notes", "none-7"))))
        await until(lambda: setup.broker.token_nowait(accounts[7])[1] is None, "the token to go")
        await until(lambda: setup.broker.token_nowait(Account(LOCAL, "notes", "none-7"))[1], "the token to come")
    assert setup.broker.token_nowait(accounts[8])[1] is not None
    # At most one round for each of the writes of the other process.
    assert sum("PRAGMA" not in statement for statement in statements) < 100
