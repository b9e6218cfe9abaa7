"""FastMCP's proxy, as its documentation sets it up: ``python fastmcp_proxy.py PORT UPSTREAM_URL TOKEN``.

It runs in an environment of its own (requirements/bench.txt). It is stateless and answers with JSON, which is its
fastest form; the header is static, so the measure includes no OAuth.
"""

import sys

from fastmcp.client.transports import StreamableHttpTransport
from fastmcp.server import create_proxy
from fastmcp.server.providers.proxy import ProxyClient

port, url, token = sys.argv[1:4]
upstream = ProxyClient(StreamableHttpTransport(url, headers={"Authorization": f"Bearer {token}"}))
create_proxy(upstream, name="bench").run(
    transport="http",
    host="127.0.0.1",
    port=int(port),
    stateless_http=True,
    json_response=True,
    show_banner=False,
    log_level="ERROR",
)
