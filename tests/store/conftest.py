"""An open store in a folder of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mcp_auth_proxy.store import Engine, open_store
from store.builders import store_settings


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    opened = await open_store(store_settings(tmp_path))
    yield opened
    await opened.close()
