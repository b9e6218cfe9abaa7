"""Callers of a running proxy, over sockets: whom it lets in, and what it forwards (T60, T61, T62, T63, T74)."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from fakes.hostile import honeypot
from fakes.proxy import RunningProxy, run_command, running_proxy, until
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer, ok
from fakes.team import add_member
from identity.idp import AUDIENCE, IdentityProvider, forged, identity_provider
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, Principal, Scope
from mcp_auth_proxy.store.principals import new_principal_id

CALL = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list"}).encode()
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WITHIN = 1.0
"""Seconds until a change by another process is heeded."""


async def answer_all(peer: Peer) -> None:
    """Answer each POST on a connection, and each GET with an event stream that does not end."""
    while True:
        request = await peer.request()
        if request.startswith(b"GET"):
            await peer.send(EVENTS + b"8\r\ndata: 1\n\r\n")
            await peer.until_gone()
            return
        await peer.send(ok(b"{}"))


@dataclass
class Shared:
    proxy: RunningProxy
    upstream: RawServer
    client: RawClient

    async def post(self, *fields: str, path: str = "/notes/mcp") -> RawResponse:
        self.client.post(CALL, *fields, path=path)
        return await self.client.answer()

    async def refused(self, *fields: str) -> int:
        """Send a request that the upstream must not see; return the status."""
        before = len(self.upstream.requests)
        answer = await self.post(*fields)
        assert len(self.upstream.requests) == before
        assert json.loads(answer.body)["error"]["message"]
        return answer.status

    def forwarded(self) -> str:
        return self.upstream.requests[-1].decode().lower()


@asynccontextmanager
async def shared(folder: Path, inbound: dict[str, Any], **server: Any) -> AsyncIterator[Shared]:
    async with (
        RawServer(answer_all) as upstream,
        running_proxy(folder, {"notes": {"url": upstream.url, **server}}, inbound=inbound) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        yield Shared(proxy, upstream, client)


def issuers(*providers: IdentityProvider) -> dict[str, Any]:
    return {"mode": "jwt", "jwt": [{"issuer": each.issuer, "audience": AUDIENCE} for each in providers]}


def token_of(provider: IdentityProvider, header: dict[str, Any] | None = None, **changes: Any) -> str:
    """Return a token that is good now, but for these changes."""
    return provider.token(header, **{"exp": int(time.time()) + 600, "iat": int(time.time()), **changes})


async def test_a_key_is_let_in_and_never_forwarded(tmp_path: Path) -> None:
    key = await add_member(tmp_path, "alice")
    for_the_api = await add_member(tmp_path, "alice", scopes=frozenset({Scope.SELF}))
    async with shared(tmp_path, {"mode": "api_key"}) as there:
        for field in (f"Authorization: Bearer {key}", f"X-API-Key: {key}"):
            assert (await there.post(field)).status == 200
            assert "mapk_" not in there.forwarded()
            assert "x-api-key" not in there.forwarded()
        assert await there.refused() == 401
        assert await there.refused(f"Authorization: Bearer {key[:-1]}") == 401
        assert await there.refused(f"Authorization: Bearer {for_the_api}") == 401
        assert await there.refused(f"Authorization: Bearer {key}", f"X-API-Key: {key}") == 400


async def test_a_token_is_let_in_and_never_forwarded(tmp_path: Path) -> None:
    async with identity_provider() as provider, shared(tmp_path, issuers(provider)) as there:
        for _ in range(2):
            token = token_of(provider)
            assert (await there.post(f"Authorization: Bearer {token}")).status == 200
            assert token.split(".")[2].lower() not in there.forwarded()
            assert "authorization" not in there.forwarded()


async def test_a_token_that_was_not_made_for_the_proxy_is_refused(tmp_path: Path) -> None:
    # T60
    async with identity_provider() as provider, shared(tmp_path, issuers(provider)) as there:
        for changes in ({"aud": "https://mcp.example"}, {"iss": "https://as.example"}, {"exp": int(time.time()) - 60}):
            assert await there.refused(f"Authorization: Bearer {token_of(provider, **changes)}") == 401
        assert await there.refused("Authorization: Bearer upstream-access-token") == 401


async def test_a_forged_token_is_refused_and_leads_nowhere(tmp_path: Path) -> None:
    # T61
    attacker = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    async with honeypot() as trap, identity_provider() as provider, shared(tmp_path, issuers(provider)) as there:
        claims = provider.claims(exp=int(time.time()) + 600, iat=int(time.time()))
        url = f"http://127.0.0.1:{trap.port}/keys"
        for token in (
            forged({"alg": "none"}, claims),
            forged({"alg": "HS256", "kid": "rsa"}, claims, provider.public_pem),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "rsa"}),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "x", "jku": url}),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "x", "jwk": provider.keys[0]}),
        ):
            assert await there.refused(f"Authorization: Bearer {token}") == 401
        assert trap.visits == []


async def test_the_same_subject_of_another_issuer_is_somebody_else(tmp_path: Path) -> None:
    # T62
    async with (
        identity_provider() as first,
        identity_provider() as second,
        shared(tmp_path, issuers(first, second), allow=["alice"]) as there,
    ):
        assert (await there.post(f"Authorization: Bearer {token_of(first)}")).status == 200
        assert await there.refused(f"Authorization: Bearer {token_of(second)}") == 404
        names = [principal.name for principal in there.proxy.application.callers.directory.principals()]
        assert names == ["alice", f"alice@{second.issuer.removeprefix('http://')}"]


async def test_an_identity_provider_that_is_down_at_start_means_503_and_health_says_so(tmp_path: Path) -> None:
    async with identity_provider() as provider:
        provider.down = 503
        async with shared(tmp_path, issuers(provider)) as there:
            callers = there.proxy.application.callers
            await until(callers.problems, "the keys were asked for")
            answer = await there.post(f"Authorization: Bearer {token_of(provider)}")
            assert answer.status == 503
            assert int(answer.all("retry-after")[0]) >= 1
            assert there.upstream.requests == []
            there.client.get("/readyz")
            health = await there.client.answer()
            assert health.status == 200
            assert provider.issuer in json.loads(health.body)["problems"][0]
            provider.down = 0
            callers.warm_up()
            await until(lambda: not callers.problems(), "the keys are there")
            assert (await there.post(f"Authorization: Bearer {token_of(provider)}")).status == 200
            there.client.get("/readyz")
            assert json.loads((await there.client.answer()).body) == {"status": "ready"}


FRONT = {"name": "X-Forwarded-User", "from": ["127.0.0.1"], "secret": "canary-front", "secret_header": "X-Proxy-Secret"}
SECRET = "X-Proxy-Secret: canary-front"


async def test_a_forged_name_is_refused_and_a_true_one_not_forwarded(tmp_path: Path) -> None:
    # T63
    async with shared(tmp_path, {"mode": "trusted_header", "trusted_header": FRONT}) as there:
        for _ in range(2):
            assert (await there.post("X-Forwarded-User: alice", SECRET)).status == 200
            assert "alice" not in there.forwarded()
            assert "canary-front" not in there.forwarded()
        for fields in (
            ("X-Forwarded-User: alice",),
            ("X-Forwarded-User: alice", "X-Proxy-Secret: guess"),
            ("X-Forwarded-User: alice", "X-Forwarded-User: root", SECRET),
            ("X-Forwarded-User: alice", "X_Forwarded_User: root", SECRET),
            ("X_Forwarded_User: alice", SECRET),
            (),
        ):
            assert await there.refused(*fields) in (400, 401), fields
    elsewhere = {**FRONT, "from": ["192.0.2.0/24"]}
    async with shared(tmp_path, {"mode": "trusted_header", "trusted_header": elsewhere}) as there:
        assert await there.refused("X-Forwarded-User: alice", SECRET) == 401


@pytest.mark.parametrize("command", ["principals", "api-keys"])
async def test_what_another_process_ends_is_over_within_a_second(tmp_path: Path, command: str) -> None:
    # T74
    key, bobs = await add_member(tmp_path, "alice"), await add_member(tmp_path, "bob")
    async with shared(tmp_path, {"mode": "api_key"}) as there, RawClient.to(there.proxy.origin) as stream:
        assert (await there.post(f"X-API-Key: {key}")).status == 200
        stream.get("/notes/mcp", f"X-API-Key: {key}")
        assert (await stream.head())[0] == 200
        arguments = ("disable", "alice") if command == "principals" else ("revoke", key.split("_")[1])
        code, _, err = await run_command(command, *arguments, "--config", str(tmp_path / "mcp-auth-proxy.yaml"))
        assert code == 0, err
        begun = time.monotonic()
        directory = there.proxy.application.callers.directory
        await until(lambda: len(directory.callers) == 1, "one key left", WITHIN)
        assert await there.refused(f"X-API-Key: {key}") == 401
        assert (await there.post(f"X-API-Key: {bobs}")).status == 200
        assert (await stream.rest()).endswith(b"0\r\n\r\n")
        assert time.monotonic() - begun < 2 * WITHIN


async def test_only_the_streams_of_a_key_that_ends_are_over(tmp_path: Path) -> None:  # T74
    keys = [await add_member(tmp_path, "alice") for _ in range(3)]
    async with shared(tmp_path, {"mode": "api_key"}) as there, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(RawClient.to(there.proxy.origin)) for _ in keys]
        for stream, key in zip(streams, keys, strict=True):
            stream.get("/notes/mcp", f"X-API-Key: {key}")
            assert (await stream.head())[0] == 200
        directory = there.proxy.application.callers.directory
        await directory.revoke_key(keys[0].split("_")[1])
        assert (await streams[0].rest()).endswith(b"0\r\n\r\n")
        assert there.proxy.application.forwarder.active_requests == 2
        # A key that has not ended when its request begins, but does while its stream is open.
        late, text = make_key(
            principal=directory.principals()[0].id,
            name="",
            scopes=ALL_SCOPES,
            now=time.time(),
            expires_at=time.time() + 0.5,
        )
        await directory.add_key(late)
        stream = await stack.enter_async_context(RawClient.to(there.proxy.origin))
        stream.get("/notes/mcp", f"X-API-Key: {text}")
        assert (await stream.head())[0] == 200
        assert (await stream.rest()).endswith(b"0\r\n\r\n")
        assert there.proxy.application.forwarder.active_requests == 2


async def test_an_address_has_five_failed_credentials_a_second_at_mcp_endpoints(tmp_path: Path) -> None:  # T43
    key = await add_member(tmp_path, "alice")
    bad = "X-API-Key: mapk_000000000000_" + "x" * 43
    async with shared(tmp_path, {"mode": "api_key"}) as there, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(RawClient.to(there.proxy.origin)) for _ in range(20)]
        begun = time.monotonic()
        for client in clients:
            client.post(CALL, bad, path="/notes/mcp")
        # A good one is not locked out, and one that is missing is no guess.
        assert (await there.post(f"X-API-Key: {key}")).status == 200
        assert await there.refused() == 401
        answers = [await client.answer() for client in clients]
        statuses = [answer.status for answer in answers]
        # Five at once, five that wait for their turn, and the others are told to come back.
        assert 5 <= statuses.count(401) <= 5 * (1 + time.monotonic() - begun)
        refused = [answer for answer in answers if answer.status == 429]
        assert len(refused) == 20 - statuses.count(401) > 0
        assert {answer.all("retry-after")[0] for answer in refused} == {"1"}
        # Who comes one after the other sees what is wrong, but no faster.
        begun = time.monotonic()
        assert [(await there.post(bad)).status for _ in range(3)] == [401] * 3
        assert time.monotonic() - begun > 0.3


async def test_a_key_that_ends_is_refused_on_the_connection_that_it_was_used_on(tmp_path: Path) -> None:
    # T74
    async with shared(tmp_path, {"mode": "api_key"}) as there:
        directory = there.proxy.application.callers.directory
        alice = Principal(id=new_principal_id(), name="alice", created_at=time.time())
        await directory.add(alice)
        ends = time.time() + 0.7
        key, text = make_key(principal=alice.id, name="brief", scopes=ALL_SCOPES, now=time.time(), expires_at=ends)
        await directory.add_key(key)
        answered = 0
        while time.time() < ends - 0.1:
            answered += (await there.post(f"X-API-Key: {text}")).status == 200
        assert answered > 1
        await until(lambda: time.time() >= ends, "its end", 2)
        assert await there.refused(f"X-API-Key: {text}") == 401


async def test_a_reload_changes_who_is_believed(tmp_path: Path) -> None:
    async with shared(tmp_path, {"mode": "trusted_header", "trusted_header": FRONT}) as there:
        assert (await there.post("X-Forwarded-User: alice", SECRET)).status == 200
        application = there.proxy.application
        settings = application.settings
        assert settings.inbound.trusted_header is not None
        header = replace(settings.inbound.trusted_header, name="x-other-user")
        new = replace(settings, inbound=replace(settings.inbound, trusted_header=header))
        application.apply(compare(settings, new))
        assert await there.refused("X-Forwarded-User: alice", SECRET) == 401
        assert (await there.post("X-Other-User: alice", SECRET)).status == 200
        assert "alice" not in there.forwarded()
