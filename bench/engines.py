"""The engines that a store can have on this machine: SQLite, and PostgreSQL if it is installed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.backend import ROOT
from mcp_auth_proxy.config.settings import KeySource, StoreSettings

Opening = Callable[[Path], StoreSettings]
"""Return the settings of the store that stands for a folder."""

DURABLE = {"fsync": "on", "full_page_writes": "on", "autovacuum": "on", "shared_buffers": "128MB"}


def sqlite(folder: Path) -> StoreSettings:
    return StoreSettings(
        path=folder / "store.db", keys=(KeySource(kind="file", name=str(folder / "store.key")),), default_key=True
    )


@contextmanager
def engines() -> Iterator[dict[str, Opening]]:
    """Return the engines by name. A PostgreSQL server runs until the block ends."""
    found: dict[str, Opening] = {"SQLite": sqlite}
    sys.path.append(str(ROOT / "tests"))
    try:
        from fakes import postgresql  # noqa: PLC0415
    finally:
        sys.path.pop()
    if not postgresql.BIN:
        yield found
        return
    server = postgresql.make_server(on_disk=True, **DURABLE)

    def database(folder: Path) -> StoreSettings:
        name = f"bench_{folder.name}".replace("-", "_")
        server.execute(f'CREATE DATABASE "{name}" OWNER proxy')
        (folder / "url").write_text(server.url(name))
        return postgresql.settings_for(server.url(name), folder)

    try:
        yield {**found, "PostgreSQL": database}
    finally:
        postgresql.remove_server(server)
