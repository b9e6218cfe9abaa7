"""OAuth for programs that use MCP servers without a proxy: the same broker, and the same sealed store.

::

    from mcp_auth_proxy.client import OAuth

    async with httpx2.AsyncClient(auth=OAuth("https://mcp.example.com/mcp")) as client:
        ...

``oauth`` has ``OAuth``, an ``httpx2.Auth``; ``tokens`` and ``storage`` say where its tokens are; ``session`` opens the
broker for one operation; ``consent`` listens on loopback while a user authorizes.
"""

from mcp_auth_proxy.client.oauth import BearerAuth, OAuth, OAuthClientProvider
from mcp_auth_proxy.client.storage import FileTokenStorage
from mcp_auth_proxy.client.tokens import TokenData, TokenStorage

__all__ = ["BearerAuth", "FileTokenStorage", "OAuth", "OAuthClientProvider", "TokenData", "TokenStorage"]
