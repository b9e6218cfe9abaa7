"""What is read of a client's line, and of a message of the server."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.rpc.encoding import decode, encode
from mcp_auth_proxy.rpc.messages import INVALID_REQUEST, MODERN_VERSION, PARSE_ERROR

Json = dict[str, Any]

_VERSION_META = "io.modelcontextprotocol/protocolVersion"

HARMLESS = frozenset(
    {
        "completion/complete",
        "initialize",
        "logging/setLevel",
        "ping",
        "prompts/get",
        "prompts/list",
        "resources/list",
        "resources/read",
        "resources/subscribe",
        "resources/templates/list",
        "resources/unsubscribe",
        "server/discover",
        "subscriptions/listen",
        "tools/list",
    }
)
"""The methods that may be sent twice. A tool's call is none of them."""


class MalformedLine(Exception):
    """A line that is not a JSON-RPC message: the error to answer it with (JSON-RPC 2.0 §5.1)."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Request:
    """A message that is to be answered. ``key`` tells 1 from "1"."""

    id: str | int | float
    key: str
    method: str


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """A line of the client: a message, or a batch of them."""

    content: bytes
    """The line, as it is sent on."""
    requests: tuple[Request, ...]
    is_batch: bool = False
    method: str = ""
    """The method of a single request or notification, else empty."""
    params: Mapping[str, Any] | None = None
    version: str = ""
    """The revision that the message declares if that is 2026-07-28 or later, else empty."""

    @property
    def harmless(self) -> bool:
        """Whether it may be sent twice."""
        return bool(self.requests) and all(request.method in HARMLESS for request in self.requests)


def read_line(line: bytes) -> ClientMessage:
    """Read a line that is not empty. Raises MalformedLine."""
    try:
        document = read_json(line)
    except ValueError:
        raise MalformedLine(PARSE_ERROR, "Parse error: the line is not JSON in UTF-8.") from None
    if isinstance(document, list):
        if not document or not all(map(_is_message, document)):
            raise MalformedLine(INVALID_REQUEST, "Invalid request: not every item of the batch is a message.")
        requests = tuple(_request(each) for each in document if "method" in each and "id" in each)
        return ClientMessage(line, requests, is_batch=True)
    if not _is_message(document):
        raise MalformedLine(INVALID_REQUEST, "Invalid request: the line is JSON, but not a JSON-RPC message.")
    method = document.get("method", "")
    params = mapping(document.get("params"))
    version = mapping(params.get("_meta")).get(_VERSION_META)
    return ClientMessage(
        line,
        (_request(document),) if method and "id" in document else (),
        method=method,
        params=params,
        version=version if isinstance(version, str) and version >= MODERN_VERSION else "",
    )


def read_json(data: bytes) -> Any:
    """Return the value of a JSON text in UTF-8. Raises ValueError."""
    # json.loads would take UTF-16 and UTF-32 as well.
    data.decode()
    try:
        return decode(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def key_of(identifier: object) -> str:
    """Return what tells one id from others."""
    return json.dumps(identifier)


def is_answer(message: object) -> bool:
    """Return whether a message of the server is the response to a request."""
    return isinstance(message, dict) and "method" not in message and ("result" in message or "error" in message)


def error_line(identifier: object, code: int, text: str) -> bytes:
    """Return an error response."""
    return encode({"jsonrpc": "2.0", "id": identifier, "error": {"code": code, "message": text}})


def mapping(value: object) -> Mapping[str, Any]:
    """Return a value if it is a JSON object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or ("id" in value and not _is_id(value["id"])):
        # An error response may have no id (JSON-RPC 2.0 §5).
        return isinstance(value, dict) and "error" in value and value.get("id") is None
    if "method" in value:
        return isinstance(value["method"], str) and bool(value["method"])
    return is_answer(value)


def _is_id(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _request(document: Json) -> Request:
    return Request(document["id"], key_of(document["id"]), document["method"])
