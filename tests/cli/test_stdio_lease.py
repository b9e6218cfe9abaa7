"""How long a proxy that bridges share is needed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.proxy import until
from mcp_auth_proxy.cli.stdio_bridge import lease
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import McpAuthProxyError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreSettings:
    monkeypatch.setattr(lease, "CHECK", 0.005)
    return StoreSettings(path=tmp_path / "data" / "proxy.db", keys=(KeySource(kind="env", name="KEY"),))


@asynccontextmanager
async def watched(store: StoreSettings, needed: list[bool]) -> AsyncIterator[list[str]]:
    """Watch as a proxy does; yield what is filled when it ends."""
    ended: list[str] = []
    looked = 0

    def is_needed() -> bool:
        nonlocal looked
        looked += 1
        return needed[min(looked, len(needed)) - 1]

    async with lease.ending_without_bridges(store, "", needed=is_needed, stop=lambda: ended.append("stop")):
        yield ended


async def test_a_proxy_ends_once_the_last_bridge_has(store: StoreSettings) -> None:
    bridges = [lease.of_bridges(store, "") for _ in range(2)]
    for bridge in bridges:
        assert bridge.try_lock(alone=False)
    async with watched(store, [False]) as ended:
        bridges[0].close()
        await asyncio.sleep(10 * lease.CHECK)
        assert not ended
        bridges[1].close()
        await until(lambda: ended)
        late = lease.of_bridges(store, "")
        assert not late.try_lock(alone=False), "a new bridge waits for the end of the process"
        late.close()


async def test_a_proxy_that_a_user_will_come_back_to_does_not_end(store: StoreSettings) -> None:
    needed = [True]
    async with watched(store, needed) as ended:
        await asyncio.sleep(10 * lease.CHECK)
        assert not ended
        needed[0] = False
        await until(lambda: ended)


def test_bridges_of_different_urls_do_not_share_a_file(store: StoreSettings) -> None:
    one, other = lease.of_start(store, "a" * 64), lease.of_start(store, "b" * 64)
    assert one.try_lock(alone=True)
    assert other.try_lock(alone=True)
    again = lease.of_start(store, "a" * 64)
    assert not again.try_lock(alone=True)
    for each in (one, other, again):
        each.close()
    assert sorted(path.name for path in store.path.parent.iterdir()) == [
        ".proxy.db.aaaaaaaaaaaa.starting",
        ".proxy.db.bbbbbbbbbbbb.starting",
    ]
    assert {path.stat().st_mode & 0o777 for path in store.path.parent.iterdir()} == {0o600}


def test_a_link_in_the_place_of_a_file_is_not_followed(store: StoreSettings, tmp_path: Path) -> None:
    store.path.parent.mkdir()
    (store.path.parent / ".proxy.db.bridges").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(McpAuthProxyError, match="can't be opened"):
        lease.of_bridges(store, "")
    assert not (tmp_path / "elsewhere").exists()


async def test_a_lock_that_others_keep_is_not_waited_for_forever(
    store: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOCK_TIMEOUT", 0.01)
    holder, bridge = lease.of_bridges(store, ""), lease.of_bridges(store, "")
    assert holder.try_lock(alone=True)
    with pytest.raises(McpAuthProxyError, match="does not come to an end"):
        await lease.lock(bridge, alone=False)
    holder.close()
    bridge.close()
