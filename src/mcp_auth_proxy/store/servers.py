"""The servers that were made at run time. Their settings are sealed: they may have a client secret."""

import json

from mcp_auth_proxy.models import MadeServer
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import (
    SEAL,
    Columns,
    RowCipher,
    SealedTable,
    change_row,
    decode_rows,
    intact_rows,
    new_uid,
)

KEPT_ADHOC = 100
"""The number of ad-hoc servers that one principal may have."""

NEVER_CONNECTED = 3600.0
"""Seconds after which an ad-hoc server that nobody has connected is deleted."""

_TABLE = "servers"
_ADD = """
    INSERT INTO servers (uid, id, project_id, name, origin, owner, url, settings, created_at, updated_at, seal)
    VALUES (:uid, :id, :project_id, :name, :origin, :owner, :url, :settings, :created_at, :updated_at, :seal)
"""
_ALL = "SELECT * FROM servers ORDER BY created_at, id"
_BY_ID = "SELECT * FROM servers WHERE id = :id"
_BY_NAME = "SELECT * FROM servers WHERE name = :name AND id <> :id"
_BY_URL = "SELECT * FROM servers WHERE origin = 'adhoc' AND owner = :owner AND url = :url ORDER BY created_at, id"
_COUNT = "SELECT count(*) AS number FROM servers WHERE origin = 'adhoc' AND owner = :owner"
_CONNECTED = "UPDATE servers SET connected_at = :now WHERE id = :id AND connected_at IS NULL"
# A flow that is done says the same as a grant, and is there for an hour after that was deleted.
_NOTE_CONNECTED = """
    UPDATE servers SET connected_at = :now WHERE origin = 'adhoc' AND connected_at IS NULL AND (
        EXISTS (SELECT 1 FROM grants WHERE grants.server = servers.name)
        OR EXISTS (SELECT 1 FROM flows WHERE flows.server = servers.name AND flows.status = 'done')
    )
"""
_NEVER_CONNECTED = """
    SELECT * FROM servers WHERE origin = 'adhoc' AND connected_at IS NULL AND created_at <= :then AND NOT EXISTS (
        SELECT 1 FROM flows WHERE flows.server = servers.name AND flows.status = 'pending' AND flows.expires_at > :now
    )
"""
_DELETE = "DELETE FROM servers WHERE id = :id"
_LEFT = (
    "DELETE FROM attempts WHERE flow_id IN (SELECT id FROM flows WHERE server = :server)",
    "DELETE FROM flows WHERE server = :server",
    "DELETE FROM registrations WHERE server = :server",
    "DELETE FROM client_bindings WHERE server = :server",
    "DELETE FROM confirmations WHERE server = :server",
    "DELETE FROM grants WHERE server = :server",
    "DELETE FROM catalogs WHERE server = :server",
    "DELETE FROM mcp_sessions WHERE server = :server",
    "DELETE FROM connection_notes WHERE server = :server",
)


class Servers:
    """The servers in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def all(self) -> list[MadeServer]:
        """Return all servers, oldest first."""
        return await decode_rows(self._engine, _TABLE, await self._engine.fetch_all(_ALL), {}, _read)

    def table(self) -> SealedTable[MadeServer]:
        """Return a reader of all servers. ``connected_at`` of what it returns may be old."""
        return SealedTable(self._engine, _TABLE, _read)

    async def get(self, server_id: str) -> MadeServer | None:
        """Return a server; None if it is gone or can't be decrypted."""
        asked: Columns = {"id": server_id}
        return await self._first(await self._engine.fetch_all(_BY_ID, asked), asked)

    async def by_url(self, owner: str, url: str) -> MadeServer | None:
        """Return the ad-hoc server that a principal has for a URL."""
        asked: Columns = {"owner": owner, "url": url, "origin": "adhoc"}
        return await self._first(await self._engine.fetch_all(_BY_URL, asked), asked)

    async def add(self, server: MadeServer) -> bool:
        """Store a new server. Return False if there is one of the same name."""
        async with self._engine.transaction() as transaction:
            return await self._add(transaction, server)

    async def add_within(self, transaction: Transaction, server: MadeServer) -> bool:
        """Store a server within a transaction. Return False if there is one of the same name or id."""
        if await transaction.execute(_BY_ID, {"id": server.id}):
            return False
        return await self._add(transaction, server)

    async def add_adhoc(self, server: MadeServer) -> MadeServer | None:
        """Store an ad-hoc server, unless its owner has one for the same URL; return the one that is stored.

        None if the owner has KEPT_ADHOC already.
        """
        asked: Columns = {"owner": server.owner, "url": server.url, "origin": "adhoc"}
        async with self._engine.transaction() as transaction:
            found = await self._first(await transaction.execute(_BY_URL, asked), asked)
            if found is not None:
                return found
            number = await transaction.fetch_one(_COUNT, {"owner": server.owner})
            if number is not None and number["number"] >= KEPT_ADHOC:
                return None
            return server if await self._add(transaction, server) else None

    async def change(self, server: MadeServer, *, unchanged_since: float | None = None) -> bool | None:
        """Replace what may change of a server: name, url, settings and the time of the change.

        Return False if another one has the name, None if it is gone, or was changed after ``unchanged_since``.
        """
        async with self._engine.transaction() as transaction:
            asked: Columns = {"id": server.id}
            rows = await transaction.execute(_BY_ID, asked)
            rows = await intact_rows(self._engine, _TABLE, rows, asked)
            if not rows or (unchanged_since is not None and rows[0]["updated_at"] != unchanged_since):
                return None
            if await self._is_taken(transaction, server):
                return False
            columns = _columns(server, RowCipher(self._engine.cipher, _TABLE, rows[0]["uid"]))
            changes = {name: columns[name] for name in ("name", "url", "settings", "updated_at")}
            await change_row(self._engine, transaction, _TABLE, rows[0], changes)
            return True

    async def connected(self, server_id: str, now: float) -> None:
        """Note that a server was connected, or needs no authorization."""
        async with self._engine.transaction() as transaction:
            await transaction.execute(_CONNECTED, {"id": server_id, "now": now})

    async def delete(self, server_id: str) -> bool:
        """Delete a server. Return False if it was gone."""
        async with self._engine.transaction() as transaction:
            return bool(await transaction.execute(f"{_DELETE} RETURNING id", {"id": server_id}))

    async def forget(self, name: str) -> None:
        """Delete all that is stored for the name of a deleted server: the next one of that name begins with nothing."""
        async with self._engine.transaction() as transaction:
            for statement in _LEFT:
                await transaction.execute(statement, {"server": name})

    async def purge(self, now: float) -> list[MadeServer]:
        """Delete the ad-hoc servers that nobody has connected in NEVER_CONNECTED seconds; return them."""
        async with self._engine.transaction() as transaction:
            await transaction.execute(_NOTE_CONNECTED, {"now": now})
            rows = await transaction.execute(_NEVER_CONNECTED, {"then": now - NEVER_CONNECTED, "now": now})
            purged = await decode_rows(self._engine, _TABLE, rows, {"origin": "adhoc"}, _read)
            for server in purged:
                await transaction.execute(_DELETE, {"id": server.id})
        return purged

    async def _add(self, transaction: Transaction, server: MadeServer) -> bool:
        if await self._is_taken(transaction, server):
            return False
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns = _columns(server, cipher)
        await transaction.execute(_ADD, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})
        return True

    async def _is_taken(self, transaction: Transaction, server: MadeServer) -> bool:
        """Return whether another server has the name. Rows that somebody else has changed make room for it."""
        rows = await transaction.execute(_BY_NAME, {"name": server.name, "id": server.id})
        intact = await intact_rows(self._engine, _TABLE, rows, {"name": server.name})
        for row in rows:
            if row not in intact:
                await transaction.execute("DELETE FROM servers WHERE uid = :uid", {"uid": row["uid"]})
        return bool(intact)

    async def _first(self, rows: list[Row], asked: Columns) -> MadeServer | None:
        return next(iter(await decode_rows(self._engine, _TABLE, rows, asked, _read)), None)


def _columns(server: MadeServer, cipher: RowCipher) -> Columns:
    return {
        "id": server.id,
        "project_id": server.project_id,
        "name": server.name,
        "origin": server.origin,
        "owner": server.owner,
        "url": server.url,
        "settings": cipher.seal("settings", json.dumps(server.document)),
        "created_at": server.created_at,
        "updated_at": server.updated_at,
    }


def _read(row: Row, cipher: RowCipher) -> MadeServer:
    document = json.loads(cipher.open("settings", row["settings"]))
    if not isinstance(document, dict):
        raise TypeError("the settings are not an object")
    return MadeServer(
        id=row["id"],
        project_id=row["project_id"],
        name=row["name"],
        origin="adhoc" if row["origin"] == "adhoc" else "api",
        owner=row["owner"],
        url=row["url"],
        document=document,
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        connected_at=row["connected_at"],
    )
