"""OAuth clients that were registered by hand and given to the API. Their secrets are sealed."""

import json

from mcp_auth_proxy.models import OAuthClient, OAuthClientStatus
from mcp_auth_proxy.store.engine import Engine, Row, Transaction
from mcp_auth_proxy.store.sealed_rows import SEAL, Columns, RowCipher, change_row, decode_rows, intact_rows, new_uid

_TABLE = "oauth_clients"
_ADD = """
    INSERT INTO oauth_clients (
        uid, id, customer_id, project_id, provider, provider_name, client_id, client_secret, authorization_url,
        token_url, scopes, redirect_uris, metadata, server_ids, status, version, created_at, updated_at, deleted_at,
        seal
    ) VALUES (
        :uid, :id, :customer_id, :project_id, :provider, :provider_name, :client_id, :client_secret, :authorization_url,
        :token_url, :scopes, :redirect_uris, :metadata, :server_ids, :status, :version, :created_at, :updated_at,
        :deleted_at, :seal
    )
"""
_BY_ID = "SELECT * FROM oauth_clients WHERE id = :id"
_OF_PROJECT = """
    SELECT * FROM oauth_clients WHERE project_id = :project_id AND deleted_at IS NULL ORDER BY created_at, id
"""
_ALL = "SELECT * FROM oauth_clients ORDER BY created_at, id"


class OAuthClientConflict(Exception):
    """Another client is in the way. ``existing_id`` is its id, ``reason`` one sentence."""

    def __init__(self, existing_id: str, reason: str) -> None:
        self.existing_id = existing_id
        self.reason = reason
        super().__init__(reason)


class OAuthClientChanged(Exception):
    """The client is no longer as it was read."""


class OAuthClients:
    """The clients in the store. Every method raises StoreUnavailable if the store can't be used now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def get(self, client_id: str) -> OAuthClient | None:
        """Return a client by its ``id``, deleted or not; None if it is gone or can't be decrypted."""
        return await self._one(await self._engine.fetch_all(_BY_ID, {"id": client_id}), client_id)

    async def all(self) -> list[OAuthClient]:
        """Return the clients of all projects, deleted ones too, oldest first."""
        return await self._read(await self._engine.fetch_all(_ALL), {})

    async def of_project(self, project_id: str) -> list[OAuthClient]:
        """Return the clients of a project that are not deleted, oldest first."""
        asked: Columns = {"project_id": project_id}
        return await self._read(await self._engine.fetch_all(_OF_PROJECT, asked), asked)

    async def add(self, client: OAuthClient) -> None:
        """Store a new client durably.

        Raises OAuthClientConflict if its project has one for the provider, or an active one for one of its servers.
        """
        async with self._engine.transaction() as transaction:
            await self._add(transaction, client)

    async def add_within(self, transaction: Transaction, client: OAuthClient) -> OAuthClient:
        """Store a client within a transaction unless it is there; return the one that is there then.

        Raises OAuthClientConflict as ``add`` does.
        """
        asked: Columns = {"id": client.id}
        found = await self._one(await transaction.execute(_BY_ID, asked), client.id)
        if found is None:
            await self._add(transaction, client)
        return found or client

    async def _add(self, transaction: Transaction, client: OAuthClient) -> None:
        await self._check_conflicts(transaction, client)
        uid = new_uid()
        cipher = RowCipher(self._engine.cipher, _TABLE, uid)
        columns = _columns(client, cipher)
        await transaction.execute(_ADD, {"uid": uid, **columns, SEAL: cipher.seal_row(columns)})

    async def change(self, client: OAuthClient) -> None:
        """Store a changed client durably, whose version is one higher than that of the stored one.

        Raises OAuthClientChanged if that has another version by now, and OAuthClientConflict as ``add`` does.
        """
        asked: Columns = {"id": client.id, "version": client.version - 1}
        async with self._engine.transaction() as transaction:
            rows = await transaction.execute(f"{_BY_ID} AND version = :version", asked)
            found = await intact_rows(self._engine, _TABLE, rows, asked)
            if not found:
                raise OAuthClientChanged
            await self._check_conflicts(transaction, client)
            cipher = RowCipher(self._engine.cipher, _TABLE, found[0]["uid"])
            await change_row(self._engine, transaction, _TABLE, found[0], _columns(client, cipher))

    async def _check_conflicts(self, transaction: Transaction, client: OAuthClient) -> None:
        if client.deleted_at is not None:
            return
        asked: Columns = {"project_id": client.project_id}
        others = await self._read(await transaction.execute(_OF_PROJECT, asked), asked)
        for other in others:
            if other.id == client.id:
                continue
            if other.provider == client.provider:
                raise OAuthClientConflict(other.id, f"There is a client for the provider {client.provider} already.")
            shared = set(other.server_ids) & set(client.server_ids)
            if shared and other.status is client.status is OAuthClientStatus.ACTIVE:
                servers = ", ".join(sorted(shared))
                raise OAuthClientConflict(other.id, f"Another active client is for the same server: {servers}.")

    async def _one(self, rows: list[Row], client_id: str) -> OAuthClient | None:
        return next(iter(await self._read(rows, {"id": client_id})), None)

    async def _read(self, rows: list[Row], asked: Columns) -> list[OAuthClient]:
        return await decode_rows(self._engine, _TABLE, rows, asked, _read_client)


def _columns(client: OAuthClient, cipher: RowCipher) -> Columns:
    return {
        "id": client.id,
        "customer_id": client.customer_id,
        "project_id": client.project_id,
        "provider": client.provider,
        "provider_name": client.provider_name,
        "client_id": client.client_id,
        "client_secret": cipher.seal_if("client_secret", client.client_secret),
        "authorization_url": client.authorization_url,
        "token_url": client.token_url,
        "scopes": json.dumps(client.scopes),
        "redirect_uris": json.dumps(client.redirect_uris),
        "metadata": json.dumps(dict(client.metadata)),
        "server_ids": json.dumps(client.server_ids),
        "status": str(client.status),
        "version": client.version,
        "created_at": client.created_at,
        "updated_at": client.updated_at,
        "deleted_at": client.deleted_at,
    }


def _read_client(row: Row, cipher: RowCipher) -> OAuthClient:
    return OAuthClient(
        id=row["id"],
        customer_id=row["customer_id"],
        project_id=row["project_id"],
        provider=row["provider"],
        provider_name=row["provider_name"],
        client_id=row["client_id"],
        client_secret=cipher.open_if("client_secret", row["client_secret"]),
        authorization_url=row["authorization_url"],
        token_url=row["token_url"],
        scopes=tuple(json.loads(row["scopes"])),
        redirect_uris=tuple(json.loads(row["redirect_uris"])),
        metadata=json.loads(row["metadata"]),
        server_ids=tuple(json.loads(row["server_ids"])),
        status=OAuthClientStatus(row["status"]),
        version=row["version"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        deleted_at=row["deleted_at"],
    )
