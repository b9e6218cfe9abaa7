"""Read the trace id that a client sends (W3C Trace Context, §3.2), for logs and errors about its request.

``traceparent`` is forwarded unchanged: the proxy neither starts a trace nor adds a span. The id is passed to log calls
explicitly, not in a context variable: callbacks of connections and timers run in the context of the request that
created them, and serve other requests later.
"""

import re
from collections.abc import Iterable
from typing import Any

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?", re.DOTALL)

_INVALID_VERSION = b"ff"
_NO_TRACE = b"0" * 32
_NO_PARENT = b"0" * 16


def parse_trace_id(traceparent: bytes) -> str | None:
    """Return the trace id of a ``traceparent`` value, 32 lower-case hex digits; None if the value is not valid.

    Versions after 00 may append fields (§4.3); version 00 has exactly four.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace, parent, rest = found.groups()
    if version == _INVALID_VERSION or trace == _NO_TRACE or parent == _NO_PARENT or (version == b"00" and rest):
        return None
    return trace.decode("ascii")


def trace_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the trace id in a request's headers, names in lower case; None if there is none, or more than one."""
    values = [value for name, value in headers if name == b"traceparent"]
    return parse_trace_id(values[0]) if len(values) == 1 else None


def log_extra(trace_id: str | None) -> dict[str, Any]:
    """Return the ``extra`` of a log call, so that its line has the trace id."""
    return {"fields": {"trace_id": trace_id}} if trace_id else {}
