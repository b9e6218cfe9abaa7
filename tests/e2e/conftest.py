"""Fixtures of the tests with a real browser, and of those with several processes on one store."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Browser

from fakes.chromium import chromium
from fakes.fixtures import on_both_engines
from fakes.shared_stores import Section, database_of

ON_BOTH_ENGINES = {"test_crash", "test_one_consent", "test_renewal"}
"""The modules that are about what is in the store."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tmp_path" in metafunc.fixturenames and Path(metafunc.definition.path).stem in ON_BOTH_ENGINES:
        on_both_engines(metafunc)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def shared_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Section]:
    """Yield the section ``store`` of processes that share one: a file, or a database on a real server."""
    if request.param == "sqlite":
        yield {}
        return
    with database_of(request.getfixturevalue("postgresql_server"), tmp_path) as section:
        yield section
