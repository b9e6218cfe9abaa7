"""Sockets, HTTP/1.1 and URLs; knows neither MCP nor OAuth.

Client side: ``http_server`` (one connection) with ``request_parser`` and ``client_timeouts`` → ``client_request``;
``asgi`` is the bridge to Starlette. Upstream side: ``http_client`` → ``pool`` → ``http_connection`` →
``http_response``. Both use ``http_head``. Below: ``dial`` (names, addresses, timeouts), ``forward_proxy``, ``tls``,
``addresses`` (which ones may be dialed) and ``urls``.
"""
