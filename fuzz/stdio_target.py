"""What the bridge of ``stdio`` reads: event streams of servers, and lines of clients."""

import json
from contextlib import suppress

from fuzz.checks import cuttings
from mcp_auth_proxy.cli.stdio_bridge.messages import MalformedLine, read_json, read_line
from mcp_auth_proxy.rpc import events
from mcp_auth_proxy.rpc.event_parser import MAX_ID, EventParser
from mcp_auth_proxy.rpc.mirrored_fields import annotations_of, request_fields


def event_stream(data: bytes) -> None:
    """Check the events of a stream, and the line that each becomes. The whole input is also a client's line."""
    whole, *others = [_read(parts) for parts in cuttings(data)]
    assert all(other == whole for other in others), "other events if the bytes come in other pieces"
    found, last_id = whole
    assert len(last_id) <= MAX_ID
    assert all(0x20 <= byte < 0x7F for byte in last_id), "an id that is no value of a field"
    for event in found:
        with suppress(ValueError):
            _check_line(event)
    _check_message(data)


def _read(parts: list[bytes]) -> tuple[list[bytes], bytes]:
    parser = EventParser()
    return [event for part in parts for event in parser.feed(part)], parser.last_id


def _check_line(event: bytes) -> None:
    document = read_json(event)
    line = events.one_line(event)
    assert b"\n" not in line and b"\r" not in line, "more than one line"
    assert json.dumps(json.loads(line)) == json.dumps(document), "another message"


def _check_message(line: bytes) -> None:
    try:
        message = read_line(line)
    except MalformedLine:
        return
    json.loads(message.content.decode())
    with suppress(ValueError):
        annotations = annotations_of((message.params or {}).get("inputSchema"))
        for name, value in request_fields(message.method, message.params or {}, message.version, annotations):
            assert all(0x20 <= byte < 0x7F for byte in name + value), "a field that breaks the head"
