"""A server name that now has another path of the same origin does not use the old grant (T89)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser, consent
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, link_in, running_proxy, until, write_config
from fakes.raw_client import RawClient
from fakes.unattended import unattended
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.net import urls

UNHELD = {"wait": "0s"}

RESOURCES: dict[str, tuple[dict[str, str], Callable[[FakeMcpServer], dict[str, object]]]] = {
    "its own": ({}, lambda server: {}),
    "omitted": ({"resource": "omit"}, lambda server: {}),
    "configured": ({"resource": "https://exact.example/api"}, lambda server: {}),
    "the origin": ({}, lambda server: {"resource": server.origin}),
}
"""What the tokens are for: the configuration of the server, and what its metadata say."""


async def protected(servers: Servers, resource: str) -> tuple[FakeMcpServer, dict[str, Any]]:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, checks_audience=False)
    oauth, metadata = RESOURCES[resource]
    upstream.metadata_changes = metadata(upstream)
    return upstream, {"oauth": oauth}


def apply(proxy: RunningProxy, folder: Path, server: dict[str, Any], **sections: Any) -> None:
    application = proxy.application
    application.apply(compare(application.settings, load(write_config(folder, {"notes": server}, **sections))))


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("reloaded", [False, True], ids=["restarted", "reloaded"])
async def test_another_path_of_the_origin_gets_no_token_of_the_old_one(
    servers: Servers, tmp_path: Path, resource: str, reloaded: bool
) -> None:  # T89
    upstream, oauth = await protected(servers, resource)
    before = {"url": upstream.url, **oauth}
    async with (
        running_proxy(tmp_path, {"notes": before}, authorization=UNHELD) as proxy,
        proxy.client("notes") as client,
    ):
        await consent(link_in((await client.call("echo")).message))
        assert (await client.call("echo", text="in")).text == "in"
        old = set(upstream.bearers)
        upstream.path = "/other/mcp"
        after = {"url": upstream.url, **oauth}
        if reloaded:
            apply(proxy, tmp_path, after, authorization=UNHELD)
            assert "/connect/" in str((await client.call("echo")).message)
            assert upstream.bearers == [None]
    async with (
        running_proxy(tmp_path, {"notes": after}, authorization=UNHELD) as proxy,
        proxy.client("notes") as client,
    ):
        assert (await consent(link_in((await client.call("echo")).message))).status_code == 200
        assert (await client.call("echo", text="there")).text == "there"
    assert set(upstream.bearers) & old == {None}
    assert len(set(upstream.bearers)) == 2


@pytest.mark.parametrize("resource", ["omitted", "the origin"])
async def test_a_consent_for_the_old_path_brings_no_token_to_the_new_one(
    servers: Servers, tmp_path: Path, resource: str
) -> None:  # T89
    upstream, oauth = await protected(servers, resource)
    async with Browser() as browser:
        async with (
            running_proxy(tmp_path, {"notes": {"url": upstream.url, **oauth}}, authorization=UNHELD) as proxy,
            proxy.client("notes") as client,
        ):
            callback = await browser.stop_before(link_in((await client.call("echo")).message))
            origin = urls.parse(proxy.origin).origin
        upstream.path = "/other"
        async with (
            running_proxy(
                tmp_path,
                {"notes": {"url": upstream.url, **oauth}},
                listen=Address(origin.host, origin.port),
                authorization=UNHELD,
            ) as proxy,
            proxy.client("notes") as client,
        ):
            page = await browser.follow(callback)
            assert (page.status_code, "another server" in page.text) == (502, True)
            assert "/connect/" in str((await client.call("echo")).message)
    assert set(upstream.bearers) == {None}


async def test_a_request_that_began_before_a_server_moved_brings_no_token_of_the_new_path_to_the_old_one(
    servers: Servers, tmp_path: Path
) -> None:  # T89
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, checks_audience=False)
    async with (
        running_proxy(tmp_path, {"notes": unattended(issuer, upstream.url, tmp_path)}) as proxy,
        proxy.client("notes") as client,
        RawClient.to(proxy.origin) as raw,
    ):
        assert (await client.call("echo", text="old")).text == "old"
        body = b'{"jsonrpc": "2.0", "id": 9, "method": "tools/list"}'
        raw.send(f"POST /notes/mcp HTTP/1.1\nHost: HOST\nContent-Length: {len(body)}\n\n")
        await until(lambda: proxy.application.forwarder.active_requests == 1)
        old_calls = len(upstream.calls())
        upstream.path = "/other"
        apply(proxy, tmp_path, unattended(issuer, upstream.url, tmp_path))
        assert (await client.call("echo", text="new")).text == "new"
        raw.send(body)
        answer = await raw.answer()
        assert (answer.status, "configuration of server notes was changed" in answer.body.decode()) == (200, True)
        upstream.path = "/mcp"
        assert len(upstream.calls()) == old_calls
