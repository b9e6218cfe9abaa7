"""``stdio``: MCP on standard input and output, carried to a proxy by Streamable HTTP.

``bridge`` reads the client's lines and starts an ``exchange`` for each; ``sessions`` has the session of the revisions
before 2026-07-28, ``channel`` sends to the proxy that ``local_proxy`` finds or starts. ``lease`` tells such a proxy
how long it is needed.
"""
