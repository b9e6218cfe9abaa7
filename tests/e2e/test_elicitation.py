"""URL elicitation beyond the first answer: completion, and users who decline."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import sse
from fakes.mcp_client import MODERN
from fakes.proxy import link_in, until
from fakes.proxy_setup import proxy_setup

URLS: dict[str, Any] = {"elicitation": {"url": {}}}
COLD: dict[str, Any] = {"wait": "0s", "cold_start": True}


async def test_the_session_is_told_when_the_link_was_used(servers: Servers, tmp_path: Path) -> None:
    options: dict[str, Any] = {"upstream": {"sessions_on": True}, "client": {"capabilities": URLS}}
    async with proxy_setup(servers, tmp_path, authorization=COLD, **options) as setup:
        client = setup.client
        await client.initialize()
        reply = await client.call("echo", text="x")
        (elicitation,) = reply.error["data"]["elicitations"]
        async with client.stream() as (_, events):
            await consent(elicitation["url"])
            async with asyncio.timeout(10):
                message = await anext(events)
                while message["method"] != "notifications/elicitation/complete":
                    message = await anext(events)
            assert message["params"] == {"elicitationId": elicitation["elicitationId"]}
            assert (await client.call("echo", text="x")).text == "x"


async def test_the_completion_does_not_stand_within_an_event(servers: Servers, tmp_path: Path) -> None:
    options: dict[str, Any] = {"upstream": {"sessions_on": True}, "client": {"capabilities": URLS}}
    async with proxy_setup(servers, tmp_path, **options) as setup:
        client = setup.client
        await consent(link_in((await client.initialize()).message))
        await client.initialize()
        async with client.stream() as (_, events):
            await until(lambda: setup.upstream.push({"jsonrpc": "2.0", "method": "notifications/message"}))
            assert (await anext(events))["method"] == "notifications/message"
            (session,) = setup.upstream.sessions.values()
            (stream,) = session.streams
            long = sse({"jsonrpc": "2.0", "method": "notifications/long", "params": {"text": "x" * 100}})
            stream.put(long[:50])
            setup.issuer.end_grants()
            reply = await client.call("echo", text="x")
            await consent(link_in(reply.message))
            assert (await client.call("echo", text="x")).text == "x"
            stream.put(long[50:])
            async with asyncio.timeout(10):
                assert [(await anext(events))["method"] for _ in range(2)] == [
                    "notifications/long",
                    "notifications/elicitation/complete",
                ]


@pytest.mark.parametrize("action", ["decline", "cancel"])
async def test_declining_is_answered_in_words_and_not_asked_again(
    servers: Servers, tmp_path: Path, action: str
) -> None:
    options: dict[str, Any] = {"client": {"version": MODERN, "capabilities": URLS}}
    async with proxy_setup(servers, tmp_path, authorization=COLD, **options) as setup:
        call = {"name": "echo", "arguments": {"text": "in"}}
        asked = (await setup.client.post("tools/call", call)).result
        (key,) = asked["inputRequests"]
        for params in ({**call, "inputResponses": {key: {"action": action}}}, call):
            reply = await setup.client.post("tools/call", params)
            assert reply.result["isError"] is True
            assert reply.result["resultType"] == "complete"
            assert "mcp-auth-proxy login notes" in reply.text
            assert "/connect/" not in json.dumps(reply.message)
        read = await setup.client.post("resources/read", {"uri": "a:b"})
        assert "mcp-auth-proxy login notes" in read.error["message"]
        assert "authorize_notes" in json.dumps((await setup.client.post("tools/list")).result)
        assert len(setup.proxy.links) == 1
        await consent(link_in(asked))
        assert (await setup.client.post("tools/call", call)).text == "in"
