"""The client's request body, in memory so that it can be sent again after a challenge, and bounded for that."""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from mcp_auth_proxy.errors import McpAuthProxyError

Message = MutableMapping[str, Any]


class BodyTooLarge(McpAuthProxyError):
    """The request body is larger than allowed. ``limit`` is in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"The request body is over {limit} bytes; limits.body allows more.")


class ClientDisconnected(McpAuthProxyError):
    """The client went away before its request was complete: there is nobody left to answer."""


async def read_body(receive: Callable[[], Awaitable[Any]], headers: Iterable[tuple[bytes, bytes]], limit: int) -> bytes:
    """Return the whole request body, of ``limit`` bytes at most.

    What ``Content-Length`` announces is held against the limit before anything is read, and what comes is counted
    whatever was announced. Raises BodyTooLarge and ClientGone.
    """
    for name, value in headers:
        # The server's parser has seen to it that the value is a number (RFC 9110 §8.6).
        if name == b"content-length" and int(value) > limit:
            raise BodyTooLarge(limit)
    message: Message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body
    return await _read_parts(receive, message, limit)


async def _read_parts(receive: Callable[[], Awaitable[Any]], message: Message, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLarge(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()
    raise ClientDisconnected("The client closed the connection before its request was complete.")
