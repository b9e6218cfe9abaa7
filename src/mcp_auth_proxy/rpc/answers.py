"""What an MCP client is told in the place of a 401: answers in its own protocol, by what it can understand.

Pure functions from a request body to an answer. Decisions rest on the body, never on mirrored headers.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

URL_ELICITATION_REQUIRED = -32042
"""MCP 2025-11-25, client/elicitation: the request needs a URL to be visited first."""

AUTHORIZATION_REQUIRED = -32001
"""Ours, from the range that JSON-RPC leaves to implementations: a user has to authorize, or could not."""

UPSTREAM_FAILED = -32002
"""Ours: the upstream server, or what authorizes for it, can't be used now."""

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
"""JSON-RPC 2.0 §5.1: no JSON; JSON, but no message."""

LINK_KEY = "io.mcp-auth-proxy/authorization_url"
INPUT_KEY = "io.mcp-auth-proxy/authorization"
"""The key of our own entry among ``inputRequests``, and so among the ``inputResponses`` of a retry."""
_INPUT_KEY_START = INPUT_KEY.partition("/")[0].encode()

MODERN_VERSION = "2026-07-28"
_VERSION_META = "io.modelcontextprotocol/protocolVersion"
_CAPABILITIES_META = "io.modelcontextprotocol/clientCapabilities"
_INPUT_REQUIRED_METHODS = frozenset({"tools/call", "prompts/get", "resources/read"})

MAX_BATCH = 1000
"""Messages of one body: each is looked at and answered within one turn of the event loop, which all clients share."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One JSON-RPC message of a request body, as far as answers depend on it."""

    method: str
    id: str | int | float | None
    is_request: bool
    modern: bool
    """It speaks 2026-07-28 or later, by its own ``_meta``."""
    url_elicitation: bool
    """It declares, in itself, that URLs can be shown to the user."""


def parse(body: bytes) -> tuple[list[Message], bool]:
    """Return the messages of a body and whether it is a batch; nothing where it is no JSON-RPC or over MAX_BATCH."""
    try:
        document = _decode(body)
    except (ValueError, RecursionError):
        return [], False
    if isinstance(document, list):
        if len(document) > MAX_BATCH:
            return [], False
        return [_message(item) for item in document if isinstance(item, dict)], True
    return ([_message(document)] if isinstance(document, dict) else []), False


def refusal(body: bytes) -> tuple[int, str] | None:
    """Return code and text of the error for a body that is no JSON-RPC (JSON-RPC 2.0 §5.1); None where it may be."""
    try:
        document = _decode(body)
    except (ValueError, RecursionError):
        return PARSE_ERROR, "Parse error: the body is not JSON."
    if any(isinstance(item, dict) for item in (document if isinstance(document, list) else [document])):
        return None
    return INVALID_REQUEST, "Invalid request: the body is JSON, but holds no JSON-RPC message."


def _message(item: Json) -> Message:
    method = item.get("method")
    params = _mapping(item.get("params"))
    meta = _mapping(params.get("_meta"))
    version = meta.get(_VERSION_META)
    modern = isinstance(version, str) and version >= MODERN_VERSION
    declared = (
        meta.get(_CAPABILITIES_META) if modern else params.get("capabilities") if method == "initialize" else None
    )
    identifier = item.get("id")
    usable = isinstance(identifier, (str, int, float)) and not isinstance(identifier, bool)
    if isinstance(identifier, float):
        # What is too large for a float is read as infinity, which JSON can't say.
        usable = math.isfinite(identifier)
    return Message(
        method=method if isinstance(method, str) else "",
        id=identifier if usable else None,
        is_request=isinstance(method, str) and usable,
        modern=modern,
        url_elicitation=isinstance(_mapping(_mapping(declared).get("elicitation")).get("url"), Mapping),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# The answers


def authorization_needed(
    message: Message, *, server: str, link: str, elicitation_id: str, session_elicits: bool
) -> Json:
    """Return the answer to one request while a user has to authorize.

    ``session_elicits``: in this request's session, the client declared URL elicitation when it initialized.
    """
    text = f"Server {server} needs your authorization. Open {link} in a browser, then try again."
    elicits = message.url_elicitation or (session_elicits and not message.modern)
    if elicits and message.modern and message.method in _INPUT_REQUIRED_METHODS:
        return _result(message, _input_required(f"Server {server} needs your authorization.", link))
    if elicits and not message.modern:
        shown = {
            "mode": "url",
            "url": link,
            "elicitationId": elicitation_id,
            "message": f"Server {server} needs your authorization.",
        }
        return _error(message.id, URL_ELICITATION_REQUIRED, text, {"elicitations": [shown], "authorization_url": link})
    if message.method == "tools/call":
        return _result(message, _tool_error(text, link, modern=message.modern))
    return _error(message.id, AUTHORIZATION_REQUIRED, text, {"authorization_url": link, "server": server})


def _input_required(text: str, link: str) -> Json:
    """MCP 2026-07-28: the client shows the URL, then retries. No ``requestState``: servers refuse a foreign one."""
    return {
        "resultType": "input_required",
        "inputRequests": {
            INPUT_KEY: {"method": "elicitation/create", "params": {"mode": "url", "url": link, "message": text}}
        },
        "_meta": {LINK_KEY: link},
    }


def _tool_error(text: str, link: str, *, modern: bool) -> Json:
    result: Json = {"content": [{"type": "text", "text": text}], "isError": True, "_meta": {LINK_KEY: link}}
    if modern:
        result["resultType"] = "complete"
    return result


def failure(message: Message | None, text: str, *, code: int, server: str, link: str | None = None) -> Json:
    """Return a JSON-RPC error; ``link`` is given only where opening it helps."""
    data: Json = {"server": server, "reason": text}
    if link is not None:
        data["authorization_url"] = link
    return _error(message.id if message else None, code, text, data)


def answer_all(body: bytes, answer: Callable[[Message], Json], fallback: Callable[[], Json]) -> bytes:
    """Answer every request of a body, in a batch where it is one; ``fallback`` where it holds no request."""
    messages, is_batch = parse(body)
    answers = [answer(message) for message in messages if message.is_request]
    if not answers:
        return encode(fallback())
    return encode(answers if is_batch else answers[0])


def encode(document: object) -> bytes:
    """Return JSON. Raises ValueError for the infinities, RecursionError for what is nested too deep."""
    # In ASCII, for an id or argument may hold half a surrogate pair, which JSON can say and UTF-8 can't.
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii")


def _decode(body: bytes) -> Any:
    """Read JSON, without the NaN and Infinity that Python would let pass. Raises ValueError, RecursionError."""
    return json.loads(body, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _result(message: Message, result: Json) -> Json:
    return {"jsonrpc": "2.0", "id": message.id, "result": result}


def _error(identifier: str | int | float | None, code: int, text: str, data: Json) -> Json:
    return {"jsonrpc": "2.0", "id": identifier, "error": {"code": code, "message": text, "data": data}}


# A retry of what was answered with input_required


def is_retry(body: bytes) -> bool:
    """Whether the body may carry an answer to our own ``inputRequests`` entry (a quick look, no parsing)."""
    # Not the whole key: some encoders write the slash in it as "\/".
    return _INPUT_KEY_START in body


def without_our_input(body: bytes) -> tuple[bytes, str]:
    """Take our entry out of ``inputResponses``, for the upstream did not ask for it; return the user's action too.

    The action is empty where the body carries no such entry; the body is then unchanged.
    """
    try:
        document = _decode(body)
    except (ValueError, RecursionError):
        return body, ""
    params = document.get("params") if isinstance(document, dict) else None
    responses = params.get("inputResponses") if isinstance(params, dict) else None
    if not isinstance(params, dict) or not isinstance(responses, dict) or INPUT_KEY not in responses:
        return body, ""
    action = _mapping(responses.pop(INPUT_KEY)).get("action")
    if not responses:
        del params["inputResponses"]
    try:
        return encode(document), action if isinstance(action, str) else "accept"
    except (ValueError, RecursionError):
        return body, ""


def as_events(documents: Iterable[bytes]) -> bytes:
    """Return JSON documents as server-sent events; a line break within one is allowed between its tokens only."""
    return b"".join(
        b"event: message\ndata: " + document.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n\n"
        for document in documents
    )
