"""A store that was made for something that failed is gone again, unless something would be lost."""

from pathlib import Path

import pytest

from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.store import open_store, provisional_store, serving
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import store_settings


class Failed(Exception):
    """What the command was for has failed."""


@pytest.mark.parametrize("kept_by", [None, "a binding", "a proxy", "success"])
async def test_a_new_store_stays_only_if_it_is_needed(tmp_path: Path, kept_by: str | None) -> None:
    settings = store_settings(tmp_path)
    lock = None
    try:
        with provisional_store(settings):
            engine = await open_store(settings)
            if kept_by == "a binding":
                await Registrations(engine).bind_client("notes", "client", "https://as.example")
            if kept_by == "a proxy":
                lock = serving.hold(settings, Address("127.0.0.1", 8787))
            await engine.close()
            if kept_by != "success":
                raise Failed
    except Failed:
        pass
    if lock is not None:
        lock.release()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({"store.db", "store.key"} if kept_by else set())
