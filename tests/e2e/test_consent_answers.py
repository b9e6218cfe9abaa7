"""The answers to an MCP client while a user is needed: the table in docs/architecture.md, by kind of client."""

import asyncio
import gzip
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mcp import Client

from fakes.fixtures import Servers
from fakes.headless import consent, decline
from fakes.http_exchange import FakeResponse, RecordedRequest, sse
from fakes.mcp_client import MODERN, McpResponse, PlainClient, read
from fakes.proxy import link_in, running_proxy, until
from fakes.proxy_setup import ProxySetup, proxy_setup
from fakes.unattended import unattended
from mcp_auth_proxy.proxy import consent_wait

LINK = re.compile(r"http://127\.0\.0\.1:\d+/connect/notes\?flow=[\w-]+")
LINK_KEY = "io.mcp-auth-proxy/authorization_url"
URLS: dict[str, Any] = {"elicitation": {"url": {}}}
FORMS_ONLY: dict[str, Any] = {"elicitation": {}}
OLD = ["2025-03-26", "2025-06-18", "2025-11-25"]
ASKABLE: list[tuple[str, dict[str, Any]]] = [
    ("tools/call", {"name": "echo", "arguments": {"text": "in"}}),
    ("resources/read", {"uri": "notes://1"}),
    ("prompts/get", {"name": "hello"}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [("tools/list", {}), ("server/discover", {}), ("subscriptions/listen", {})]


async def announced(setup: ProxySetup, link: object) -> None:
    """The link is ours, and the one that was announced."""
    assert LINK.fullmatch(str(link))
    assert link == await setup.proxy.next_link()


# who declared in ``initialize`` that URLs can be shown


async def test_a_session_that_shows_urls_gets_the_elicitation_error(servers: Servers, tmp_path: Path) -> None:
    options = {"capabilities": URLS}
    async with proxy_setup(servers, tmp_path, upstream={"sessions_on": True}, client=options) as setup:
        first = await setup.client.initialize()
        assert (first.status, first.error["code"]) == (200, -32042)
        await consent(link_in(first.message))
        assert "result" in (await setup.client.initialize()).message
        setup.issuer.end_grants()
        for method, params in [*ASKABLE, ("tools/list", {})]:
            reply = await setup.client.post(method, params, id=f"id of {method}")
            assert (reply.status, reply.error["code"], reply.message["id"]) == (200, -32042, f"id of {method}")
            (elicitation,) = reply.error["data"]["elicitations"]
            assert elicitation["mode"] == "url"
            assert elicitation["elicitationId"]
            assert elicitation["message"]
            assert elicitation["url"] == reply.error["data"]["authorization_url"] == setup.proxy.links[1]
        async with setup.proxy.client("notes") as other:
            assert (await other.call("echo")).result["isError"] is True


async def test_the_elicitation_error_is_never_sent_on_the_stateless_revision(servers: Servers, tmp_path: Path) -> None:
    options = {"capabilities": URLS}
    async with proxy_setup(servers, tmp_path, upstream={"sessions_on": True}, client=options) as setup:
        await consent(link_in((await setup.client.initialize()).message))
        await setup.client.initialize()
        setup.issuer.end_grants()
        async with setup.proxy.client("notes", version=MODERN) as modern:
            for method, params in [*ASKABLE, *OTHERS]:
                reply = await modern.post(method, params, session=setup.client.session)
                assert "-32042" not in json.dumps(reply.message)


# 2026-07-28 with URL elicitation in _meta


async def test_the_stateless_revision_gets_input_required_if_the_method_allows_it(
    servers: Servers, tmp_path: Path
) -> None:
    async with proxy_setup(servers, tmp_path, client={"version": MODERN, "capabilities": URLS}) as setup:
        for method, params in ASKABLE:
            result = (await setup.client.post(method, params)).result
            assert result["resultType"] == "input_required"
            assert "requestState" not in result
            (request,) = result["inputRequests"].values()
            assert request["method"] == "elicitation/create"
            assert request["params"]["mode"] == "url"
            assert request["params"]["message"]
            assert request["params"]["url"] == result["_meta"][LINK_KEY]
            await announced(setup, request["params"]["url"])
        for method, params in OTHERS:
            reply = await setup.client.post(method, params)
            assert reply.status == 200
            assert reply.error["code"] != -32042
            assert reply.error["data"]["authorization_url"] == setup.proxy.links[0]
            assert setup.proxy.links[0] in reply.error["message"]


@pytest.mark.parametrize("foreign", [{}, {"of-the-upstream": {"action": "accept", "content": {"a": 1}}}])
async def test_a_retry_is_held_and_goes_upstream_without_our_entry(
    servers: Servers, tmp_path: Path, foreign: dict[str, Any]
) -> None:
    async with proxy_setup(servers, tmp_path, client={"version": MODERN, "capabilities": URLS}) as setup:
        method, params = ASKABLE[0]
        asked = (await setup.client.post(method, params)).result
        (key,) = asked["inputRequests"]
        answered = {**params, "inputResponses": {key: {"action": "accept"}, **foreign}, "requestState": "theirs"}
        retry = asyncio.create_task(setup.client.post(method, answered, id=77))
        done, _ = await asyncio.wait([retry], timeout=0.7)
        assert not done
        await consent(link_in(asked))
        reply = await retry
        assert (reply.text, reply.message["id"]) == ("in", 77)
        sent = setup.upstream.calls("tools/call")[-1].message["params"]
        assert sent.get("inputResponses") == (foreign or None)
        assert sent["requestState"] == "theirs"
        assert sent["arguments"] == {"text": "in"}


# everyone else


@pytest.mark.parametrize(
    "options",
    [*({"version": version} for version in (*OLD, MODERN)), {"capabilities": FORMS_ONLY}],
    ids=str,
)
async def test_any_other_client_gets_the_link_as_text(
    servers: Servers, tmp_path: Path, options: dict[str, Any]
) -> None:
    async with proxy_setup(servers, tmp_path, client=options) as setup:
        call = await setup.client.post("tools/call", {"name": "echo", "arguments": {}}, id="a")
        link = call.result["_meta"][LINK_KEY]
        assert (call.status, call.message["id"], call.result["isError"]) == (200, "a", True)
        assert link in call.text
        await announced(setup, link)
        methods = [*ASKABLE[1:], *OTHERS, ("initialize", {"capabilities": options.get("capabilities", {})})]
        for number, (method, params) in enumerate(methods):
            reply = await setup.client.post(method, params, id=number)
            assert (reply.status, reply.message["id"]) == (200, number)
            assert reply.error["code"] != -32042
            assert reply.error["data"]["authorization_url"] == link
            assert link in reply.error["message"]
    assert setup.issuer.authorizations == 0
    assert len(setup.proxy.links) == 1


async def test_every_request_of_a_batch_is_answered(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, client={"version": "2025-03-26"}) as setup:
        client = setup.client
        call = client.message("tools/call", {"name": "echo", "arguments": {}}, id=1)
        note, listing = client.message("notifications/progress"), client.message("tools/list", id="two")
        body = json.dumps([call, note, listing])
        response = await client.http.post(client.url, content=body, headers=client.headers(call))
        first, second = response.json()
        assert response.status_code == 200
        assert (first["id"], first["result"]["isError"]) == (1, True)
        assert (second["id"], second["error"]["data"]["authorization_url"]) == ("two", link_in(first))


async def test_other_messages_are_never_answered_with_401(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        headers = {"accept": "text/event-stream"}
        replies = [
            await setup.client.notify("notifications/initialized"),
            await setup.client.delete(),
            read(await setup.client.http.get(setup.client.url, headers=headers)),
            read(await setup.client.http.post(setup.client.url, content=b"not json")),
        ]
        assert [reply.status for reply in replies if reply.status == 401 or reply.status < 400] == []
        assert not any("www-authenticate" in reply.headers for reply in replies)
        assert len(setup.proxy.links) == 1


@pytest.mark.parametrize(
    "body", [b'{"jsonrpc":"2.0","method":"notifications/initialized"}', b'{"jsonrpc":"2.0","id":1,"result":{}}', None]
)
async def test_messages_without_a_request_get_503_with_retry_after(
    servers: Servers, tmp_path: Path, body: bytes | None
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        for _ in range(2):
            method = "DELETE" if body is None else "POST"
            reply = read(await setup.client.http.request(method, setup.client.url, content=body))
            assert (reply.status, reply.headers["retry-after"], reply.message["id"]) == (503, "5", None)
            await announced(setup, reply.error["data"]["authorization_url"])


@pytest.mark.parametrize(
    ("body", "code"), [(b'{"jsonrpc":', -32700), (b"", -32700), (b"17", -32600), (b"[1]", -32600), (b"[]", -32600)]
)
async def test_a_body_that_is_not_json_rpc_is_refused_at_once(
    servers: Servers, tmp_path: Path, body: bytes, code: int
) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        for _ in range(2):
            async with asyncio.timeout(5):
                reply = read(await setup.client.http.post(setup.client.url, content=body))
            assert (reply.status, reply.error["code"], reply.message["id"]) == (400, code, None)
            assert "/connect/" not in str(reply.message)


async def test_a_body_that_only_the_server_can_read_is_held(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        body, headers = gzip.compress(b"{}"), {"content-encoding": "gzip"}
        post = setup.client.http.post(setup.client.url, content=body, headers=headers)
        call = asyncio.create_task(post)
        await consent(await setup.proxy.next_link())
        await call
        assert setup.upstream.requests[-1].body == body


async def test_a_get_stream_before_the_grant_opens_after_it(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s", upstream={"sessions_on": True}) as setup:
        waiting = asyncio.create_task(setup.client.initialize())
        await consent(await setup.proxy.next_link())
        await waiting
        setup.issuer.end_grants()

        async def listen() -> dict[str, Any]:
            async with setup.client.stream() as (response, events):
                assert response.status_code == 200
                return await anext(events)

        listening = asyncio.create_task(listen())
        await consent(await setup.proxy.next_link(2))
        await until(lambda: setup.upstream.push({"jsonrpc": "2.0", "method": "notifications/message"}))
        assert (await listening)["method"] == "notifications/message"


# the SDK's client, which probes with server/discover and falls back to initialize


@pytest.mark.parametrize("open_handshake", [False, True])
async def test_the_sdks_client_shows_the_link_when_it_connects(
    servers: Servers, tmp_path: Path, open_handshake: bool
) -> None:
    def handshake(received: RecordedRequest) -> FakeResponse | None:
        if not open_handshake or received.bearer or received.rpc_method != "initialize":
            return None
        result = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}}
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": result})

    async with proxy_setup(servers, tmp_path, wait="0.3s", upstream={"intercept": handshake}) as setup:
        with pytest.raises(BaseException) as caught:  # the SDK wraps it in exception groups
            async with Client(setup.client.url):
                pass
        assert setup.proxy.links[0] in "".join(messages_in(caught.value))


def messages_in(error: BaseException) -> list[str]:
    if isinstance(error, BaseExceptionGroup):
        return [text for inner in error.exceptions for text in messages_in(inner)]
    return [str(error)]


async def test_the_sdks_client_continues_after_consent(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.real_mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}, authorization={"wait": "20s"}) as proxy:
        listing = asyncio.create_task(list_tools(f"{proxy.origin}/notes/mcp"))
        await consent(await proxy.next_link())
        assert "count" in await listing


async def list_tools(url: str) -> list[str]:
    async with Client(url) as client:
        return [tool.name for tool in (await client.list_tools()).tools]


# grants that need no human


async def test_without_a_user_a_token_is_obtained_and_stepped_up_within_the_request(
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, step_up={"tools/call:write": ("write",)})
    config = unattended(issuer, upstream.url, tmp_path)
    async with (
        running_proxy(tmp_path, {"notes": config}, authorization={"wait": "0s"}) as proxy,
        proxy.client("notes") as client,
    ):
        replies = await asyncio.gather(*(client.call("echo", text=str(n)) for n in range(10)))
        assert [reply.text for reply in replies] == [str(n) for n in range(10)]
        assert (await client.call("write", text="w")).text == "w"
        assert (proxy.links, issuer.token_requests()) == ([], 2)


# held


@dataclass
class HeldCall:
    """A response that is read while it comes."""

    client: PlainClient
    tool: str
    comments: list[float] = field(default_factory=list)
    data: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    async def run(self) -> dict[str, Any]:
        message = self.client.message("tools/call", {"name": self.tool, "arguments": {}}, id=f"id of {self.tool}")
        headers = self.client.headers(message)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with self.client.http.stream(
            "POST", self.client.url, content=json.dumps(message), headers=headers
        ) as response:
            self.headers = dict(response.headers)
            async for chunk in response.aiter_raw():
                self.comments += [loop.time() - begun] * chunk.startswith(b":")
                self.data += chunk
        found = [json.loads(line[5:]) for line in self.data.splitlines() if line.startswith(b"data:")]
        assert len(found) == 1, self.data
        answer: dict[str, Any] = found[0]
        return answer


def answers() -> dict[str, Any]:
    """What an upstream may answer, by tool."""

    def result(received: RecordedRequest) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": received.message["id"], "result": {"content": [], "of": received.tool}}

    def error(received: RecordedRequest) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": received.message["id"], "error": {"code": -32602, "message": "of the upstream"}}

    return {
        "tools/call:json": lambda received: FakeResponse.json(result(received)),
        "tools/call:pretty": lambda received: FakeResponse(
            headers=(("content-type", "application/json"),), body=json.dumps(result(received), indent=2).encode()
        ),
        "tools/call:sse": lambda received: FakeResponse(
            headers=(("content-type", "text/event-stream"),), body=sse(result(received))
        ),
        "tools/call:gzip": lambda received: FakeResponse.gzipped(result(received)),
        "tools/call:gzip-sse": gzipped_events,
        "tools/call:bad": lambda received: FakeResponse.json(error(received), 400),
        "tools/call:page": FakeResponse.html("<h1>not here</h1>", 404),
        "tools/call:down": FakeResponse.html(status=503),
    }


def gzipped_events(received: RecordedRequest) -> FakeResponse:
    event = sse({"jsonrpc": "2.0", "id": received.message["id"], "result": {"of": received.tool}})
    headers = (("content-type", "text/event-stream"), ("content-encoding", "gzip"))
    return FakeResponse(headers=headers, body=gzip.compress(event))


@pytest.mark.parametrize("declined", [False, True], ids=["nobody comes", "declined"])
async def test_after_comments_the_proxys_own_answer_is_an_event(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declined: bool
) -> None:
    monkeypatch.setattr(consent_wait, "COMMENT_INTERVAL", 0.1)  # the length of it is tested once, below
    async with proxy_setup(
        servers, tmp_path, wait="20s" if declined else "0.5s", issuer={"auto_consent": False}
    ) as setup:
        held = HeldCall(setup.client, "echo")
        running = asyncio.create_task(held.run())
        await until(lambda: len(held.comments) >= 2)
        if declined:
            await decline(setup.proxy.links[0])
        answer = await running
        assert answer["id"] == "id of echo"
        if declined:
            assert "access_denied" in answer["error"]["message"]
            assert "/connect/" not in str(answer)
        else:
            assert answer["result"]["_meta"][LINK_KEY] == setup.proxy.links[0]


async def test_held_requests_are_kept_alive_and_all_answered(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(
        servers, tmp_path, wait="14s", upstream={"sessions_on": True, "answers": answers()}
    ) as setup:
        held = {name.partition(":")[2]: HeldCall(setup.client, name.partition(":")[2]) for name in answers()}
        tasks = {name: asyncio.create_task(one.run()) for name, one in held.items()}
        loop = asyncio.get_running_loop()
        link, begun = await setup.proxy.next_link(), loop.time()
        handshake = asyncio.create_task(setup.client.initialize())
        async with setup.proxy.client("notes", version=MODERN) as modern:
            probe = await modern.post("server/discover")
            assert loop.time() - begun < 10, "clients that probe give up then"
            assert probe.error["data"]["authorization_url"] == link
            await until(lambda: all(len(one.comments) >= 2 for one in held.values()), "two comments each")
            await consent(link)
        replies: dict[str, dict[str, Any]] = {name: await task for name, task in tasks.items()}
        started: McpResponse = await handshake
    assert all(4 <= one.comments[0] <= 6 and 9 <= one.comments[1] <= 11 for one in held.values())
    assert {one.headers["content-type"] for one in held.values()} == {"text/event-stream"}
    assert not any("content-encoding" in one.headers for one in held.values())
    assert {name: reply["id"] for name, reply in replies.items()} == {name: f"id of {name}" for name in held}
    for name in ("json", "pretty", "sse", "gzip", "gzip-sse"):
        assert replies[name]["result"]["of"] == name
    assert replies["bad"]["error"] == {"code": -32602, "message": "of the upstream"}
    assert "404" in replies["page"]["error"]["message"]
    assert "503" in replies["down"]["error"]["message"]
    assert started.headers["content-type"] == "application/json"
    assert started.headers["mcp-session-id"] in setup.upstream.sessions
