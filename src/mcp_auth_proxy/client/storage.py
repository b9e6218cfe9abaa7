"""The sealed store in a folder, which also takes over the plain files that mcp-use has written there.

Those are ``{netloc}_{path}.json``, and the clients in ``registrations/``.
"""

from pathlib import Path
from typing import Any

from mcp_auth_proxy.client.session import opened
from mcp_auth_proxy.client.tokens import PlainClient, TokenData, text
from mcp_auth_proxy.store import plain_files


class FileTokenStorage:
    """Keep tokens in a sealed store in a folder, by default ``~/.mcp_use/tokens``.

    Plain files of mcp-use in that folder are read once for each server. They stay as they are, but their refresh tokens
    are used from then on by this storage: another program that used them too would end the grant.
    """

    def __init__(self, base_dir: str | Path | None = None) -> None:
        self.base_dir = Path(base_dir) if base_dir else Path.home() / ".mcp_use" / "tokens"

    @property
    def store(self) -> Path:
        """The file of the sealed store."""
        return self.base_dir / "mcp-auth-proxy.db"

    def plain_tokens(self, server_url: str) -> TokenData | None:
        """Return the tokens in the plain file of a server; None if there is no such file, or nothing usable in it."""
        return TokenData.read(plain_files.read_object(self._file(server_url)))

    def plain_client(self, server_url: str) -> PlainClient | None:
        """Return the client in the plain file of a server; None if there is no such file, or nothing usable in it."""
        values = plain_files.read_object(plain_files.mcp_use_registration(self.base_dir, server_url))
        client_id, uris = text(values.get("client_id")), values.get("redirect_uris")
        if not client_id:
            return None
        return PlainClient(
            client_id=client_id,
            client_secret=text(values.get("client_secret")),
            redirect_uri=(text(uris[0]) or "") if isinstance(uris, list) and uris else "",
            token_endpoint_auth_method=text(values.get("token_endpoint_auth_method")),
        )

    def _file(self, server_url: str) -> Path:
        return plain_files.mcp_use_tokens(self.base_dir, server_url)

    async def save_tokens(self, server_url: str, tokens: dict[str, Any]) -> None:
        """Seal the tokens of a server. Raises StoreError, and ValueError if there is no access token."""
        given = TokenData.read(tokens)
        if given is None:
            raise ValueError("the tokens have no access_token")
        async with opened(server_url, self.store) as session:
            await session.adopt(given, self.plain_client(server_url))

    async def load_tokens(self, server_url: str) -> TokenData | None:
        """Return the tokens of a server, None if there are none. Raises StoreError."""
        async with opened(server_url, self.store) as session:
            return await session.tokens()

    async def delete_tokens(self, server_url: str) -> None:
        """Delete the tokens of a server here, sealed and plain, without revoking them. Raises StoreError."""
        async with opened(server_url, self.store) as session:
            await session.forget()
        self._file(server_url).unlink(missing_ok=True)
