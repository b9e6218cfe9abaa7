"""A row that another process writes while a store is opened does not make its key a wrong one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mcp_auth_proxy.config.settings import PostgresqlUrl
from mcp_auth_proxy.errors import KeyRejected
from mcp_auth_proxy.store.cipher import Cipher, Key
from mcp_auth_proxy.store.postgresql import bootstrap
from mcp_auth_proxy.store.sqlite import key_checks

OURS, OTHER = Key.of(b"o" * 32), Key.of(b"n" * 32)


class LookedAtTwice:
    """A database that is empty at the first look at each table, and has a row of this key at the second."""

    def __init__(self, key: Key) -> None:
        self._key_id = bytes.fromhex(key.id)

    async def run(self, sql: str, params: object = None) -> SimpleNamespace:
        return SimpleNamespace(rows=[] if "LIMIT 1" in sql else [{"key_id": self._key_id}])

    def execute(self, sql: str, params: object = None) -> Any:
        if "sqlite_master" in sql:
            return iter([("shared_secrets",)])
        if "LIMIT 1" in sql:
            return SimpleNamespace(fetchone=lambda: None)
        return iter([(self._key_id,)])


async def look(engine: str, key: Key) -> None:
    store: Any = LookedAtTwice(key)
    if engine == "sqlite":
        key_checks.check_rows_open(store, Path("store.db"), Cipher([OURS]))
    else:
        url = PostgresqlUrl(text="postgresql://h", shown="postgresql://h", identity="h")
        await bootstrap._require_rows_that_open(store, url, Cipher([OURS]))


@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
async def test_the_first_row_of_another_process_is_no_wrong_key(engine: str) -> None:
    await look(engine, OURS)
    with pytest.raises(KeyRejected):
        await look(engine, OTHER)
