"""Confirmations: remembered for exactly what was confirmed, bounded, and of no use if they are forged (T80)."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.confirmations import KEPT_CONFIRMATIONS, Confirmations
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, grant

UPSTREAM = "https://mcp.example"
ISSUER = "https://as.example"
HOST = "login.as.example"
LINEAR = Account("local", "linear")


@pytest.fixture
def confirmations(engine: Engine) -> Confirmations:
    return Confirmations(engine)


async def test_a_confirmation_holds_for_exactly_what_was_confirmed(confirmations: Confirmations) -> None:
    await confirmations.add(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST, now=NOW)
    assert await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST)
    for account in (Account("other", "linear"), Account("local", "other"), LINEAR._replace(name="work")):
        assert not await confirmations.contains(account, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST)
    for other in ("https://mcp.example:8443", "http://mcp.example"):
        assert not await confirmations.contains(LINEAR, upstream=other, issuer=ISSUER, sign_in_host=HOST)
    assert not await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER + "/", sign_in_host=HOST)
    assert not await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host="evil.example")


async def test_confirming_again_changes_nothing_else(confirmations: Confirmations, engine: Engine) -> None:
    for now in (NOW, NOW + 60):
        await confirmations.add(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST, now=now)
    assert await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST)
    (row,) = await engine.fetch_all("SELECT confirmed_at FROM confirmations")
    assert row["confirmed_at"] == NOW + 60


async def test_only_the_newest_confirmations_of_an_account_are_kept(
    confirmations: Confirmations, engine: Engine
) -> None:
    other = Account("local", "other")
    await confirmations.add(other, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST, now=NOW)
    for number in range(KEPT_CONFIRMATIONS + 5):
        await confirmations.add(
            LINEAR, upstream=UPSTREAM, issuer=f"{ISSUER}/{number}", sign_in_host=HOST, now=NOW + number
        )
    (row,) = await engine.fetch_all("SELECT count(*) AS found FROM confirmations WHERE server = 'linear'")
    assert row["found"] == KEPT_CONFIRMATIONS
    assert not await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=f"{ISSUER}/4", sign_in_host=HOST)
    assert await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=f"{ISSUER}/5", sign_in_host=HOST)
    assert await confirmations.contains(other, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST)


@pytest.mark.sqlite
async def test_a_forged_confirmation_is_none_and_does_not_block_the_next(
    confirmations: Confirmations, engine: Engine, tmp_path: Path
) -> None:
    await confirmations.add(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host=HOST, now=NOW)
    with closing(sqlite3.connect(tmp_path / "store.db")) as attacker, attacker:
        attacker.execute("UPDATE confirmations SET sign_in_host = 'evil.example'")
    assert not await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host="evil.example")
    await confirmations.add(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host="evil.example", now=NOW)
    assert await confirmations.contains(LINEAR, upstream=UPSTREAM, issuer=ISSUER, sign_in_host="evil.example")


async def test_the_grants_of_an_issuer_are_those_that_have_not_ended(engine: Engine) -> None:
    grants = Grants(engine)
    kept = [await grants.add(grant(name)) for name in ("linear", "notes")]
    ended = await grants.add(grant("ended"))
    await grants.end(ended.id, version=ended.version, reason="test", now=NOW)
    elsewhere = grant("elsewhere")
    await grants.add(replace(elsewhere, key=replace(elsewhere.key, issuer="https://b.example")))
    issuer = kept[0].key.issuer
    assert await grants.servers_of_issuer(issuer) == [stored.key for stored in kept]
    assert await grants.servers_of_issuer(issuer + "/") == []
    async with engine.transaction() as transaction:
        await transaction.execute("UPDATE grants SET access_token = 'damaged' WHERE server = 'notes'")
    assert await grants.servers_of_issuer(issuer) == [kept[0].key]
