"""Grants that nobody uses: who is refreshed, how often one issuer is asked, and what a change of the period does."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.proxy import until
from mcp_auth_proxy.broker import keep_alive
from mcp_auth_proxy.broker.keep_alive import MAX_FAILURES, KeepAlive
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationServerUnavailable
from mcp_auth_proxy.models import Account, Grant, RenewalHealth
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, grant, store_settings, tokens

SERVERS = {"linear": ServerSettings(name="linear", url="https://linear.example/mcp")}
WEEK = 7 * 86_400.0


class Tokens:
    """Renews as told, and remembers what."""

    def __init__(self, grants: Grants) -> None:
        self.grants = grants
        self.renewed: list[str] = []
        self.fails = False

    async def renew_idle(self, grant: Grant) -> None:
        self.renewed.append(grant.key.account.name)
        if self.fails:
            raise AuthorizationServerUnavailable("down")
        assert await self.grants.begin_refresh(grant.id, version=grant.version, owner="a:1:b", now=NOW)
        await self.grants.renewed(grant.id, version=grant.version, owner="a:1:b", tokens=tokens("2", NOW + WEEK))


class Setup:
    def __init__(self, engine: Engine) -> None:
        self.grants = Grants(engine)
        self.tokens = Tokens(self.grants)
        self.now = NOW + WEEK
        self.kept = KeepAlive(servers=SERVERS, database=engine, tokens=self.tokens, period=WEEK, clock=lambda: self.now)

    async def add(self, name: str, server: str = "linear", health: RenewalHealth | None = None) -> Grant:
        made = grant(server, name=name)
        made = replace(made, key=replace(made.key, account=Account("local", server, name)))
        return await self.grants.add(made if health is None else replace(made, health=health))


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    engine = await open_store(store_settings(tmp_path))
    setup = Setup(engine)
    yield setup
    await setup.kept.aclose()
    await engine.close()


async def test_each_grant_is_refreshed_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep_alive, "PAGE", 2)
    for number in range(5):
        await setup.add(str(number))
    await setup.add("elsewhere", "removed")
    assert 0 < await setup.kept._look() <= keep_alive.LONGEST_DELAY
    assert sorted(setup.tokens.renewed) == ["0", "1", "2", "3", "4"]
    await setup.kept._look()
    assert len(setup.tokens.renewed) == 5


async def test_what_another_process_refreshes_is_left_to_it(setup: Setup) -> None:
    stored = await setup.add("0")
    assert await setup.grants.begin_refresh(stored.id, version=1, owner="b:1:c", now=NOW)
    await setup.kept._look()
    assert setup.tokens.renewed == []


async def test_an_issuer_that_is_down_is_not_asked_for_all_its_grants(setup: Setup) -> None:
    for number in range(20):
        await setup.add(str(number))
    setup.tokens.fails = True
    assert await setup.kept._look() >= keep_alive.FAILED_DELAY
    assert len(setup.tokens.renewed) == MAX_FAILURES


async def test_what_nobody_has_mended_for_a_day_is_tried_even_if_nothing_is_kept_alive(setup: Setup) -> None:
    health = RenewalHealth(failing_since=NOW, failure="x", next_try_at=NOW + 3, rejected_since=NOW)
    await setup.add("0", health=health)
    setup.kept.period = 0
    await setup.kept._look()
    assert setup.tokens.renewed == ["0"]


async def test_a_shorter_period_counts_at_once(setup: Setup) -> None:
    await setup.add("0")
    setup.now = NOW + WEEK / 2
    setup.kept.start()
    setup.kept.configure(WEEK / 4)
    await until(lambda: setup.tokens.renewed == ["0"], timeout=4)
