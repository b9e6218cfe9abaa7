"""Sessions that began before consent: odd clients and servers, other processes, and what goes wrong."""

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.callers import HeaderCallers, principal
from fakes.extension_server import ExtensionServer
from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.mcp_client import MODERN, PlainClient
from fakes.proxy import link_in, running_proxy, until, write_config
from fakes.proxy_setup import ProxySetup, proxy_setup
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load

COLD: dict[str, Any] = {"wait": "1s", "cold_start": True}
PATIENT: dict[str, Any] = {"wait": "30s", "cold_start": True}
CHANGES = [f"notifications/{name}/list_changed" for name in ("tools", "prompts", "resources")]
SESSIONS: dict[str, Any] = {"sessions_on": True}
URLS: dict[str, Any] = {"elicitation": {"url": {}}}


def cold(servers: Servers, folder: Path, **options: Any) -> Any:
    options.setdefault("authorization", COLD)
    options.setdefault("upstream", SESSIONS)
    return proxy_setup(servers, folder, **options)


async def names(client: PlainClient) -> list[str]:
    return [tool["name"] for tool in (await client.post("tools/list")).result["tools"]]


async def begun(setup: ProxySetup) -> str:
    """Begin a session, and return the link."""
    return link_in((await setup.client.initialize()).message)


# Clients


async def test_a_client_without_a_get_stream_is_told_on_a_held_request(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, authorization=PATIENT) as setup:
        link = await begun(setup)
        call = {"name": "echo", "arguments": {"text": "held"}}
        async with setup.client.stream("tools/call", call) as (response, events):
            # The head comes with the first comment.
            assert response.status_code == 200
            await consent(link)
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES
            assert (await anext(events))["result"]["content"][0]["text"] == "held"
        async with setup.client.stream() as (_, events):
            await until(lambda: setup.upstream.push({"jsonrpc": "2.0", "method": "notifications/message"}))
            assert (await anext(events))["method"] == "notifications/message"


async def test_lists_change_on_one_of_the_streams_of_a_session(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        link = await begun(setup)
        async with setup.client.stream() as (_, first), setup.client.stream() as (_, second):
            await consent(link)
            await until(lambda: setup.upstream.push({"jsonrpc": "2.0", "method": "notifications/last"}) == 2)
            seen = [[message["method"] async for message in until_last(each)] for each in (first, second)]
        assert sorted(seen, key=len) == [[], CHANGES]


async def until_last(events: Any) -> Any:
    async for message in events:
        if message["method"] == "notifications/last":
            return
        yield message


async def test_a_batch_before_consent_is_answered(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, client={"version": "2025-03-26"}) as setup:
        link = await begun(setup)

        async def batch(*methods: str) -> list[dict[str, Any]]:
            messages = [setup.client.message(method, id=number) for number, method in enumerate(methods)]
            headers = setup.client.headers({"method": "batch"})
            reply = await setup.client.http.post(setup.client.url, content=json.dumps(messages), headers=headers)
            assert reply.status_code == 200
            found: list[dict[str, Any]] = reply.json()
            return found

        assert [each["result"] for each in await batch("ping", "prompts/list")] == [{}, {"prompts": []}]
        listed, pinged = await batch("tools/list", "ping")
        assert [tool["name"] for tool in listed["result"]["tools"]] == ["authorize_notes", "call_notes"]
        assert link in listed["result"]["tools"][0]["description"]
        assert pinged["result"] == {}


async def test_a_session_can_be_ended_before_consent(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        await begun(setup)
        assert (await setup.client.delete()).status == 204
        assert (await setup.client.post("tools/list")).status == 404
        assert (await setup.client.delete()).status == 404
        assert setup.upstream.sessions == {}


async def test_an_unknown_last_event_id_does_no_harm(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        link = await begun(setup)
        setup.client.http.headers["last-event-id"] = "7"
        async with setup.client.stream() as (response, events):
            assert response.status_code == 200
            await consent(link)
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES


async def test_a_probe_that_is_no_stream_is_not_held(servers: Servers, tmp_path: Path) -> None:
    """As mcp-use probes before it connects, with a time-out of 5 s."""
    async with cold(servers, tmp_path, authorization=PATIENT) as setup:
        async with asyncio.timeout(10):
            response = await setup.client.http.get(setup.client.url, headers={"accept": "application/json"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert setup.proxy.links[0] in response.text


async def test_a_get_stream_outlives_a_user_who_declines(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, issuer={"auto_consent": False}) as setup:
        link = await begun(setup)
        async with setup.client.stream() as (_, events):
            await decline(link)
            await setup.client.post("tools/list")
            await consent(await setup.proxy.next_link(2))
            async with asyncio.timeout(5):
                assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_the_tools_of_a_server_with_a_long_name(servers: Servers, tmp_path: Path) -> None:
    name = "n" + 62 * "x"
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, **SESSIONS)
    async with (
        running_proxy(tmp_path, {name: upstream.url}, authorization=COLD) as proxy,
        proxy.client(name) as client,
    ):
        link = link_in((await client.initialize()).message)
        authorize, call = await names(client)
        assert (len(authorize), len(call)) == (40, 40)
        await consent(link)
        assert "connected" in (await client.call(authorize)).text
        assert (await client.call(call, name="echo", arguments={"text": "x"})).text == "x"


# Servers


@pytest.mark.parametrize("upstream", [{}, SESSIONS])
async def test_a_server_that_answers_404_to_get_does_not_end_a_session(
    servers: Servers, tmp_path: Path, upstream: dict[str, Any]
) -> None:
    async with cold(servers, tmp_path, upstream=upstream) as setup:
        await consent(await begun(setup))
        setup.upstream.answers["GET"] = FakeResponse(status=404)
        async with setup.client.stream() as (_, events):
            assert [message["method"] async for message in events] == CHANGES
        async with setup.client.stream() as (response, _):
            assert response.status_code == 404
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_a_404_of_a_server_without_session_ids_does_not_end_a_session(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, upstream={}) as setup:
        await consent(await begun(setup))
        setup.upstream.script("tools/call:count", FakeResponse(status=404))
        assert (await setup.client.call("count")).status == 404
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_lists_change_though_the_server_has_no_stream(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, upstream={"get_stream": False, **SESSIONS}) as setup:
        link = await begun(setup)
        async with setup.client.stream() as (_, events):
            await consent(link)
            assert [message["method"] async for message in events] == CHANGES
        assert (await setup.client.call("echo", text="x")).text == "x"


@pytest.mark.parametrize(
    "trouble", [FakeResponse(status=503), FakeResponse(status=429), FakeResponse(head=False, reset=True)]
)
async def test_a_session_that_could_not_be_opened_is_opened_later(
    servers: Servers, tmp_path: Path, trouble: FakeResponse
) -> None:
    async with cold(servers, tmp_path) as setup:
        link = await begun(setup)
        setup.upstream.answers["initialize"] = trouble
        await consent(link)
        reply = await setup.client.call("echo", text="x")
        assert reply.status in (502, 503, 504)
        assert "notes" in reply.error["message"]
        async with setup.client.stream() as (response, _):
            assert response.status_code >= 500
        setup.upstream.answers.clear()
        assert (await setup.client.call("echo", text="x")).text == "x"
        async with setup.client.stream() as (_, events):
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES


async def test_a_server_that_challenges_only_calls(servers: Servers, tmp_path: Path) -> None:
    def public(received: RecordedRequest) -> FakeResponse | None:
        return setup.upstream._speak(received) if received.rpc_method in ("initialize", "ping") else None

    async with cold(servers, tmp_path) as setup:
        setup.upstream.intercept = public
        await setup.client.initialize()
        assert setup.client.session in setup.upstream.sessions
        assert await names(setup.client) == ["authorize_notes", "call_notes"]
        await consent(setup.proxy.links[0])
        assert "connected" in (await setup.client.call("authorize_notes")).text
        assert await names(setup.client) == ["echo", "count", "whoami"]
        assert (await setup.client.call("echo", text="x")).text == "x"


async def test_a_notification_that_fails_is_sent_again(servers: Servers, tmp_path: Path) -> None:
    """The session is open only once the server knows that it is initialized."""
    async with cold(servers, tmp_path) as setup:
        link = await begun(setup)
        failing = FakeResponse(head=False, reset=True)
        setup.upstream.answers["notifications/initialized"] = failing
        await consent(link)
        assert (await setup.client.call("echo", text="x")).status >= 500
        setup.upstream.answers.clear()
        before = len(setup.upstream.calls("notifications/initialized"))
        assert (await setup.client.call("echo", text="x")).text == "x"
        used = setup.upstream.calls("tools/call")[-1].header("mcp-session-id")
        later = setup.upstream.calls("notifications/initialized")[before:]
        assert used in [call.header("mcp-session-id") for call in later]


# Limits and settings


async def test_a_device_grant_starts_cold(servers: Servers, tmp_path: Path) -> None:
    async with ExtensionServer.running() as issuer:
        upstream = await servers.mcp_server(issuer, **SESSIONS)
        config = {"notes": {"url": upstream.url, "oauth": {"grant": "device_code"}}}
        async with running_proxy(tmp_path, config, authorization=COLD) as proxy, proxy.client("notes") as client:
            reply = await client.initialize()
            assert proxy.links[0] in reply.result["instructions"]
            assert await names(client) == ["authorize_notes", "call_notes"]


async def test_clients_start_though_no_more_requests_may_wait(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path, limits={"held": 1}) as setup:
        link = await begun(setup)
        async with setup.client.stream() as (_, events):
            async with setup.proxy.client("notes") as other:
                assert link in (await other.initialize()).result["instructions"]
                assert "authorize_notes" in await names(other)
                assert link in (await other.call("echo", text="x")).text
                await consent(link)
                assert (await other.call("echo", text="x")).text == "x"
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES


async def test_a_session_goes_on_after_cold_start_was_switched_off(servers: Servers, tmp_path: Path) -> None:
    async with cold(servers, tmp_path) as setup:
        link = await begun(setup)
        application = setup.proxy.application
        config = write_config(
            tmp_path, {"notes": setup.upstream.url}, authorization={"wait": "1s", "cold_start": False}
        )
        application.apply(compare(application.settings, load(config)))
        assert (await setup.client.post("prompts/list")).result == {"prompts": []}
        async with setup.client.stream() as (_, events):
            await consent(link)
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES
        assert (await setup.client.call("call_notes", name="echo", arguments={"text": "x"})).text == "x"


# Callers and processes


async def test_a_session_of_a_shared_grant_is_its_callers_alone(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, **SESSIONS)
    callers = HeaderCallers(principal("ann"), principal("bob"))
    config = {"notes": {"url": upstream.url, "grant_owner": "shared"}}
    async with (
        running_proxy(tmp_path, config, authorization=COLD, authenticator=callers) as proxy,
        proxy.client("notes", headers={"x-test-caller": "ann"}) as ann,
        proxy.client("notes", headers={"x-test-caller": "bob"}) as bob,
    ):
        for client in (ann, bob):
            reply = await client.initialize()
            # Only an admin can authorize.
            assert "/connect/" not in json.dumps(reply.message)
            assert "admin" in reply.result["instructions"]
            tools = (await client.post("tools/list")).result
            assert "admin" in tools["tools"][0]["description"]
            assert "/connect/" not in json.dumps(tools)
        assert (await bob.post("ping", session=ann.session)).status == 404
        assert (await bob.post("ping")).result == {}


async def test_only_the_user_who_declined_is_not_asked(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    callers = HeaderCallers(principal("ann"), principal("bob"))
    options: dict[str, Any] = {"version": MODERN, "capabilities": URLS}
    async with (
        running_proxy(
            tmp_path, {"notes": upstream.url}, authorization={**COLD, "wait": "0s"}, authenticator=callers
        ) as proxy,
        proxy.client("notes", headers={"x-test-caller": "ann"}, **options) as ann,
        proxy.client("notes", headers={"x-test-caller": "bob"}, **options) as bob,
    ):
        call = {"name": "echo", "arguments": {"text": "x"}}
        (key,) = (await ann.post("tools/call", call)).result["inputRequests"]
        declined = await ann.post("tools/call", {**call, "inputResponses": {key: {"action": "decline"}}})
        assert declined.result["isError"] is True
        assert "inputRequests" in (await bob.post("tools/call", call)).result


async def test_two_processes_use_one_session(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, **SESSIONS)
    both, asked = asyncio.Event(), []

    def initialize(received: RecordedRequest) -> FakeResponse | None:
        """Answer the two processes at the same time."""
        if received.message["params"]["clientInfo"]["name"] != "plain":
            return None
        asked.append(received)
        if len(asked) == 2:
            both.set()
        return replace(upstream._speak(received), gate=both)

    upstream.answers["initialize"] = initialize
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(running_proxy(tmp_path, {"notes": upstream.url}, authorization=PATIENT))
            for _ in range(2)
        ]
        one, two = [await stack.enter_async_context(proxy.client("notes")) for proxy in started]
        link = link_in((await one.initialize()).message)
        two.session = one.session
        assert "authorize_notes" in await names(two)
        async with one.stream() as (_, events):
            waiting = asyncio.create_task(two.call("echo", text="x"))
            await consent(link)
            assert [(await anext(events))["method"] for _ in CHANGES] == CHANGES
            assert (await waiting).text == "x"
            assert (await one.call("echo", text="y")).text == "y"
        used = {call.header("mcp-session-id") for call in upstream.calls("tools/call") if call.bearer}
        assert (len(asked), len(used)) == (2, 1)
        await until(lambda: set(upstream.sessions) == used, "the other sessions are gone")
        assert (await two.delete()).status == 200
        assert (await one.post("tools/list")).status == 404


async def test_the_link_of_another_process_completes_an_elicitation(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, **SESSIONS)
    at_once = {**COLD, "wait": "0s"}
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(running_proxy(tmp_path, {"notes": upstream.url}, authorization=at_once))
            for _ in range(2)
        ]
        one, two = [await stack.enter_async_context(proxy.client("notes", capabilities=URLS)) for proxy in started]
        link = link_in((await one.initialize()).message)
        two.session = one.session
        (elicitation,) = (await two.call("echo", text="x")).error["data"]["elicitations"]
        async with two.stream() as (_, events):
            await consent(link)
            async with asyncio.timeout(10):
                seen = [await anext(events) for _ in range(4)]
        complete = [each["params"] for each in seen if each["method"] == "notifications/elicitation/complete"]
        assert complete == [{"elicitationId": elicitation["elicitationId"]}]
        assert sorted(each["method"] for each in seen if "params" not in each) == sorted(CHANGES)
