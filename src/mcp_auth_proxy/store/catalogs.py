"""What is remembered of the answers of servers, for each account: one sealed row."""

import json
from dataclasses import replace

from mcp_auth_proxy.models import Account, Catalog
from mcp_auth_proxy.store.codec import account_params
from mcp_auth_proxy.store.engine import Engine, Row
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, decode_rows, new_uid

MAX_CONTENT = 256 * 1024
"""Bytes of one catalog. What does not fit is left out, the lists that matter least first."""

KEPT_CATALOGS = 5000
"""Catalogs that are kept at most; the oldest go first."""

KEPT_OF_PRINCIPAL = 100
"""Those of one principal, so that others keep theirs."""

_DROP_ORDER = ("resourceTemplates", "resources", "prompts", "tools")

_TABLE = "catalogs"
_FIND = """
    SELECT * FROM catalogs
    WHERE principal = :principal AND account = :account AND server = :server AND upstream = :upstream
"""
_ALL = "SELECT * FROM catalogs ORDER BY fetched_at"
_PUT = """
    INSERT INTO catalogs (uid, principal, account, server, upstream, content, tools, fetched_at, seal)
    VALUES (:uid, :principal, :account, :server, :upstream, :content, :tools, :fetched_at, :seal)
    ON CONFLICT (principal, account, server) DO UPDATE SET
        uid = excluded.uid, upstream = excluded.upstream, content = excluded.content, tools = excluded.tools,
        fetched_at = excluded.fetched_at, seal = excluded.seal
"""
_TRIM_PRINCIPAL = """
    DELETE FROM catalogs WHERE principal = :principal AND uid NOT IN (
        SELECT uid FROM catalogs WHERE principal = :principal ORDER BY uid = :uid DESC, fetched_at DESC LIMIT :kept
    )
"""
_TRIM = """
    DELETE FROM catalogs WHERE (SELECT count(*) FROM catalogs) > :kept AND uid NOT IN (
        SELECT uid FROM catalogs ORDER BY uid = :uid DESC, fetched_at DESC LIMIT :kept
    )
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
        """Remember a catalog in place of the one before; return as much of it as fits into ``MAX_CONTENT``.

        Raises ValueError and RecursionError if it can't be written as JSON.
        """
        catalog, content = _fitting(catalog)
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        tools = catalog.lists.get("tools")
        columns: Columns = {
            **account_params(account),
            "upstream": upstream,
            "content": cipher.seal("content", content),
            "tools": None if tools is None else len(tools),
            "fetched_at": catalog.fetched_at,
        }
        async with self._engine.transaction() as transaction:
            await transaction.execute(_PUT, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})
            kept = {"uid": uid, "principal": account.principal, "kept": KEPT_OF_PRINCIPAL}
            await transaction.execute(_TRIM_PRINCIPAL, kept)
            await transaction.execute(_TRIM, {"uid": uid, "kept": KEPT_CATALOGS})
        return catalog

    async def tool_counts(self) -> dict[tuple[Account, str], int]:
        """Return how many tools each account sees, by account and ``upstream``, as far as that is remembered."""
        rows = await self._engine.fetch_all(_ALL)
        return dict(await decode_rows(self._engine, _TABLE, [row for row in rows if _is_counted(row)], {}, _read_count))


def size_of(catalog: Catalog) -> int:
    """Return how many bytes a catalog takes as JSON."""
    return len(_encode(catalog))


def _fitting(catalog: Catalog) -> tuple[Catalog, str]:
    """Return as much of a catalog as fits, and its content."""
    content = _encode(catalog)
    lists = dict(catalog.lists)
    for name in _DROP_ORDER:
        if len(content) <= MAX_CONTENT:
            return catalog, content
        if lists.pop(name, None) is not None:
            catalog = replace(catalog, lists=dict(lists))
            content = _encode(catalog)
    if len(content) > MAX_CONTENT:
        catalog = Catalog(fetched_at=catalog.fetched_at)
        content = _encode(catalog)
    return catalog, content


def _encode(catalog: Catalog) -> str:
    found = {"initialize": catalog.initialize, "discover": catalog.discover, "lists": catalog.lists}
    return json.dumps(found, separators=(",", ":"))


def _read(row: Row, cipher: RowCipher) -> Catalog:
    found = json.loads(cipher.open("content", row["content"]))
    return Catalog(
        initialize=found["initialize"],
        discover=found["discover"],
        lists=found["lists"],
        fetched_at=row["fetched_at"],
    )


def _is_counted(row: Row) -> bool:
    return row["tools"] is not None


def _read_count(row: Row, _: RowCipher) -> tuple[tuple[Account, str], int]:
    return (Account(row["principal"], row["server"], row["account"]), row["upstream"]), row["tools"]
