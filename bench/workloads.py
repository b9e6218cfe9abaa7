"""What the contenders are asked, and what comes back: one MCP request, and the forms in which servers answer it.

The request is a stateless ``tools/call`` of MCP revision 2026-07-28. The answer is always the same JSON-RPC message,
as a JSON body or as the one event of an event stream.
"""

import json
from dataclasses import dataclass
from typing import Any

VERSION = "2026-07-28"
META = {
    "io.modelcontextprotocol/protocolVersion": VERSION,
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
BODY = json.dumps(
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "echo", "arguments": {}, "_meta": META},
    }
)
HEADERS = (
    ("content-type", "application/json"),
    ("accept", "application/json, text/event-stream"),
    ("mcp-protocol-version", VERSION),
    ("mcp-method", "tools/call"),
    ("mcp-name", "echo"),
)
TOOL_RESULT: dict[str, Any] = {"resultType": "complete", "content": [{"type": "text", "text": "pong " * 40}]}
ANSWER = json.dumps({"jsonrpc": "2.0", "id": 1, "result": TOOL_RESULT}, separators=(",", ":")).encode()

EVENT_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"date: Sat, 21 Nov 2026 12:00:00 GMT\r\n"
    b"server: uvicorn\r\n"
    b"cache-control: no-cache, no-transform\r\n"
    b"connection: keep-alive\r\n"
    b"content-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
"""As the MCP SDKs send it, without ``X-Accel-Buffering: no``, which would make nginx slower."""

EVENT = b"event: message\r\ndata: " + ANSWER + b"\r\n\r\n"
EVENT_CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST_CHUNK = b"0\r\n\r\n"

EVENT_STREAMS = {
    "/events": (EVENT_STREAM_HEAD + EVENT_CHUNK + LAST_CHUNK, b""),
    "/apart": (EVENT_STREAM_HEAD + EVENT_CHUNK, LAST_CHUNK),
    "/parts": (EVENT_STREAM_HEAD, EVENT_CHUNK + LAST_CHUNK),
}
"""Path of the origin to what is sent at once, and what is sent a moment later."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One form of answer. ``key`` is the name of the server in the configuration of each proxy."""

    key: str
    title: str
    min_share: float | None
    """The share of nginx's rate that the proxy has to reach at many connections; None if there is no target."""


JSON = Workload("json", "JSON", 0.33)
EVENTS = Workload("events", "event stream in one piece", 0.33)
APART = Workload("apart", "event stream, end apart", 0.33)
PARTS = Workload("parts", "event stream, head apart", None)
TLS = Workload("tls", "JSON, upstream behind TLS", 0.33)
WORKLOADS = (JSON, EVENTS, APART, PARTS, TLS)
