"""The access log: one line for each finished request to an MCP endpoint.

It never contains an argument, a query, a header field or a body. The client chooses only two texts in it: the HTTP
method, which the parser checks, and the MCP method, which must look like one (see ``method_token``).
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.observability.logs import ACCESS_LOGGER

logger = logging.getLogger(ACCESS_LOGGER)

_METHOD = re.compile(r"[a-z]{1,32}(?:/[A-Za-z_]{1,32}){0,3}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is logged about one request."""

    server: str
    account: str
    """Who used the server: ``principal/account``."""
    method: str
    """The HTTP method."""
    mcp_method: str | None
    """None if the method is not known: the body was not parsed and there is no Mcp-Method, or there are several."""
    status: int
    """The HTTP status; 499 if the client went away before it had one."""
    size: int
    """Bytes of the response body that were sent."""
    seconds: float
    trace_id: str | None


class AccessLog:
    """Write the access log. Callers check ``enabled`` first: a request costs one comparison if the log is off."""

    def __init__(self) -> None:
        self.enabled = logger.isEnabledFor(logging.INFO)

    def write(self, entry: Entry) -> None:
        """Write one line."""
        fields: dict[str, str | int | float] = {
            "server": entry.server,
            "account": entry.account,
            "method": entry.method,
        }
        if entry.mcp_method is not None:
            fields["mcp_method"] = entry.mcp_method
        fields |= {"status": entry.status, "bytes": entry.size, "duration_ms": round(entry.seconds * 1000, 3)}
        if entry.trace_id is not None:
            fields["trace_id"] = entry.trace_id
        logger.info("request", extra={"fields": fields})


def method_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the method in ``Mcp-Method`` (MCP 2026-07-28) as it may be logged; None if there is none."""
    for name, value in headers:
        if name == b"mcp-method":
            return method_token(value.decode("latin-1"))
    return None


def method_token(value: str) -> str | None:
    """Return an MCP method as it may be logged; None unless it is words of letters with slashes between them.

    All methods of MCP have this form, and no secret does: it has no digits, and at most 32 letters in a row.
    """
    return value if _METHOD.fullmatch(value) else None
