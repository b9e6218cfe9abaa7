"""The servers of ``mcp-auth-proxy demo``: an authorization server and a protected MCP server, on loopback only.

Small and honest: they enforce what they claim (PKCE, single use, rotation, audience), and the test fakes extend
them. ``ledger`` holds the rules without HTTP, ``client_requests`` reads what clients send, ``authorization_server``
and ``mcp_server`` answer, and ``local_server`` runs either inside the current event loop. Not for production:
nothing is stored, nobody logs in.
"""
