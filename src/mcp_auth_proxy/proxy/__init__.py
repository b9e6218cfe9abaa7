"""Forward MCP requests, and nothing else.

``forwarder`` sends each request on the ``fast_path`` or gives it to a ``handler`` (send; on 401 or 403 ask the broker;
send again). A handler uses ``upstream_client`` (head, token, redirects), ``consent_wait`` (while a user authorizes) and
``responder`` (the response to the client). ``headers`` decides which fields are forwarded, ``routes`` maps paths to
servers, ``quota`` bounds what requests keep, ``sessions`` remembers what clients declared, ``decoding`` undoes content
codings, and ``probe`` asks a server whether it wants a token.
"""
