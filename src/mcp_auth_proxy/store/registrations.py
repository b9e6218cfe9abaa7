"""The client identities we were given, and the issuer to which the configured ones belong."""

from mcp_auth_proxy.models import Registration
from mcp_auth_proxy.store.codec import RowCipher, decode_rows, new_uid, read_registration, registration_columns
from mcp_auth_proxy.store.database import Database

_TABLE = "registrations"
_SAVE = """
    INSERT INTO registrations (
        uid, server, issuer, client_id, client_auth, client_kind, client_secret, client_redirect_uri,
        client_secret_expires_at, client_created_at
    ) VALUES (
        :uid, :server, :issuer, :client_id, :client_auth, :client_kind, :client_secret, :client_redirect_uri,
        :client_secret_expires_at, :client_created_at
    )
    ON CONFLICT (server, issuer, client_redirect_uri) DO UPDATE SET
        uid = excluded.uid, client_id = excluded.client_id, client_auth = excluded.client_auth,
        client_kind = excluded.client_kind, client_secret = excluded.client_secret,
        client_secret_expires_at = excluded.client_secret_expires_at, client_created_at = excluded.client_created_at
"""
_BIND = """
    INSERT INTO client_bindings (server, client_id, issuer) VALUES (?, ?, ?)
    ON CONFLICT (server, client_id) DO NOTHING
"""


class Registrations:
    """The registrations of the store. Every method raises StoreUnavailable when the store can't be used now."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(
        self, server: str, issuer: str, redirect_uri: str, *, account: str = "default"
    ) -> Registration | None:
        """The registration of a server at an issuer for a redirect URI; None when there is none that opens."""
        rows = await self._database.fetch_all(
            "SELECT * FROM registrations WHERE server = ? AND issuer = ? AND client_redirect_uri = ?",
            (server, issuer, redirect_uri),
        )
        return next(iter(decode_rows(self._database, _TABLE, rows, read_registration)), None)

    async def save(self, registration: Registration, *, account: str = "default") -> None:
        """Stores a registration in the place of the one for the same server, issuer and redirect URI."""
        uid = new_uid()
        columns = registration_columns(registration, RowCipher(self._database.cipher, _TABLE, uid))
        values = {"uid": uid, "server": registration.server, "issuer": registration.issuer, **columns}
        async with self._database.transaction() as transaction:
            await transaction.execute(_SAVE, values)

    async def delete(self, server: str, issuer: str | None = None, *, account: str = "default") -> None:
        """Forgets the registrations of a server, at one issuer or at all."""
        async with self._database.transaction() as transaction:
            if issuer is None:
                await transaction.execute("DELETE FROM registrations WHERE server = ?", (server,))
            else:
                await transaction.execute("DELETE FROM registrations WHERE server = ? AND issuer = ?", (server, issuer))

    async def bound_issuer(self, server: str, client_id: str) -> str | None:
        """The issuer that ``bind_client`` has bound a configured client to; None where it was never used."""
        row = await self._database.fetch_one(
            "SELECT issuer FROM client_bindings WHERE server = ? AND client_id = ?", (server, client_id)
        )
        return None if row is None else str(row["issuer"])

    async def bind_client(self, server: str, client_id: str, issuer: str) -> str:
        """The issuer to which a configured client belongs: the first one it was used with, which is now this one
        where there was none. Its secret must go to no other.
        """
        async with self._database.transaction() as transaction:
            await transaction.execute(_BIND, (server, client_id, issuer))
            (row,) = await transaction.execute(
                "SELECT issuer FROM client_bindings WHERE server = ? AND client_id = ?", (server, client_id)
            )
        return str(row["issuer"])
