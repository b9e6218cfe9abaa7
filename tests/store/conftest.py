"""An open store in a folder of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mcp_auth_proxy.store.database import Database
from store.builders import store_settings


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(store_settings(tmp_path))
    yield opened
    await opened.close()
