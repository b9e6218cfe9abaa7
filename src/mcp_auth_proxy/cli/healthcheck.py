"""``healthcheck``: ask a proxy of this machine whether it is ready.

It is run every few seconds, so it imports little.
"""

import http.client
import json

from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.errors import excerpt

TIMEOUT = 4.0
"""Seconds: less than the time that the image's HEALTHCHECK gives it."""

_MAX_BODY = 64 * 1024


def problem_at(address: Address) -> str | None:
    """Return why the proxy at this address is not ready; None if it is.

    It is asked directly, whatever forward proxy the environment names.
    """
    connection = http.client.HTTPConnection(address.host, address.port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/readyz", headers={"Connection": "close"})
        response = connection.getresponse()
        if response.status == 200:
            return None
        return f"http://{address}/readyz answered {response.status} ({_reason(response.read(_MAX_BODY))})"
    except http.client.HTTPException:
        return f"http://{address}/readyz gave no proper HTTP response"
    except OSError as error:
        return f"http://{address}/readyz can't be reached: {error.strerror or error}"
    finally:
        connection.close()


def _reason(body: bytes) -> str:
    try:
        document = json.loads(body)
        return excerpt(str(document.get("reason") or document["status"]))
    except (ValueError, AttributeError, KeyError):
        return excerpt(body.decode(errors="replace").strip() or "no reason is given")
