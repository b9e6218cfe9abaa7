"""Who is calling: from the credentials of a request to a principal.

``Authenticator`` is what the router, the pages and the API ask. ``NoAuthenticator`` is that of mode ``none``.
"""

from mcp_auth_proxy.identity.authenticator import Authenticator, Fields, NoAuthenticator

__all__ = ["Authenticator", "Fields", "NoAuthenticator"]
