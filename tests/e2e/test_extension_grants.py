"""Grants that ask no user: signatures in place of secrets, workload tokens, ID-JAGs, and token exchange."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from fakes.extension_server import (
    ASSERTION_TYPE,
    JWT_BEARER,
    TOKEN_EXCHANGE,
    ExtensionServer,
    audience_of,
    claims_of,
    new_key,
    pem,
    signed,
)
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import PlainClient
from fakes.proxy import Sections, proxy_process, run_command, running_proxy, write_config
from fakes.proxy_setup import Clock

NOW: Sections = {"authorization": {"wait": "0s"}}
PLATFORM = "https://platform.example"


@pytest.fixture
async def issuer() -> AsyncIterator[ExtensionServer]:
    async with ExtensionServer.running() as server:
        yield server


@pytest.fixture
async def idp() -> AsyncIterator[ExtensionServer]:
    async with ExtensionServer.running("/company") as server:
        server.resource_clients["agent-at-idp"] = "agent"
        server.add_client(client_id="agent-at-idp", secret="idp-secret")
        yield server


@asynccontextmanager
async def client_of(
    folder: Path, url: str, oauth: dict[str, object], clock: Callable[[], float] = time.time
) -> AsyncIterator[PlainClient]:
    """Run the proxy before the server ``notes``; nobody is there to authorize."""
    config = {"notes": {"url": url, "oauth": oauth}}
    async with running_proxy(folder, config, clock=clock, **NOW) as proxy, proxy.client("notes") as client:
        yield client


def with_key(issuer: ExtensionServer, folder: Path, key: Any = None, **more: object) -> dict[str, object]:
    """The configuration of a client that the issuer knows by its public key."""
    key = key or new_key()
    issuer.add_client(client_id="agent", auth="private_key_jwt", redirect_uris=())
    issuer.client_keys["agent"] = key.public_key()
    (folder / "client.pem").write_text(pem(key))
    return {"client_id": "agent", "private_key": "file:client.pem", "client_auth": "private_key_jwt", **more}


def with_workload_token(issuer: ExtensionServer, folder: Path) -> Any:
    """Return what puts a new token for the workload into its file."""
    key = new_key()
    issuer.trusted[PLATFORM] = key.public_key()

    def project(**changes: Any) -> str:
        claims = {"iss": PLATFORM, "sub": "system:serviceaccount:agents:batch", "aud": issuer.issuer, **changes}
        token = signed(key, **claims)
        (folder / "token").write_text(f"{token}\n")
        return token

    return project


def with_idp(issuer: ExtensionServer, idp: ExtensionServer, folder: Path, **changes: object) -> dict[str, object]:
    issuer.add_client(client_id="agent", secret="as-secret")
    issuer.trusted[idp.issuer] = idp.key.public_key()
    (folder / "id_token").write_text(idp.id_token("agent-at-idp"))
    for name in ("as-secret", "idp-secret"):
        (folder / name).write_text(name)
    provider: dict[str, object] = {
        "issuer": idp.issuer,
        "client_id": "agent-at-idp",
        "client_secret": "file:idp-secret",
        "id_token": "file:id_token",
        **changes,
    }
    section = {name: value for name, value in provider.items() if value is not None}
    client = {"issuer": issuer.issuer, "client_id": "agent", "client_secret": "file:as-secret"}
    return {"grant": "id_jag", **client, "idp": section}


@pytest.mark.parametrize("kind", ["EC", "RSA"])
async def test_a_client_authenticates_with_assertions_that_are_never_used_twice(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path, kind: str
) -> None:
    upstream = await servers.mcp_server(issuer, scopes=("read",))
    key = new_key() if kind == "EC" else rsa.generate_private_key(65537, 2048)
    oauth = with_key(issuer, tmp_path, key, grant="client_credentials")
    async with client_of(tmp_path, upstream.url, oauth) as client:
        for text in ("one", "two", "three"):
            assert (await client.call("echo", text=text)).text == text
            issuer.end_access_tokens()
    asked = issuer.seen("token", grant_type="client_credentials")
    assert len(asked) == 3
    for request in asked:
        assert request.form["client_assertion_type"] == ASSERTION_TYPE
        assert (request.form["resource"], request.form["scope"]) == (upstream.url, "read")
        claims = claims_of(request.form["client_assertion"])
        assert (claims["iss"], claims["sub"], claims["aud"]) == ("agent", "agent", issuer.issuer)
        assert 0 < claims["exp"] - claims["iat"] <= 300
        assert not {"client_id", "client_secret"} & set(request.form)
        assert request.header("authorization") is None
    assert issuer.authorizations == 0


async def test_a_user_logs_in_through_a_client_with_a_key(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    config = {"notes": {"url": upstream.url, "oauth": with_key(issuer, tmp_path)}}
    async with running_proxy(tmp_path, config, **NOW) as proxy, proxy.client("notes") as client:
        issuer.add_client(client_id="agent", auth="private_key_jwt", redirect_uris=(f"{proxy.origin}/oauth/callback",))
        await client.call("echo", text="x")
        assert (await consent(proxy.links[0])).status_code == 200
        issuer.end_access_tokens()
        assert (await client.call("echo", text="after a refresh")).text == "after a refresh"
    assert issuer.refreshes == 1
    assert all("client_assertion" in request.form for request in issuer.seen("token"))


async def test_an_unsupported_signature_is_reported_before_anything_is_sent(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    issuer.metadata_changes = {"token_endpoint_auth_signing_alg_values_supported": ["RS256"]}
    upstream = await servers.mcp_server(issuer)
    oauth = with_key(issuer, tmp_path, grant="client_credentials")
    async with client_of(tmp_path, upstream.url, oauth) as client:
        answer = await client.call("echo", text="x")
    assert answer.status == 200
    assert "servers.notes.oauth.signing_alg" in answer.error["message"]
    assert issuer.token_requests() == 0


async def test_the_token_of_a_workload_is_read_again_at_each_use(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    project = with_workload_token(issuer, tmp_path)
    oauth: dict[str, object] = {"grant": "jwt_bearer", "issuer": issuer.issuer, "assertion": "file:token"}
    async with client_of(tmp_path, upstream.url, oauth) as client:
        missing = await client.call("echo", text="x")
        assert "servers.notes.oauth.assertion" in missing.error["message"]
        assert str(tmp_path / "token") in missing.error["message"]
        projected = []
        for text in ("one", "two"):
            projected.append(project())
            assert (await client.call("echo", text=text)).text == text
            issuer.end_access_tokens()
        assert "batch" in (project(), await client.call("whoami"))[1].text
    asked = issuer.seen("token", grant_type=JWT_BEARER)
    assert [request.form["assertion"] for request in asked][:2] == projected
    assert all(request.form["resource"] == upstream.url for request in asked)
    assert not [request for request in asked if "client_id" in request.form]
    assert (len(asked), issuer.registrations) == (3, 0)


async def test_a_refused_workload_is_tried_once_and_reported(
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    token = with_workload_token(issuer, tmp_path)(aud="https://another.example")
    oauth: dict[str, object] = {
        "grant": "jwt_bearer",
        "issuer": issuer.issuer,
        "assertion": "file:token",
        "client_id": "workload",
    }
    issuer.add_client(client_id="workload", auth="none")
    async with client_of(tmp_path, upstream.url, oauth) as client:
        answer = await client.call("echo", text="x")
    assert answer.status == 200
    assert "invalid_grant" in answer.error["message"]
    assert token not in str(answer.message)
    assert [request.form["client_id"] for request in issuer.seen("token")] == ["workload"]


async def test_the_token_of_a_workload_is_not_sent_to_another_issuer(  # T11
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    project = with_workload_token(issuer, tmp_path)
    oauth: dict[str, object] = {"grant": "jwt_bearer", "issuer": issuer.issuer, "assertion": "file:token"}
    project()
    async with ExtensionServer.running() as other:
        async with client_of(tmp_path, upstream.url, oauth) as client:
            assert (await client.call("echo", text="x")).text == "x"
            upstream.authorization_servers = [other]
            issuer.configure(outage=FakeResponse.json({"error": "invalid_grant"}, 400))
            project()
            answer = await client.call("echo", text="y")
        assert "servers.notes.oauth.issuer" in answer.error["message"]
        assert other.token_requests() == 0


@pytest.mark.parametrize("grant", ["jwt_bearer", "id_jag"])
async def test_a_workload_sends_nothing_to_the_issuer_that_a_server_names_first(  # T84
    servers: Servers, issuer: ExtensionServer, idp: ExtensionServer, tmp_path: Path, grant: str
) -> None:
    with_workload_token(issuer, tmp_path)()
    oauth: dict[str, object] = {"grant": "jwt_bearer", "issuer": issuer.issuer, "assertion": "file:token"}
    if grant == "id_jag":
        oauth = with_idp(issuer, idp, tmp_path)
    async with ExtensionServer.running() as hostile:
        upstream = await servers.mcp_server(hostile)
        async with client_of(tmp_path, upstream.url, oauth) as client:
            answer = await client.call("echo", text="x")
        assert "servers.notes.oauth.issuer" in answer.error["message"]
        assert (hostile.token_requests(), idp.token_requests()) == (0, 0)
        seen = (len(upstream.requests), len(hostile.requests))
        del oauth["issuer"]
        config = write_config(tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}})
        for command in ("check", "serve"):
            code, _, err = await run_command(command, "--config", str(config))
            assert code == 2
            assert "servers.notes.oauth.issuer: is needed" in err
        assert (len(upstream.requests), len(hostile.requests)) == seen


async def test_client_credentials_without_an_issuer_are_warned_of(  # T84
    servers: Servers, issuer: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    oauth = with_key(issuer, tmp_path, grant="client_credentials")
    config = write_config(tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}})
    code, out, err = await run_command("check", "--config", str(config))
    assert (code, ": valid, 1 server" in out) == (0, True)
    assert err.startswith("warning: servers.notes.oauth.issuer: ")
    async with proxy_process(config) as proxy:
        await proxy.stop()
    assert "servers.notes.oauth.issuer: " in proxy.log
    _, out, _ = await run_command("doctor", "notes", "--config", str(config))
    assert f"servers.notes.oauth.issuer: {issuer.issuer}" in out
    oauth["issuer"] = issuer.issuer
    config = write_config(tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}})
    code, _, err = await run_command("check", "--config", str(config))
    assert (code, err) == (0, "")
    _, out, _ = await run_command("doctor", "notes", "--config", str(config))
    assert "Not set here" not in out


@pytest.mark.parametrize("endpoint", ["discovered", "configured"])
async def test_an_identity_provider_authorizes_without_asking_the_user(
    servers: Servers, issuer: ExtensionServer, idp: ExtensionServer, tmp_path: Path, endpoint: str
) -> None:
    upstream = await servers.mcp_server(issuer, scopes=("read",))
    oauth = with_idp(issuer, idp, tmp_path, token_endpoint=f"{idp.issuer}/token" if endpoint == "configured" else None)
    async with client_of(tmp_path, upstream.url, oauth) as client:
        assert (await client.call("whoami")).text.startswith("ada read")
        issuer.end_access_tokens()
        (tmp_path / "id_token").write_text(renewed := idp.id_token("agent-at-idp", "grace"))
        assert (await client.call("whoami")).text.startswith("grace read")
    exchanges = idp.seen("token", grant_type=TOKEN_EXCHANGE)
    assert [request.form["subject_token"] for request in exchanges][1:] == [renewed]
    for request in exchanges:
        assert (request.form["audience"], request.form["resource"]) == (issuer.issuer, upstream.url)
        assert request.form["scope"] == "read"
    assert idp.discoveries == (2 if endpoint == "discovered" else 0)
    for request in issuer.seen("token"):
        assert (request.form["grant_type"], request.form["resource"]) == (JWT_BEARER, upstream.url)
        assert audience_of(request.form["assertion"]) == issuer.issuer
        assert renewed not in repr(request)
    assert not [request for request in idp.requests if b"as-secret" in request.body]


async def test_scopes_that_the_identity_provider_removes_are_not_requested(
    servers: Servers, issuer: ExtensionServer, idp: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer, challenge_scopes=("read", "write"))
    idp.jag_scopes = ("read",)
    idp.subject_tokens["idp-refresh-token"] = "ada"
    (tmp_path / "refresh").write_text("idp-refresh-token")
    oauth = with_idp(issuer, idp, tmp_path, id_token=None, refresh_token="file:refresh")
    async with client_of(tmp_path, upstream.url, oauth) as client:
        assert (await client.call("whoami")).text.startswith("ada read ")
    assert idp.seen("token")[0].form["scope"] == "read write"
    assert issuer.seen("token")[0].form["scope"] == "read"


@pytest.mark.parametrize(
    "changes",
    [
        {"issued_token_type": "urn:ietf:params:oauth:token-type:access_token"},
        {"access_token": "an-opaque-token"},
        {"access_token": ""},
    ],
)
async def test_a_token_that_is_not_an_id_jag_is_not_sent_on(
    servers: Servers, issuer: ExtensionServer, idp: ExtensionServer, tmp_path: Path, changes: dict[str, object]
) -> None:
    idp.jag_changes = changes
    upstream = await servers.mcp_server(issuer)
    oauth = with_idp(issuer, idp, tmp_path)
    async with client_of(tmp_path, upstream.url, oauth) as client:
        answer = await client.call("echo", text="x")
    assert "RFC 8693 §2.2.1" in answer.error["message"]
    assert issuer.token_requests() == 0


async def test_an_expired_id_token_is_reported_and_a_new_one_is_used(
    servers: Servers, issuer: ExtensionServer, idp: ExtensionServer, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(issuer)
    oauth = with_idp(issuer, idp, tmp_path)
    (tmp_path / "id_token").write_text(idp.id_token("agent-at-idp", seconds=-60))
    clock = Clock()
    async with client_of(tmp_path, upstream.url, oauth, clock) as client:
        answer = await client.call("echo", text="x")
        assert "ExpiredSignatureError" in answer.error["message"]
        assert idp.issuer in answer.error["message"]
        (tmp_path / "id_token").write_text(idp.id_token("agent-at-idp"))
        clock.ahead += int(answer.headers["retry-after"])
        assert (await client.call("echo", text="y")).text == "y"


async def test_no_key_assertion_or_token_is_in_the_log_or_the_store(  # T45
    servers: Servers, issuer: ExtensionServer, idp: ExtensionServer, tmp_path: Path
) -> None:
    keyed, batch = [await servers.mcp_server(issuer) for _ in range(2)]
    project = with_workload_token(issuer, tmp_path)
    project()
    config = {
        "keyed": {"url": keyed.url, "oauth": with_key(issuer, tmp_path, grant="client_credentials")},
        "batch": {
            "url": batch.url,
            "oauth": {"grant": "jwt_bearer", "issuer": issuer.issuer, "assertion": "file:token"},
        },
    }
    async with proxy_process(write_config(tmp_path, config), "--log-level", "debug") as proxy:
        for name in config:
            async with proxy.client(name) as client:
                assert (await client.call("echo", text="x")).text == "x"
        project(aud="wrong")
        issuer.end_access_tokens()
        async with proxy.client("batch") as client:
            assert "invalid_grant" in (await client.call("echo", text="x")).error["message"]
        await proxy.stop()
    key_lines = (tmp_path / "client.pem").read_text().splitlines()[1:-1]
    canaries = [*issuer.secrets(), *key_lines]
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
    assert len(canaries) > 6
    assert not [canary for canary in canaries if canary in proxy.log or canary.encode() in stored]
