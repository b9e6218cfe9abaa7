"""Parse a request body, as far as the proxy acts on it (JSON-RPC 2.0, MCP).

Decisions are based on the body, never on headers that mirror it.
"""

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from mcp_auth_proxy.rpc.encoding import MAX_PARSED, decode, decode_value, encode, is_cheap

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
"""JSON-RPC 2.0 §5.1: the body is not JSON; it is JSON, but not a message."""

INPUT_KEY = "io.mcp-auth-proxy/authorization"
"""The key of the proxy's own entry in ``inputRequests``, and so in the ``inputResponses`` of a retry."""

MODERN_VERSION = "2026-07-28"
"""The first MCP revision without sessions: each request describes itself in ``_meta``."""

_REVISION = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

MAX_BATCH = 1000
"""Messages in one body: all of them are read and answered in one turn of the event loop, which all clients share."""

MAX_INSPECTED = 64 * 1024
"""Bytes of the longest body that is searched for ``initialize`` and ``subscriptions/listen``."""

# Prefixes, because some encoders write a slash as "\/".
_INPUT_MARKER = INPUT_KEY.partition("/")[0].encode()
_INITIALIZE_MARKER = b'"initialize"'
_SUBSCRIPTION_MARKER = b"subscriptions"

_WITH_PARAMS = frozenset({"initialize", "logging/setLevel", "subscriptions/listen", "tools/call"})
"""The methods whose parameters an answer of the proxy may depend on."""

_SPACE = re.compile(r"[ \t\r\n]*")

_VERSION_META = "io.modelcontextprotocol/protocolVersion"
_CAPABILITIES_META = "io.modelcontextprotocol/clientCapabilities"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One JSON-RPC message of a body, reduced to what answers depend on."""

    method: str
    id: str | int | float | None
    is_request: bool
    modern: bool
    """The message itself declares MCP 2026-07-28 or later."""
    url_elicitation: bool
    """The message itself declares that the client can show URLs to the user."""
    params: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The parameters, of methods in ``_WITH_PARAMS`` only."""


def is_revision(version: object) -> TypeGuard[str]:
    """Return whether a value has the form of a protocol revision: it may come from outside, and goes into a header."""
    return isinstance(version, str) and _REVISION.fullmatch(version) is not None


def needs_inspection(content: bytes) -> bool:
    """Return whether the proxy may have to act on a body itself: a search for markers, without parsing."""
    # Not ``in``, which makes an exception first when it searches bytes.
    find = content.find
    if len(content) > MAX_INSPECTED:
        return len(content) <= MAX_PARSED and find(_INPUT_MARKER) >= 0
    return find(_INPUT_MARKER) >= 0 or find(_INITIALIZE_MARKER) >= 0 or find(_SUBSCRIPTION_MARKER) >= 0


class RequestBody:
    """A request body. It is parsed at most once, when one of the parsed properties is first used."""

    __slots__ = ("_action", "_error", "_is_batch", "_messages", "_parsed", "_too_costly", "content")

    def __init__(self, content: bytes) -> None:
        self.content = content
        """The bytes to send to the upstream; ``parse`` may change them."""
        self._parsed = False
        self._too_costly = False
        self._messages: tuple[Message, ...] = ()
        self._is_batch = False
        self._error: tuple[int, str] | None = None
        self._action = ""

    @classmethod
    def of_start(cls, start: bytes) -> "RequestBody":
        """Return a body of which only the start is known: its one request, if the start has method and id, or nothing.

        It has no content, so nothing can be sent of it.
        """
        body = cls(b"")
        body._parsed = True
        message = _message(_first_members(start))
        if message.is_request:
            body._messages = (message,)
        return body

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages; none if the body is not JSON-RPC, has more than MAX_BATCH or is ``too_costly``."""
        self.parse()
        return self._messages

    @property
    def requests(self) -> list[Message]:
        """The messages that expect an answer."""
        return [message for message in self.messages if message.is_request]

    @property
    def is_batch(self) -> bool:
        """Whether the body is an array, so that its answers must be one too."""
        self.parse()
        return self._is_batch

    @property
    def error(self) -> tuple[int, str] | None:
        """Code and text of the JSON-RPC error if the body is not JSON-RPC (JSON-RPC 2.0 §5.1), else None."""
        self.parse()
        return self._error

    @property
    def too_costly(self) -> bool:
        """Whether the body is not parsed because that would take too long: nothing is known of what it says."""
        self.parse()
        return self._too_costly

    @property
    def consent_action(self) -> str:
        """The user's action in a retry after ``input_required``; empty if this is not such a retry."""
        self.parse()
        return self._action

    @property
    def method_if_parsed(self) -> str | None:
        """The method of the only message, if the body was parsed for another reason; else None."""
        return self._messages[0].method if len(self._messages) == 1 else None

    def release(self) -> None:
        """Drop the bytes once they will not be sent again; what was parsed stays."""
        self.content = b""

    def has_method(self, method: str) -> bool:
        """Return whether a message has this method."""
        return any(message.method == method for message in self.messages)

    def parse(self) -> None:
        """Parse the body, if that was not done. Remove the proxy's own entry of a retry: it is not for the upstream."""
        if self._parsed:
            return
        self._parsed = True
        if not is_cheap(self.content):
            self._too_costly = True
            return
        try:
            document = decode(self.content)
        except (ValueError, RecursionError):
            self._error = PARSE_ERROR, "Parse error: the body is not JSON."
            return
        self._is_batch = isinstance(document, list)
        items = document if isinstance(document, list) else [document]
        if not any(isinstance(item, dict) for item in items):
            self._error = INVALID_REQUEST, "Invalid request: the body is JSON, but not a JSON-RPC message."
        elif len(items) <= MAX_BATCH:
            self._messages = tuple(_message(item) for item in items if isinstance(item, dict))
        if isinstance(document, dict):
            self._take_consent_entry(document)

    def _take_consent_entry(self, document: Json) -> None:
        params = document.get("params")
        responses = params.get("inputResponses") if isinstance(params, dict) else None
        if not isinstance(params, dict) or not isinstance(responses, dict) or INPUT_KEY not in responses:
            return
        action = _mapping(responses.pop(INPUT_KEY)).get("action")
        if not responses:
            del params["inputResponses"]
        try:
            self.content = encode(document)
        except (ValueError, RecursionError):
            return
        self._action = action if isinstance(action, str) else "accept"


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
        # A number too large for a float is read as infinity, which JSON can't express.
        usable = math.isfinite(identifier)
    return Message(
        method=method if isinstance(method, str) else "",
        id=identifier if usable else None,
        is_request=isinstance(method, str) and usable,
        modern=modern,
        url_elicitation=isinstance(_mapping(_mapping(declared).get("elicitation")).get("url"), Mapping),
        params=params if isinstance(method, str) and method in _WITH_PARAMS else {},
    )


def _first_members(start: bytes) -> Json:
    """Return the members that the JSON object of which this is the start has, as far as each is complete."""
    members: Json = {}
    try:
        # Not final: the last character may be cut.
        text, _ = codecs.utf_8_decode(start, "strict", False)
        at = _skip_space(text, 0)
        if text[at] != "{":
            return members
        while text[at] != "}":
            name, at = decode_value(text, _skip_space(text, at + 1))
            at = _skip_space(text, at)
            if not isinstance(name, str) or text[at] != ":":
                break
            value, at = decode_value(text, _skip_space(text, at + 1))
            at = _skip_space(text, at)
            # A number is complete only if something follows.
            if text[at] not in ",}":
                break
            members[name] = value
    except (ValueError, IndexError, RecursionError):
        pass
    return members


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found is not None else at


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
