"""How long requests wait for consent that are answered in place of the server."""

import json
from typing import Any, cast

import pytest

from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.proxy.cold_start import LINK_SECONDS, ColdStart
from mcp_auth_proxy.rpc.messages import RequestBody


class Post:
    """The parts of a request that decide."""

    method = b"POST"
    headers = ((b"accept", b"application/json, text/event-stream"),)


def wait(method: str, elapsed: float) -> float | None:
    body = RequestBody(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}).encode())
    none = cast(Any, None)
    cold_start = ColdStart(catalogs=none, sessions=none, elicits=none, public_url="http://127.0.0.1")
    return cold_start.wait(cast(ClientRequest, Post()), body, None, elapsed)


@pytest.mark.parametrize("method", ["server/discover", "tools/list"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0, 2.0])
def test_the_wait_ends_in_time_however_late_the_link_is(method: str, share: float) -> None:
    elapsed = share * LINK_SECONDS[method]
    waits = wait(method, elapsed)
    assert waits is not None
    assert waits >= 0
    assert elapsed + waits <= max(LINK_SECONDS[method], elapsed)


def test_the_handshake_does_not_wait_and_calls_wait_as_configured() -> None:
    assert wait("initialize", 0.0) == 0.0
    assert wait("prompts/list", 0.0) == 0.0
    assert wait("tools/call", 0.0) is None
