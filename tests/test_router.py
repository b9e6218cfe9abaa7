"""The router of a running proxy: what takes the fast path, what is refused, and what goes to the site."""

import json
from pathlib import Path

import pytest

from fakes.proxy import running_proxy, until
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer, answers, ok
from fakes.tasks import TASK_OF_A_REQUEST, tasks_made
from mcp_auth_proxy.config.settings import InboundSettings, ServerSettings
from mcp_auth_proxy.proxy.fast_path import MAX_BODY
from mcp_auth_proxy.router import UNKNOWN_SERVER
from mcp_auth_proxy.rpc.messages import INPUT_KEY
from mcp_auth_proxy.web.guard import Guard


def rpc(method: str, **params: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 9, "method": method, "params": params}).encode()


CALL = rpc("tools/call", name="pay")


async def always(peer: Peer) -> None:
    """Answer each request on the connection."""
    while True:
        await peer.request()
        await peer.send(ok(b"{}"))


# The fast path


@pytest.mark.parametrize("path", ["/notes/mcp", "/mcp", "/notes/mcp?x=1"])
@pytest.mark.parametrize(
    "body",
    [
        CALL,
        rpc("tools/list"),
        rpc("notifications/progress"),
        b"[%s,%s]" % (CALL, CALL),
        b'{"jsonrpc":"2.0","id":1,"result":{}}',
        b"",
        b"not JSON",
        CALL + b" " * (MAX_BODY - len(CALL)),
    ],
    ids=["call", "list", "notification", "batch", "response", "nothing", "not JSON", "64 KiB"],
)
async def test_an_ordinary_post_is_forwarded_without_a_task(tmp_path: Path, path: str, body: bytes) -> None:
    async with (
        RawServer(always) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        # The first request makes the Host known and the upstream connection.
        client.post(CALL, path=path)
        assert (await client.answer()).status == 200
        with tasks_made() as tasks:
            for _ in range(3):
                client.post(body, path=path)
                assert (await client.answer()).body == b"{}"
            assert tasks == []
            client.post(rpc("initialize"), path=path)
            assert (await client.answer()).status == 200
        assert tasks == [TASK_OF_A_REQUEST]
        assert (len(upstream.peers), upstream.requests[1].endswith(body)) == (1, True)


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (rpc("initialize"), ()),
        (rpc("subscriptions/listen"), ()),
        (rpc("tools/call", inputResponses={INPUT_KEY: {"action": "accept"}}), ()),
        (CALL + b" " * MAX_BODY, ()),
        (CALL, ("Origin: http://HOST",)),
        (CALL, ("Sec-Fetch-Site: same-origin",)),
    ],
    ids=["initialize", "subscription", "retry", "over 64 KiB", "Origin", "Fetch Metadata"],
)
async def test_a_post_that_has_to_be_looked_at_takes_a_task_and_passes(
    tmp_path: Path, body: bytes, fields: tuple[str, ...]
) -> None:
    async with (
        RawServer(always) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        await client.answer()
        with tasks_made() as tasks:
            client.post(body, *fields)
            assert (await client.answer()).status == 200
        assert tasks == [TASK_OF_A_REQUEST]


async def test_a_host_is_checked_before_the_fast_path_trusts_it(tmp_path: Path) -> None:
    async with (
        RawServer(always) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL)
        assert (await client.answer()).status == 200
        client.send(f"POST /notes/mcp HTTP/1.1\nHost: evil.example\nContent-Length: {len(CALL)}\n\n{CALL.decode()}")
        refused = await client.answer()
        assert (refused.status, len(upstream.requests)) == (421, 1)
        assert "inbound.allowed_hosts" in refused.body.decode()


async def test_another_guard_accepts_anew(tmp_path: Path) -> None:
    async with (
        RawServer(always) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        router = proxy.application.router
        client.post(CALL)
        await client.answer()
        host = proxy.origin.removeprefix("http://").encode()
        assert router.guard.knows(host)
        router.guard = Guard(listen=proxy.application.listening, public_url=proxy.origin, inbound=InboundSettings())
        assert not router.guard.knows(host)
        client.post(CALL)
        assert (await client.answer()).status == 200
        assert router.guard.knows(host)


# Everything else


async def get(client: RawClient, path: str, method: str = "GET") -> RawResponse:
    client.send(f"{method} {path} HTTP/1.1\nHost: HOST\n\n")
    return await client.answer()


async def test_an_endpoint_of_an_unknown_server_is_answered_with_the_names_of_those_there_are(tmp_path: Path) -> None:
    servers = {"notes": "http://127.0.0.1:1/mcp", "docs": "http://127.0.0.1:1/mcp"}
    async with running_proxy(tmp_path, {**servers}) as proxy, RawClient.to(proxy.origin) as client:
        for path in ("/mcp", "/elsewhere/mcp"):
            client.post(CALL, path=path)
            answer = await client.answer()
            error = json.loads(answer.body)["error"]
            assert (answer.status, error["code"]) == (404, UNKNOWN_SERVER)
            assert error["data"] == {"servers": ["docs", "notes"]}
            assert path in error["message"]


@pytest.mark.parametrize("path", ["/", "/notes", "/notes/mcp/", "/notes/sse", "/mcp/", "/sse"])
async def test_a_client_with_a_wrong_path_is_told_the_form_of_the_right_one(tmp_path: Path, path: str) -> None:
    async with (
        running_proxy(tmp_path, {"notes": "http://127.0.0.1:1/mcp"}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.post(CALL, path=path)
        client.get(path)
        for _ in range(2):
            answer = await client.answer()
            assert answer.status == 404
            assert json.loads(answer.body)["error"]["message"] == (
                f"There is no server at {path}: the path of a server is /NAME/mcp. Configured servers: notes."
            )


async def test_a_reserved_path_is_no_wrong_path_of_a_client(tmp_path: Path) -> None:
    async with (
        running_proxy(tmp_path, {"notes": "http://127.0.0.1:1/mcp"}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        for path, status in (("/healthz", 405), ("/api/v1/servers", 401), ("/connect/notes/start/x", 404)):
            client.post(CALL, path=path)
            answer = await client.answer()
            assert (answer.status, b"jsonrpc" in answer.body) == (status, False)


@pytest.mark.parametrize("path", ["/notes//mcp", "/notes/../notes/mcp", "/notes%2fmcp", "/./mcp", "/notes/mcp/.."])
async def test_a_path_that_could_be_read_in_two_ways_is_refused(tmp_path: Path, path: str) -> None:
    async with (
        running_proxy(tmp_path, {"notes": "http://127.0.0.1:1/mcp"}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        answer = await get(client, path)
        assert (answer.status, answer.body) == (400, b"The path is not in canonical form.")


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/", "", 200),
        ("GET", "/connect/mcp", "", 404),
        ("GET", "/nowhere", "", 404),
        ("POST", "/nowhere", "", 404),
        ("POST", "/nowhere", "Sec-Fetch-Site: cross-site", 403),
        ("GET", "/nowhere", "Sec-Fetch-Site: cross-site", 404),
        ("GET", "/notes/mcp", "Sec-Fetch-Site: cross-site", 403),
        ("GET", "/", "Origin: https://evil.example", 403),
    ],
)
async def test_the_rest_is_for_the_site_unless_another_site_wants_to_write(
    tmp_path: Path, method: str, path: str, fields: str, status: int
) -> None:
    async with (
        running_proxy(tmp_path, {"notes": "http://127.0.0.1:1/mcp"}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        client.send("\n".join([f"{method} {path} HTTP/1.1", "Host: HOST", *filter(None, [fields]), "", ""]))
        assert (await client.answer()).status == status


# Changes while it runs


async def test_a_changed_configuration_changes_the_routes_and_ends_requests_to_removed_servers(tmp_path: Path) -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with (
        RawServer(silent) as upstream,
        RawServer(answers(ok(b"new"))) as other,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        application = proxy.application
        client.post(CALL)
        await until(lambda: upstream.requests, "a request")
        added = ServerSettings(name="docs", url=other.url)
        application.servers.replace({"docs": added})
        answer = await client.answer()
        assert answer.status == 503
        assert "no longer configured" in answer.body.decode()
        client.post(CALL, path="/notes/mcp")
        assert (await client.answer()).status == 404
        client.post(CALL, path="/docs/mcp")
        assert (await client.answer()).body == b"new"


async def test_while_draining_each_connection_closes_after_its_response(tmp_path: Path) -> None:
    async with RawServer(always) as upstream, running_proxy(tmp_path, {"notes": upstream.url}) as proxy:
        async with RawClient.to(proxy.origin) as client:
            client.post(CALL)
            assert (await client.answer()).all("connection") == []
            proxy.application.router.draining = True
            with tasks_made() as tasks:
                client.post(CALL)
                answer = await client.answer()
            assert (answer.status, answer.all("connection"), tasks) == (200, ["close"], [])
            assert await client.rest() == b""
        async with RawClient.to(proxy.origin) as client:
            answer = await get(client, "/readyz")
            assert (answer.status, json.loads(answer.body)) == (503, {"status": "draining"})
            assert answer.all("connection") == ["close"]
