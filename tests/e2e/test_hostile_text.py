"""Long texts of hostile servers stop no client, fill no log, and are not repeated in full to anybody."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import ProxyProcess, link_in, proxy_process, until, write_config
from fakes.proxy_setup import proxy_setup
from fakes.raw_client import RawClient

ANSWER = 4096
"""Bytes of an answer of the proxy's own to one request, and of its log line."""

BATCH_ANSWER = 1024 * 1024
SECONDS = 1.0
"""How long others wait at most. Each of these texts stopped the process for 2 s."""

LONG = 60_000
VALUES = {
    "URLs in a row": "http://" * (LONG // 7),
    "queries in a row": "http://a?" * (LONG // 9),
    "a query of many parameters": "http://a?" + "a&" * (LONG // 2),
    "a long relative reference": "a" * LONG,
    "secrets in a row": "token=" * (LONG // 6),
    "quotes in quotes": "token=" + "\\\\" * (LONG // 8) + '\\"' + "\\\\" * (LONG // 8),
    "Latin-1": "\xe9" * LONG,
}


@dataclass
class Attacked:
    """A proxy process with a server ``notes`` that attacks, and a server ``good`` that does not."""

    proxy: ProxyProcess
    hostile: FakeMcpServer
    client: PlainClient
    good: PlainClient

    async def slowest_meanwhile(self, attack: "asyncio.Future[Any]") -> float:
        """Call the good server until the attack is over; return the longest time that it took, in seconds."""
        slowest = 0.0
        while True:
            over = attack.done()
            begun = time.monotonic()
            assert (await self.good.call("echo", text="x")).text == "x"
            slowest = max(slowest, time.monotonic() - begun)
            if over:
                return slowest

    async def new_lines(self, before: int) -> list[str]:
        """Wait, bounded, for what was logged after ``before`` lines."""
        await until(lambda: len(self.proxy.err.splitlines()) > before, "a log line")
        return self.proxy.err.splitlines()[before:]


@asynccontextmanager
async def attacked(servers: Servers, folder: Path, *arguments: str, **hostile: Any) -> AsyncIterator[Attacked]:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, **hostile)
    good = await servers.mcp_server(protected=False)
    config = write_config(folder, {"notes": upstream.url, "good": good.url}, authorization={"wait": "0s"})
    async with (
        proxy_process(config, *arguments) as proxy,
        proxy.client("notes", version="2025-03-26") as client,
        proxy.client("good") as other,
    ):
        assert (await other.call("echo", text="x")).text == "x"
        yield Attacked(proxy, upstream, client, other)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", VALUES)
async def test_a_challenge_with_a_long_text_stops_nobody_and_fills_no_log(  # T79
    servers: Servers, tmp_path: Path, name: str, form: str
) -> None:
    value = VALUES[name]
    challenges = {401: [f'Bearer resource_metadata="{value}"']}
    async with attacked(servers, tmp_path, "--log-format", form, challenges=challenges) as setup:
        before = len(setup.proxy.err.splitlines())
        attack = asyncio.gather(*(setup.client.call("echo", text="x") for _ in range(5)))
        assert await setup.slowest_meanwhile(attack) < SECONDS
        replies = await attack
        assert max(len(reply.body) for reply in replies) <= ANSWER
        lines = await setup.new_lines(before)
        assert max(len(line.encode()) for line in lines) <= ANSWER
        assert len(lines) <= 2 * len(replies)
        # 200 characters of it, and in JSON up to four bytes for each.
        assert not any(value[:900] in line for line in lines)


@pytest.mark.parametrize("repeated", ["\\", '\\"', "a=;"])
async def test_a_long_cookie_stops_nobody(servers: Servers, tmp_path: Path, repeated: str) -> None:  # T79
    async def callback(origin: str) -> int:
        async with RawClient.to(origin) as raw:
            cookie = 'a="' + repeated * (LONG // len(repeated)) + '"'
            raw.send(f"GET /oauth/callback?state=x HTTP/1.1\nHost: HOST\nCookie: {cookie}\n\n")
            return (await raw.head())[0]

    async with attacked(servers, tmp_path) as setup:
        attack = asyncio.ensure_future(callback(setup.proxy.origin))
        assert await setup.slowest_meanwhile(attack) < SECONDS
        assert await attack == 400


TARGETS = {
    "no such server": ("/" + "a" * LONG + "/mcp", 404),
    "a long link": ("/connect/notes?flow=" + "%2e" * (LONG // 3), 414),
    "a link under another name": ("/connect/notes?flow=" + "%2e" * 3000, 404),
    "a link of a long name": ("/connect/" + "a" * 9000 + "?flow=x", 404),
    "many parameters": ("/oauth/callback?" + "state=x&" * (LONG // 8), 414),
    "a long error": ("/oauth/callback?state=x&error=" + "a" * LONG, 414),
    "no page": ("/" + "a" * 9000, 404),
}


@pytest.mark.parametrize("name", TARGETS)
async def test_a_long_target_stops_nobody_and_is_not_repeated(
    servers: Servers, tmp_path: Path, name: str
) -> None:  # T79
    target, status = TARGETS[name]

    async def get(origin: str) -> tuple[int, int]:
        async with RawClient.to(origin) as raw:
            raw.send(f"GET {target} HTTP/1.1\nHost: localhost\nConnection: close\n\n")
            head = await raw.head()
            return head[0], len(str(head)) + len(await raw.rest())

    async with attacked(servers, tmp_path) as setup:
        attack = asyncio.gather(*(get(setup.proxy.origin) for _ in range(20)))
        assert await setup.slowest_meanwhile(attack) < SECONDS
        for answered, size in await attack:
            assert (answered, size <= ANSWER) == (status, True)


def batch(client: PlainClient, identifiers: list[int | str]) -> tuple[str, dict[str, str]]:
    calls = [client.message("tools/call", {"name": "echo"}, id=identifier) for identifier in identifiers]
    return json.dumps(calls), client.headers(calls[0])


async def test_a_batch_is_not_answered_with_the_same_reason_a_thousand_times(  # T79
    servers: Servers, tmp_path: Path
) -> None:
    async with attacked(servers, tmp_path) as setup:
        issuer = "https://" + "\u00e9" * 3000
        setup.hostile.metadata_changes = {"resource": issuer, "authorization_servers": [issuer] * 10}
        content, headers = batch(setup.client, [*range(1000)])
        before = len(setup.proxy.err.splitlines())
        attack = asyncio.ensure_future(setup.client.http.post(setup.client.url, content=content, headers=headers))
        assert await setup.slowest_meanwhile(attack) < SECONDS
        response = await attack
        assert len(response.content) <= ANSWER
        error = response.json()
        assert (response.status_code, error["id"], error["error"]["code"]) == (200, None, -32001)
        assert "protected resource metadata" in error["error"]["message"]
        assert [len(line) <= ANSWER for line in await setup.new_lines(before)] == [True]
        content, headers = batch(setup.client, [*range(100)])
        response = await setup.client.http.post(setup.client.url, content=content, headers=headers)
        assert [answer["id"] for answer in response.json()] == [*range(100)]
        assert len(response.content) <= BATCH_ANSWER


async def test_a_batch_whose_links_are_too_long_gets_one_link(servers: Servers, tmp_path: Path) -> None:  # T79
    async with attacked(servers, tmp_path) as setup:
        params: dict[str, object] = {"capabilities": {"elicitation": {"url": {}}}}
        calls = [setup.client.message("initialize", params, id=f"{number:03}" * 170) for number in range(1000)]
        headers = setup.client.headers(calls[0], {"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"})
        response = await setup.client.http.post(setup.client.url, content=json.dumps(calls), headers=headers)
        answers = response.json()
        assert len(response.content) <= BATCH_ANSWER
        assert link_in(answers) == setup.proxy.links[0]
        assert isinstance(answers, dict)


@pytest.mark.parametrize("identifier", ["i" * 100_000, "\U0001f600" * 300, 10**4000], ids=["long", "wide", "number"])
async def test_only_its_own_id_makes_the_answer_to_a_request_long(  # T79
    servers: Servers, tmp_path: Path, identifier: int | str
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        reply = await setup.client.post("tools/call", {"name": "echo"}, id=identifier)
        assert reply.message["id"] == identifier
        assert len(reply.body) <= ANSWER + len(json.dumps(identifier))
        assert link_in(reply.message) == setup.proxy.links[0]


DOCUMENTS: dict[str, dict[str, object]] = {
    "resource": {"resource": "\U0001f600" * 4000},
    "issuer": {"authorization_servers": ["https://" + "\u00e9" * 4000]},
    "many issuers": {"authorization_servers": ["https://" + "a" * 2000] * 100},
}


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_a_document_with_long_texts_is_refused_in_a_short_answer(  # T79
    servers: Servers, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.upstream.metadata_changes = DOCUMENTS[name]
        reply = await setup.ask()
        assert "metadata" in reply.error["message"] or "can't be used" in reply.error["message"]
        assert len(reply.body) <= ANSWER
        assert max(len(message.encode()) for message in caplog.messages) <= ANSWER


SERVER_DOCUMENTS: dict[str, dict[str, object]] = {
    "issuer": {"issuer": "\U0001f600" * 4000},
    "endpoint": {"token_endpoint": "https://" + "e" * 2500},
    "registration endpoint": {"registration_endpoint": "http://127.0.0.1:9/" + "e" * 2000},
    "no PKCE": {"code_challenge_methods_supported": ["x" * 4000] * 50},
}


@pytest.mark.parametrize("name", SERVER_DOCUMENTS)
async def test_metadata_of_an_authorization_server_is_refused_in_a_short_answer(  # T79
    servers: Servers, tmp_path: Path, name: str
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.issuer.metadata_changes = SERVER_DOCUMENTS[name]
        reply = await setup.ask()
        assert len(reply.body) <= ANSWER
        assert "e" * 210 not in reply.error["message"]


async def test_an_error_description_of_any_length_is_shown_in_short(servers: Servers, tmp_path: Path) -> None:  # T79
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        words = "\U0001f600 <b>" * 10_000
        setup.issuer.answers["token"] = FakeResponse.json({"error": "invalid_grant", "error_description": words}, 400)
        call = asyncio.create_task(setup.ask())
        page = await consent(await setup.proxy.next_link())
        assert page.text.count("\U0001f600") <= 50
        assert len(page.content) <= ANSWER
        assert len((await call).body) <= ANSWER
