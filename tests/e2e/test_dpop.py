"""Tokens bound to a key, with servers that check every proof (RFC 9449)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.dpop_servers import DpopAuthorizationServer, DpopMcpServer
from fakes.headless import consent
from fakes.mcp_client import PlainClient
from fakes.proxy import RunningProxy, link_in, running_proxy
from mcp_auth_proxy.config.settings import Address


@dataclass
class ProxySetup:
    issuer: DpopAuthorizationServer
    upstream: DpopMcpServer
    folder: Path

    @asynccontextmanager
    async def proxy(self, use: str, listen: Address | None = None, **oauth: Any) -> AsyncIterator[RunningProxy]:
        server = {"url": self.upstream.url, "oauth": {"dpop": use, **oauth}}
        wait = {"wait": "0s"}
        async with running_proxy(self.folder, {"notes": server}, authorization=wait, listen=listen) as proxy:
            yield proxy

    def jwts(self) -> list[str]:
        """Every proof that was sent."""
        received = [*self.issuer.seen("token"), *self.upstream.calls()]
        return [value for request in received for value in request.all("dpop")]


@asynccontextmanager
async def proxy_setup(folder: Path, upstream: dict[str, Any] | None = None, **issuer: Any) -> AsyncIterator[ProxySetup]:
    async with (
        DpopAuthorizationServer.running(auto_consent=True, **issuer) as authorization_server,
        DpopMcpServer.running(authorization_server, **(upstream or {})) as mcp_server,
    ):
        yield ProxySetup(authorization_server, mcp_server, folder)


async def log_in(client: PlainClient) -> None:
    page = await consent(link_in((await client.call("echo")).message))
    assert page.status_code == 200, page.text
    assert (await client.call("echo", text="in")).text == "in"


@pytest.mark.parametrize(("use", "asks"), [("required", "nothing"), ("auto", "metadata"), ("auto", "challenge")])
async def test_every_request_has_a_fresh_proof_of_the_one_key(tmp_path: Path, use: str, asks: str) -> None:
    async with (
        proxy_setup(tmp_path, {"asks": asks}) as setup,
        setup.proxy(use) as proxy,
        proxy.client("notes") as client,
    ):
        await log_in(client)
        replies = await asyncio.gather(*(client.call("echo", text=str(n)) for n in range(20)))
        assert [reply.text for reply in replies] == [str(n) for n in range(20)]
        assert len(set(setup.jwts())) == len(setup.jwts()) >= 22
        (key,) = {*setup.issuer.proofs.keys, *setup.upstream.proofs.keys}
        assert setup.issuer.seen("authorize")[0].query["dpop_jkt"] == [key]
        assert set(setup.upstream.refusals) == {""}


async def test_nonces_of_both_servers_and_their_rotation_are_followed(tmp_path: Path) -> None:
    async with proxy_setup(tmp_path) as setup, setup.proxy("required") as proxy, proxy.client("notes") as client:
        setup.issuer.proofs.rotate()
        setup.upstream.proofs.rotate()
        await log_in(client)
        assert len(setup.issuer.seen("token")) == 2, "refused once for the nonce, the code was not used up"
        for n in range(3):
            setup.issuer.proofs.rotate()
            setup.upstream.proofs.rotate()
            setup.issuer.end_access_tokens()
            assert (await client.call("echo", text=str(n))).text == str(n)
        assert (setup.issuer.authorizations, setup.issuer.refreshes) == (1, 6)
        refused = len(setup.upstream.refusals)
        assert (await client.call("echo", text="same nonce")).text == "same nonce"
        setup.upstream.proofs.rotate_gently()
        assert (await client.call("echo", text="told by a success")).text == "told by a success"
        setup.upstream.proofs.previous = ""
        assert (await client.call("echo", text="used")).text == "used"
        assert len(setup.upstream.refusals) == refused
        assert len(proxy.links) == 1


async def test_single_use_nonces_work_for_concurrent_requests(tmp_path: Path) -> None:
    async with proxy_setup(tmp_path) as setup, setup.proxy("required") as proxy, proxy.client("notes") as client:
        await log_in(client)
        setup.upstream.proofs.once = True
        replies = await asyncio.gather(*(client.call("echo", text=str(n)) for n in range(8)))
        assert [reply.text for reply in replies] == [str(n) for n in range(8)]
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (0, 1)


async def test_a_server_that_refuses_every_nonce_is_asked_twice(tmp_path: Path) -> None:
    async with proxy_setup(tmp_path) as setup, setup.proxy("required") as proxy, proxy.client("notes") as client:
        await log_in(client)
        before = len(setup.upstream.calls())
        setup.upstream.endless_nonce = True
        answer = await client.call("echo", text="x")
        assert answer.status == 200
        assert "RFC 9449" in str(answer.message)
        assert len(setup.upstream.calls()) - before == 2
        assert (setup.issuer.refreshes, setup.issuer.authorizations) == (0, 1)


async def test_the_key_survives_restart_and_rotation_and_is_never_stored_in_clear(  # T45
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with proxy_setup(tmp_path) as setup:
        async with setup.proxy("required") as proxy, proxy.client("notes") as client:
            link = link_in((await client.call("echo")).message)
            host, _, port = proxy.origin.removeprefix("http://").partition(":")
        address = Address(host, int(port))
        async with setup.proxy("required", listen=address) as proxy, proxy.client("notes") as client:
            await consent(link)
            assert (await client.call("echo", text="in")).text == "in"
        async with setup.proxy("required", listen=address) as proxy, proxy.client("notes") as client:
            setup.issuer.end_access_tokens()
            assert (await client.call("echo", text="again")).text == "again"
        assert len({*setup.issuer.proofs.keys, *setup.upstream.proofs.keys}) == 1
        files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert b"PRIVATE KEY" not in files
        assert "PRIVATE KEY" not in caplog.text
        for secret in [*setup.jwts(), *setup.issuer.bound]:
            assert secret.encode() not in files
            assert secret not in caplog.text


async def test_a_bearer_token_is_refused_if_dpop_is_required(tmp_path: Path) -> None:  # T22
    async with proxy_setup(tmp_path) as setup, setup.proxy("required") as proxy, proxy.client("notes") as client:
        setup.issuer.token_type = "Bearer"
        page = await consent(link_in((await client.call("echo")).message))
        assert "token_type is not DPoP" in page.text
        assert not [request for request in setup.upstream.calls() if request.header("authorization")]


async def test_a_renewal_without_the_binding_is_refused(tmp_path: Path) -> None:  # T22
    async with proxy_setup(tmp_path) as setup, setup.proxy("auto") as proxy, proxy.client("notes") as client:
        await log_in(client)
        setup.issuer.token_type = "Bearer"
        setup.issuer.end_access_tokens()
        answer = await client.call("echo", text="x")
        assert answer.status == 503
        assert "token_type is not DPoP" in str(answer.message)
        assert not any((r.header("authorization") or "").startswith("Bearer") for r in setup.upstream.calls())


async def test_off_sends_no_proof_and_accepts_no_bound_token(tmp_path: Path) -> None:  # T22
    async with (
        proxy_setup(tmp_path, {"asks": "nothing"}, token_type="Bearer", token_changes={"token_type": "DPoP"}) as setup,
        setup.proxy("off") as proxy,
        proxy.client("notes") as client,
    ):
        page = await consent(link_in((await client.call("echo")).message))
        assert "token_type is not Bearer" in page.text
        assert setup.jwts() == []


async def test_off_names_the_key_if_the_server_accepts_only_bound_tokens(tmp_path: Path) -> None:
    async with proxy_setup(tmp_path) as setup, setup.proxy("off") as proxy, proxy.client("notes") as client:
        answer = await client.call("echo")
        assert "servers.notes.oauth.dpop is off" in str(answer.message)
        assert setup.issuer.registrations == 0


async def test_a_proof_of_the_client_never_reaches_the_upstream(tmp_path: Path) -> None:  # T31
    async with proxy_setup(tmp_path) as setup, setup.proxy("required") as proxy:
        forged = {"DPoP": "forged", "D-PoP": "unknown", "authorization": "DPoP forged"}
        async with proxy.client("notes", headers=forged) as client:
            await log_in(client)
        assert "forged" not in repr([request.headers for request in setup.upstream.calls()])


async def test_a_grant_that_the_setting_forbids_is_not_used(tmp_path: Path) -> None:
    async with proxy_setup(tmp_path, {"asks": "nothing"}) as setup:
        async with setup.proxy("required") as proxy, proxy.client("notes") as client:
            await log_in(client)
        sent = len(setup.jwts())
        async with setup.proxy("off") as proxy, proxy.client("notes") as client:
            assert link_in((await client.call("echo")).message)
        assert len(setup.jwts()) == sent


async def test_client_credentials_are_bound_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_SECRET", "s3cret")
    agent = {"grant": "client_credentials", "client_id": "agent", "client_secret": "env:AGENT_SECRET"}
    async with (
        proxy_setup(tmp_path) as setup,
        setup.proxy("auto", None, **agent) as proxy,
        proxy.client("notes") as client,
    ):
        setup.issuer.add_client(client_id="agent", secret="s3cret")
        setup.issuer.proofs.rotate()
        assert (await client.call("echo", text="alone")).text == "alone"
        setup.issuer.end_access_tokens()
        assert (await client.call("echo", text="again")).text == "again"
        assert len({*setup.issuer.proofs.keys, *setup.upstream.proofs.keys}) == 1


async def test_a_step_up_stays_bound_with_its_own_key(tmp_path: Path) -> None:
    options = {"asks": "challenge", "step_up": {"tools/call:write": ("write",)}}
    async with proxy_setup(tmp_path, options) as setup, setup.proxy("auto") as proxy, proxy.client("notes") as client:
        await log_in(client)
        assert (await consent(link_in((await client.call("write")).message))).status_code == 200
        assert (await client.call("write", text="more")).text == "more"
        assert len(set(setup.issuer.proofs.keys)) == 2
        assert len(setup.issuer.seen("token")) == len(setup.issuer.proofs.keys)
