"""Databases of a real server: an empty one, a store, and a server that a test may stop."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from fakes import postgresql
from fakes.postgresql import Server
from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.store import Engine, open_store


@pytest.fixture
def empty(postgresql_server: Server, tmp_path: Path) -> Iterator[StoreSettings]:
    """The settings of a database without tables."""
    name = f"empty_{abs(hash(str(tmp_path)))}"
    postgresql_server.execute(f"CREATE DATABASE {name} OWNER proxy")
    yield postgresql.settings_for(postgresql_server.url(name), tmp_path)
    postgresql_server.drop(name)


@pytest.fixture
def store(postgresql_server: Server, tmp_path: Path) -> Iterator[StoreSettings]:
    """The settings of a store that is there."""
    with postgresql.databases(postgresql_server):
        settings = postgresql.settings_of(tmp_path)
        assert settings is not None
        yield settings


@pytest.fixture
async def engine(store: StoreSettings) -> AsyncIterator[Engine]:
    opened = await open_store(store)
    yield opened
    await opened.close()


@pytest.fixture
async def another(store: StoreSettings) -> AsyncIterator[Engine]:
    """The engine of another process, as far as the server can tell."""
    opened = await open_store(store)
    yield opened
    await opened.close()


@pytest.fixture
def execute(postgresql_server: Server) -> Callable[..., list[tuple[object, ...]]]:
    """Run a statement as the superuser, in the database of settings."""

    def run(settings: StoreSettings, sql: str) -> list[tuple[object, ...]]:
        assert settings.postgresql is not None
        return postgresql_server.execute(sql, database=settings.postgresql.text.partition("?")[0].rpartition("/")[2])

    return run


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server of this test alone, which it may stop, freeze and start again."""
    server = postgresql.make_server()
    try:
        server.execute("CREATE DATABASE store OWNER proxy")
        yield server
    finally:
        postgresql.remove_server(server)
