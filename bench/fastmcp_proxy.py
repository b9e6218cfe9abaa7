"""FastMCP's proxy, as its documentation sets it up: ``python fastmcp_proxy.py PORT UPSTREAM_URL TOKEN``.

Runs in an environment of its own (requirements/bench.txt). Stateless and with JSON answers, which is the
fastest it goes; the header is static, so no OAuth is in the measure.
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
