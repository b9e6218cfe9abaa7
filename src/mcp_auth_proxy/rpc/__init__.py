"""JSON-RPC: what a request body says (``messages``), and the proxy's own answers (``answers``, ``events``)."""
