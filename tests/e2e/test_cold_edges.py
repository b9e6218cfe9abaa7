"""The edges of cold start: silent streams, servers that are slow or have no sessions, and what they remember."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import MODERN
from fakes.proxy import link_in, until
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.models import Account

COLD: dict[str, Any] = {"wait": "0s", "cold_start": True}
SESSIONS: dict[str, Any] = {"sessions_on": True}
URLS: dict[str, Any] = {"elicitation": {"url": {}}}


async def test_the_head_of_a_held_stream_comes_at_once(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, authorization=COLD, upstream=SESSIONS) as setup:
        await setup.client.initialize()
        async with asyncio.timeout(3), setup.client.stream() as (response, _):
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream"
            assert (await anext(response.aiter_bytes())).startswith(b":")


async def test_a_get_that_takes_no_events_is_not_held(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, authorization=COLD, upstream=SESSIONS) as setup:
        client = setup.client
        await client.initialize()
        headers = {**client.headers({}), "accept": "application/json"}
        response = await client.http.get(client.url, headers=headers, timeout=5)
        assert (response.status_code, response.json()["error"]["data"]["server"]) == (503, "notes")


async def test_a_server_without_a_stream_still_lets_the_client_hear_of_consent(
    servers: Servers, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"upstream": {}, "client": {"capabilities": URLS}}
    async with proxy_setup(servers, tmp_path, authorization=COLD, **options) as setup:
        client = setup.client
        await client.initialize()
        (elicitation,) = (await client.call("echo", text="x")).error["data"]["elicitations"]
        async with client.stream() as (_, events):
            await consent(elicitation["url"])
            async with asyncio.timeout(5):
                heard = [event async for event in events]
        methods = [event["method"] for event in heard]
        assert methods.count("notifications/elicitation/complete") == 1
        assert methods.count("notifications/tools/list_changed") == 1
        done = next(event for event in heard if event["method"] == "notifications/elicitation/complete")
        assert done["params"] == {"elicitationId": elicitation["elicitationId"]}


async def test_a_404_of_a_server_without_session_ids_ends_nothing(servers: Servers, tmp_path: Path) -> None:
    missing = FakeResponse.json({"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no"}}, 404)
    async with proxy_setup(
        servers, tmp_path, authorization=COLD, upstream={"answers": {"completion/complete": missing}}
    ) as setup:
        await consent(link_in((await setup.client.initialize()).message))
        assert (await setup.client.post("completion/complete")).status == 404
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_the_revision_of_the_server_is_named_to_it_whatever_the_client_names(
    servers: Servers, tmp_path: Path
) -> None:
    async with proxy_setup(
        servers, tmp_path, authorization=COLD, upstream={"answers": {"initialize": older("2025-06-18")}}
    ) as setup:
        client = setup.client
        await consent(link_in((await client.initialize()).message))
        message = client.message("tools/call", {"name": "echo", "arguments": {"text": "x"}}, id=7)
        headers = client.headers(message)
        del headers["mcp-protocol-version"]
        assert (await client.http.post(client.url, json=message, headers=headers)).status_code == 200
        assert setup.upstream.calls("tools/call")[-1].header("mcp-protocol-version") == "2025-06-18"


async def test_a_remembered_revision_is_announced_even_if_it_is_an_older_one(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(
        servers, tmp_path, authorization=COLD, upstream={"answers": {"initialize": older("2024-11-05")}}
    ) as setup:
        await consent(link_in((await setup.client.initialize()).message))
        application = setup.proxy.application
        account = Account("local", "notes")
        assert await application.catalogs.fetched(application.servers["notes"], account) is not None
        await application.broker.disconnect(account)
        setup.client.session = None
        assert (await setup.client.initialize()).result["protocolVersion"] == "2024-11-05"


def older(version: str) -> Any:
    result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": {"name": "o", "version": "1"}}

    def initialize(received: Any) -> FakeResponse:
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": result})

    return initialize


@pytest.mark.parametrize("method", ["server/discover", "tools/list"])
async def test_no_request_of_cold_start_waits_for_a_slow_authorization_server(
    servers: Servers, tmp_path: Path, method: str
) -> None:
    answer = asyncio.Event()

    async def never() -> AsyncIterator[bytes]:
        await answer.wait()
        yield b""

    upstream = {"metadata_answer": FakeResponse(stream=never)}
    async with proxy_setup(
        servers, tmp_path, authorization=COLD, upstream=upstream, client={"version": MODERN}
    ) as setup:
        loop = asyncio.get_running_loop()
        began = loop.time()
        reply = await setup.client.post(method)
        assert loop.time() - began < 4
        assert reply.status == 200
        if method == "server/discover":
            assert f"{setup.proxy.origin}/notes/mcp" in reply.error["message"]
            assert "/connect/" not in reply.error["message"]
        else:
            assert reply.result["tools"][0]["name"] == "authorize_notes"
        answer.set()


async def test_a_held_stream_outlives_a_refusal_and_asks_for_nothing(servers: Servers, tmp_path: Path) -> None:
    """Clients open a stream again that ends, and the user would be asked again at once."""
    options: dict[str, Any] = {"upstream": SESSIONS, "issuer": {"auto_consent": False}}
    async with proxy_setup(servers, tmp_path, authorization=COLD, **options) as setup:
        client = setup.client
        await client.initialize()
        heard: list[str] = []

        async def listen() -> None:
            async with client.stream() as (_, events):
                async for event in events:
                    heard.append(event["method"])

        listening = asyncio.create_task(listen())
        await until(lambda: setup.proxy.application.forwarder.held.used, "the stream is held")
        await decline(setup.proxy.links[0])
        done, _ = await asyncio.wait({listening}, timeout=0.5)
        assert not done
        assert len(setup.proxy.links) == 1
        setup.issuer.auto_consent = True
        await consent(link_in((await client.call("echo", text="x")).message))
        await until(lambda: len(heard) == 3, "the client was told", timeout=5)
        listening.cancel()
        await asyncio.wait({listening})
