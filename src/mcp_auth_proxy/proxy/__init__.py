"""The data plane: requests of MCP clients, carried to upstreams and back.

Client side: ``inbound`` (the listener's bounds) · ``routes`` · ``body`` · ``consent`` (answers of our own).
Between: ``exchange`` (send → 401/403 → broker → once more) · ``headers``.
Upstream side: ``upstream`` (pool) → ``connection`` (one HTTP/1.1 exchange on llhttp) → ``response``;
``dial`` (addresses, TLS) → ``forward_proxy`` · ``origin``.
"""
