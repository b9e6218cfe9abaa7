"""The servers of ``mcp-auth-proxy demo``: an authorization server and a protected MCP server, on loopback only.

They are small, but enforce what they claim (PKCE, single use, rotation, audience), and the test fakes extend them.
``ledger`` has the rules without HTTP, ``client_requests`` parses requests, ``authorization_server`` and ``mcp_server``
answer them, and ``local_server`` runs either in the current event loop. Not for production: nothing is stored, and
users do not log in.
"""
