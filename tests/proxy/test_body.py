"""Reading the body of a client's request."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.proxy.body import BodyTooLarge, ClientDisconnected, read_body


def receiving(*messages: dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    return receive


def part(body: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


async def test_a_body_in_one_message_is_returned_as_it_is() -> None:
    assert await read_body(receiving(part(b"abc", False)), [(b"content-length", b"3")], 3) == b"abc"


async def test_a_body_in_parts_is_joined() -> None:
    assert await read_body(receiving(part(b"ab", True), part(b"", True), part(b"c", False)), [], 3) == b"abc"


async def test_a_message_without_keys_is_an_empty_body() -> None:
    assert await read_body(receiving({"type": "http.request"}), [], 3) == b""


async def test_a_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BodyTooLarge, match=r"over 3 bytes; limits\.body"):
        await read_body(receiving(), [(b"content-length", b"4")], 3)


@pytest.mark.parametrize("parts", [[part(b"abcd", False)], [part(b"abc", True), part(b"d", True)]])
async def test_a_body_without_length_is_counted_while_it_is_read(parts: list[dict[str, Any]]) -> None:
    # T30
    with pytest.raises(BodyTooLarge) as caught:
        await read_body(receiving(*parts), [], 3)
    assert caught.value.limit == 3
    assert isinstance(caught.value, McpAuthProxyError)


@pytest.mark.parametrize("messages", [[GONE], [part(b"a", True), GONE]])
async def test_a_client_that_goes_away_is_told_apart(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(ClientDisconnected):
        await read_body(receiving(*messages), [], 3)
