"""Forwarding of MCP, and nothing else.

``forwarder`` takes each request, on the ``fast_path`` or by a ``handler`` (send, on 401 or 403 ask the broker, send
again). A handler uses ``upstream_client`` (head, token, redirects), ``consent_wait`` (while a user authorizes) and
``responder`` (what the client is sent). ``headers`` says which fields pass, ``routes`` which path leads to which
server, ``sessions`` what clients declared. ``decoding`` and ``probe`` serve special cases.
"""
