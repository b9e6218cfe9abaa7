"""An open store in a folder of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fakes.fixtures import on_both_engines
from mcp_auth_proxy.store import Engine, open_store
from store.builders import store_settings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tmp_path" in metafunc.fixturenames and metafunc.definition.path.parent == Path(__file__).parent:
        on_both_engines(metafunc)


@pytest.fixture
async def engine(each_engine: str, tmp_path: Path) -> AsyncIterator[Engine]:
    opened = await open_store(store_settings(tmp_path))
    yield opened
    await opened.close()
