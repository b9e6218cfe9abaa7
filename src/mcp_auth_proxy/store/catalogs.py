"""What is remembered of the answers of servers, for each account: one sealed row."""

import json
from collections.abc import Mapping

from mcp_auth_proxy.models import Account, Catalog
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, new_uid

MAX_CONTENT = 256 * 1024
"""Bytes of one catalog. What does not fit is left out, the lists that matter least first."""

_DROP_ORDER = ("resourceTemplates", "resources", "prompts", "tools")

_TABLE = "catalogs"
_FIND = """
    SELECT * FROM catalogs
    WHERE principal = :principal AND account = :account AND server = :server AND upstream = :upstream
"""
_PUT = """
    INSERT INTO catalogs (uid, principal, account, server, upstream, content, fetched_at, seal)
    VALUES (:uid, :principal, :account, :server, :upstream, :content, :fetched_at, :seal)
    ON CONFLICT (principal, account, server) DO UPDATE SET
        uid = excluded.uid, upstream = excluded.upstream, content = excluded.content,
        fetched_at = excluded.fetched_at, seal = excluded.seal
"""


class Catalogs:
    """The catalogs in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, account: Account, *, upstream: str) -> Catalog | None:
        """Return what is remembered of a server; None if nothing is, or if it is of another ``upstream`` (URL)."""
        asked: Columns = {**account_params(account), "upstream": upstream}
        rows = await self._engine.fetch_all(_FIND, asked)
        return next(iter(await decode_rows(self._engine, _TABLE, rows, asked, _read)), None)

    async def put(self, account: Account, catalog: Catalog, *, upstream: str) -> Catalog:
        """Remember a catalog in place of the one before; return as much of it as fits into ``MAX_CONTENT``."""
        catalog, content = _fitting(catalog)
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns: Columns = {
            **account_params(account),
            "upstream": upstream,
            "content": cipher.seal("content", content),
            "fetched_at": catalog.fetched_at,
        }
        async with self._engine.transaction() as transaction:
            await transaction.execute(_PUT, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})
        return catalog


def _fitting(catalog: Catalog) -> tuple[Catalog, str]:
    """Return as much of a catalog as fits, and its content."""
    content = _encode(catalog)
    lists = dict(catalog.lists)
    for name in _DROP_ORDER:
        if len(content) <= MAX_CONTENT:
            return catalog, content
        if lists.pop(name, None) is not None:
            catalog = Catalog(
                initialize=catalog.initialize, discover=catalog.discover, lists=lists, fetched_at=catalog.fetched_at
            )
            content = _encode(catalog)
    if len(content) > MAX_CONTENT:
        catalog = Catalog(fetched_at=catalog.fetched_at)
        content = _encode(catalog)
    return catalog, content


def _encode(catalog: Catalog) -> str:
    found: Mapping[str, object] = {
        "initialize": catalog.initialize,
        "discover": catalog.discover,
        "lists": catalog.lists,
    }
    return json.dumps(found, separators=(",", ":"))


def _read(row: Row, cipher: RowCipher) -> Catalog:
    found = json.loads(cipher.open("content", row["content"]))
    return Catalog(
        initialize=found["initialize"],
        discover=found["discover"],
        lists=found["lists"],
        fetched_at=row["fetched_at"],
    )
