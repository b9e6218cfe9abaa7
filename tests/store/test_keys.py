"""Other keys for a store that is open: taken up as a whole, or not at all."""

import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import postgresql
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import KeyRejected, KeyUnavailable
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.cipher import Key
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.keys import checked_keys, key_uses, renew_keys
from mcp_auth_proxy.store.rotation import rotate
from store.builders import grant, store_settings

KEYS = {"OLD": base64.b64decode(postgresql.KEY), "NEW": b"n" * 32, "OTHER": b"x" * 32}
ENVIRON = {name: base64.b64encode(secret).decode() for name, secret in KEYS.items()}
IDS = {name: Key.of(secret).id for name, secret in KEYS.items()}


def sources(names: Sequence[str]) -> tuple[KeySource, ...]:
    return tuple(KeySource(kind="env", name=name, written=f"env:{name}") for name in names)


def store_with(folder: Path, *names: str) -> StoreSettings:
    return replace(store_settings(folder), keys=sources(names), default_key=False, keys_named=True)


@asynccontextmanager
async def opened(folder: Path, *names: str) -> AsyncIterator[Engine]:
    engine = await open_store(store_with(folder, *names), environ=ENVIRON)
    try:
        yield engine
    finally:
        await engine.close()


async def test_a_new_first_key_seals_and_leaves_its_check(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD") as engine:
        await Grants(engine).add(grant())
        assert await renew_keys(engine, store_with(tmp_path, "NEW", "OLD"), ENVIRON)
        assert await checked_keys(engine) == {IDS["NEW"], IDS["OLD"]}
        added = await Grants(engine).add(grant("second"))
        row = await engine.fetch_one("SELECT seal FROM grants WHERE id = :id", {"id": added.id})
        assert row is not None
        assert row["seal"][1:5].hex() == IDS["NEW"]
        assert len(await Grants(engine).all()) == 2


async def test_the_same_keys_change_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path, "NEW", "OLD") as engine:
        before = engine.cipher
        assert not await renew_keys(engine, store_with(tmp_path, "NEW", "OLD"), ENVIRON)
        assert engine.cipher is before


async def test_a_key_that_no_row_needs_can_be_removed(tmp_path: Path) -> None:
    async with opened(tmp_path, "NEW", "OLD") as engine:
        await Grants(engine).add(grant())
        assert await renew_keys(engine, store_with(tmp_path, "NEW"), ENVIRON)
        assert engine.cipher.key_ids == (IDS["NEW"],)


async def test_a_key_that_rows_need_is_not_removed(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD") as engine:
        await Grants(engine).add(grant())
        await renew_keys(engine, store_with(tmp_path, "NEW", "OLD"), ENVIRON)
        await Grants(engine).add(grant("second"))
        with pytest.raises(KeyRejected, match=f"Key {IDS['OLD']} is not in store.keys any more, but 1 rows .* rotate"):
            await renew_keys(engine, store_with(tmp_path, "NEW"), ENVIRON)
        assert engine.cipher.key_ids == (IDS["NEW"], IDS["OLD"])
        await rotate(engine, lambda progress: None)
        assert await renew_keys(engine, store_with(tmp_path, "NEW"), ENVIRON)


async def test_keys_that_open_nothing_are_wrong(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD") as engine:
        await Grants(engine).add(grant())
        with pytest.raises(KeyRejected, match="Wrong key"):
            await renew_keys(engine, store_with(tmp_path, "OTHER"), ENVIRON)
        assert engine.cipher.key_ids == (IDS["OLD"],)
        assert await checked_keys(engine) == {IDS["OLD"]}


async def test_keys_that_cannot_be_loaded_leave_those_there_are(tmp_path: Path) -> None:
    async with opened(tmp_path, "OLD") as engine:
        missing = KeySource(kind="env", name="UNSET")
        failing = KeySource(kind="exec", name="false")
        for source, error in ((missing, KeyRejected), (failing, KeyUnavailable)):
            changed = replace(store_with(tmp_path, "OLD"), keys=(source, *sources(["OLD"])))
            with pytest.raises(error):
                await renew_keys(engine, changed, {**ENVIRON, "PATH": "/usr/bin:/bin"})
        assert engine.cipher.key_ids == (IDS["OLD"],)


def test_only_a_later_key_without_rows_is_droppable(tmp_path: Path) -> None:
    rows = {IDS["OLD"]: 3, "deadbeef": 2}
    store = store_with(tmp_path, "NEW", "OLD", "OTHER", "OLD")
    uses = key_uses(store, [IDS["NEW"], IDS["OLD"], IDS["OTHER"], IDS["OLD"]], rows)
    assert [(use.id, use.rows, use.droppable) for use in uses] == [
        (IDS["NEW"], 0, False),
        (IDS["OLD"], 3, False),
        (IDS["OTHER"], 0, True),
        # There twice: one place is enough.
        (IDS["OLD"], 3, True),
        ("deadbeef", 2, False),
    ]
    assert [use.source.written if use.source else None for use in uses] == [
        "env:NEW",
        "env:OLD",
        "env:OTHER",
        "env:OLD",
        None,
    ]
