"""``export`` and ``import``: logins from one store to another, and from other programs.

``command`` reads the options, ``exporting`` and ``importing`` do what they say, ``secret_manifest`` writes an export as
a Secret of Kubernetes. ``mcp_remote`` and ``mcp_use`` read what those programs keep, and ``taking_over`` makes grants
of it.
"""
