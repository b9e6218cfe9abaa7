"""``mcp_auth_proxy.client``: OAuth in a program that uses an MCP server without a proxy."""

import asyncio
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from e2e.test_login import free_port
from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import RealMcpServer, Servers
from fakes.headless import consent
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.client import BearerAuth, FileTokenStorage, OAuth, OAuthClientProvider, TokenData
from mcp_auth_proxy.errors import AddressInUse, AuthorizationError
from mcp_auth_proxy.oauth.authorization_code import challenge_s256

T = TypeVar("T")
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


class User:
    """Opens the links that the library logs, and consents."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self.links: list[str] = []

    async def while_doing(self, work: Awaitable[T]) -> T:
        """Await the work, and consent whenever it needs the user."""
        task = asyncio.ensure_future(work)
        try:
            async with asyncio.timeout(20):
                while not task.done():
                    for link in re.findall(r"open this link: (\S+)", self._caplog.text):
                        if link not in self.links:
                            self.links.append(link)
                            await consent(link)
                    await asyncio.wait([task], timeout=0.02)
        finally:
            task.cancel()
        return await task


@pytest.fixture
def user(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> User:
    monkeypatch.setenv("CI", "true")
    caplog.set_level(logging.WARNING)
    return User(caplog)


@pytest.fixture
def storage(tmp_path: Path) -> FileTokenStorage:
    return FileTokenStorage(str(tmp_path))


@asynccontextmanager
async def program(auth: httpx2.Auth | None) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(auth=auth, trust_env=False, timeout=20) as client:
        yield client


async def ping(auth: httpx2.Auth, url: str) -> httpx2.Response:
    async with program(auth) as client:
        return await client.post(url, json=PING)


async def test_the_user_is_asked_once_and_the_request_waits(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    first = await user.while_doing(ping(OAuth(mcp_server.url, storage), mcp_server.url))
    assert first.status_code == 200
    assert (await ping(OAuth(mcp_server.url, storage), mcp_server.url)).status_code == 200
    assert len(user.links) == 1
    assert (authorization_server.authorizations, authorization_server.registrations) == (1, 1)


async def test_many_requests_at_once_ask_the_user_once(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer
) -> None:
    auth = OAuth(mcp_server.url, storage)
    async with program(auth) as client:
        posts = (client.post(mcp_server.url, json=PING) for _ in range(10))
        responses = await user.while_doing(asyncio.gather(*posts))
    assert {response.status_code for response in responses} == {200}
    assert len(user.links) == 1


async def test_a_refused_token_is_renewed(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    auth = OAuth(mcp_server.url, storage)
    await user.while_doing(ping(auth, mcp_server.url))
    assert authorization_server.end_access_tokens() == 1
    assert (await ping(auth, mcp_server.url)).status_code == 200
    assert (authorization_server.refreshes, authorization_server.authorizations) == (1, 1)


async def test_a_token_is_renewed_before_it_expires(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    authorization_server.configure(token_seconds=3)
    auth = OAuth(mcp_server.url, storage)
    await user.while_doing(ping(auth, mcp_server.url))
    async with asyncio.timeout(10):
        while authorization_server.refreshes == 0:
            assert (await ping(auth, mcp_server.url)).status_code == 200
    posts = [received for received in mcp_server.requests if received.method == "POST"]
    assert all(received.bearer for received in posts[1:])


async def test_by_hand(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    auth = OAuth(mcp_server.url, storage)
    async with program(None) as client:
        assert await auth.initialize(client) is None
        assert await auth.refresh_token() is None
        bearer = await user.while_doing(auth.authenticate())
        assert isinstance(bearer, BearerAuth)
        assert (await ping(bearer, mcp_server.url)).status_code == 200
        again = await OAuth(mcp_server.url, storage).initialize(client)
        assert again is not None
        assert again.token == bearer.token
        renewed = await auth.refresh_token()
    assert renewed is not None
    assert renewed.token != bearer.token
    assert (await ping(renewed, mcp_server.url)).status_code == 200
    assert bearer.token not in repr(bearer)
    assert authorization_server.refreshes == 1


async def test_the_token_goes_to_its_server_only(
    user: User, storage: FileTokenStorage, servers: Servers, authorization_server: FakeAuthorizationServer
) -> None:
    upstream, other = await servers.mcp_server(authorization_server), await servers.mcp_server(protected=False)
    auth = OAuth(upstream.url, storage)
    await user.while_doing(ping(auth, upstream.url))
    async with program(auth) as client:
        await client.post(other.url, json=PING)
        await client.post(upstream.url.replace("/mcp", "/other"), json=PING)
        await client.post(upstream.url + "2", json=PING)
    elsewhere = [*other.requests, *(it for it in upstream.requests if it.method == "POST" and it.path != "/mcp")]
    assert len(elsewhere) == 3
    assert all(received.header("authorization") is None for received in elsewhere)


async def test_servers_of_one_host_have_tokens_of_their_own(storage: FileTokenStorage, tmp_path: Path) -> None:
    urls = [f"https://mcp.example.com/{path}" for path in ("a_b", "a/b", "a/b?tenant=1")]
    auths = [OAuth(url, storage) for url in urls]
    assert len({auth._server.name for auth in auths}) == 3


async def test_the_sdk_s_transport_uses_it(
    user: User, storage: FileTokenStorage, real_mcp_server: RealMcpServer
) -> None:
    async def tools() -> list[str]:
        async with (
            program(OAuth(real_mcp_server.url, storage)) as client,
            streamable_http_client(real_mcp_server.url, http_client=client) as (read, write, *_),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return sorted(tool.name for tool in (await session.list_tools()).tools)

    assert "echo" in await user.while_doing(tools())
    assert "echo" in await tools()
    assert len(user.links) == 1


async def test_a_provider_replaces_discovery(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    metadata = authorization_server.metadata()
    authorization_server.serves_metadata = False
    provider = OAuthClientProvider("mine", "Mine", metadata)
    auth = OAuth(mcp_server.url, storage, oauth_provider=provider)
    assert (await user.while_doing(ping(auth, mcp_server.url))).status_code == 200
    assert authorization_server.discoveries == 0


async def test_a_client_and_scopes_of_one_s_own(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}/oauth/callback"
    authorization_server.add_client(client_id="mine", secret="my-secret", redirect_uris=(uri,))
    auth = OAuth(
        mcp_server.url, storage, scope="read write", client_id="mine", client_secret="my-secret", callback_port=port
    )
    assert (await user.while_doing(ping(auth, mcp_server.url))).status_code == 200
    (asked,) = authorization_server.seen("authorize")
    assert (asked.form["client_id"], asked.form["scope"]) == ("mine", "read write")
    assert "my-secret" not in repr(auth)


def written_by_mcp_use(folder: Path, url: str, server: FakeAuthorizationServer) -> dict[str, Any]:
    """Write the files that mcp-use leaves behind; return the tokens in them."""
    client = server.add_client(client_id="theirs", auth="none", redirect_uris=("http://localhost:8080/callback",))
    redirect, verifier = "http://localhost:8080/callback", "v" * 43
    challenge = challenge_s256(verifier)
    code = server.ledger.authorize(client, redirect_uri=redirect, challenge=challenge, resource=url, scopes=())
    issued = server.ledger.redeem(client, code=code, redirect_uri=redirect, verifier=verifier, resource=url)
    tokens: dict[str, Any] = {"access_token": issued.access_token, "refresh_token": issued.refresh_token}
    tokens |= {"token_type": "Bearer", "expires_at": time.time() - 10, "scope": None}
    netloc = url.split("/")[2]
    (folder / f"{netloc}__mcp.json").write_text(json.dumps(tokens))
    (folder / "registrations").mkdir()
    registration = {"client_id": "theirs", "redirect_uris": ["http://localhost:8080/callback"]}
    (folder / "registrations" / f"{netloc}__mcp_registration.json").write_text(json.dumps(registration))
    return tokens


async def test_plain_files_of_mcp_use_are_taken_over_and_sealed(
    storage: FileTokenStorage,
    tmp_path: Path,
    mcp_server: FakeMcpServer,
    authorization_server: FakeAuthorizationServer,
) -> None:
    tokens = written_by_mcp_use(tmp_path, mcp_server.url, authorization_server)
    auth = OAuth(mcp_server.url, storage)
    assert (await ping(auth, mcp_server.url)).status_code == 200
    assert (authorization_server.refreshes, authorization_server.registrations) == (1, 0)
    stored = await storage.load_tokens(mcp_server.url)
    assert stored is not None
    assert stored.refresh_token not in (None, tokens["refresh_token"])
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir() if file.name.startswith("mcp-auth-proxy.db"))
    for secret in (stored.access_token, stored.refresh_token, tokens["refresh_token"]):
        assert secret.encode() not in kept
    await storage.delete_tokens(mcp_server.url)
    assert await storage.load_tokens(mcp_server.url) is None
    async with program(None) as client:
        assert await OAuth(mcp_server.url, storage).initialize(client) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"access_token": 7}', '{"access_token": ""}', "\udcff", "[" * 100_000]
)
async def test_a_broken_plain_file_is_as_none(
    storage: FileTokenStorage, tmp_path: Path, mcp_server: FakeMcpServer, text: str
) -> None:
    name = f"{mcp_server.url.split('/')[2]}__mcp.json"
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    async with program(None) as client:
        assert await OAuth(mcp_server.url, storage).initialize(client) is None


class Vault:
    """A program's own storage."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    async def save_tokens(self, server_url: str, tokens: dict[str, Any]) -> None:
        self.kept[server_url] = tokens

    async def load_tokens(self, server_url: str) -> dict[str, Any] | None:
        return self.kept.get(server_url)

    async def delete_tokens(self, server_url: str) -> None:
        self.kept.pop(server_url, None)


async def test_a_storage_of_one_s_own_gets_every_token(
    user: User,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mcp_server: FakeMcpServer,
    authorization_server: FakeAuthorizationServer,
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "one"))
    vault = Vault()
    auth = OAuth(mcp_server.url, vault)
    await user.while_doing(ping(auth, mcp_server.url))
    first = vault.kept[mcp_server.url]["access_token"]
    authorization_server.end_access_tokens()
    await ping(auth, mcp_server.url)
    assert vault.kept[mcp_server.url]["access_token"] != first
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another"))
    async with program(None) as client:
        found = await OAuth(mcp_server.url, vault).initialize(client)
    assert found is not None
    assert found.token == vault.kept[mcp_server.url]["access_token"]


async def test_a_user_who_declines_is_an_error(
    storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer, user: User
) -> None:
    authorization_server.authorize_error = ("access_denied", "not today")
    with pytest.raises(AuthorizationError, match="access_denied"):
        await user.while_doing(ping(OAuth(mcp_server.url, storage), mcp_server.url))


async def test_a_port_that_is_taken_is_named(storage: FileTokenStorage, mcp_server: FakeMcpServer) -> None:
    port = int(mcp_server.url.split(":")[2].split("/")[0])
    with pytest.raises(AddressInUse, match=f"127.0.0.1:{port} is taken .* callback_port"):
        await OAuth(mcp_server.url, storage, callback_port=port).authenticate()


@pytest.mark.parametrize("url", ["http://mcp.example.com/mcp", "ftp://mcp.example.com", "mcp.example.com", "https://"])
def test_a_url_that_can_not_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match=r"https|URL|host"):
        OAuth(url)


def test_a_client_that_can_not_wait_is_refused(storage: FileTokenStorage, mcp_server: FakeMcpServer) -> None:
    with httpx2.Client(auth=OAuth(mcp_server.url, storage)) as client, pytest.raises(RuntimeError, match="AsyncClient"):
        client.get(mcp_server.url)


def test_secrets_are_in_no_repr() -> None:
    tokens = TokenData(access_token="canary-access", refresh_token="canary-refresh")
    assert "canary" not in repr(tokens) + repr(BearerAuth("canary"))


def test_importing_it_imports_neither_the_data_plane_nor_the_pages() -> None:
    code = "import sys, mcp_auth_proxy.client; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    unwanted = {"mcp_auth_proxy.proxy", "mcp_auth_proxy.web", "mcp_auth_proxy.app", "mcp_auth_proxy.router"}
    unwanted |= {"mcp_auth_proxy.net.http_server", "starlette", "uvicorn", "mcp", "jinja2"}
    assert unwanted.isdisjoint(found)


async def test_a_server_that_asks_for_no_authorization_is_named(storage: FileTokenStorage, servers: Servers) -> None:
    upstream = await servers.mcp_server(protected=False)
    auth = OAuth(upstream.url, storage)
    async with program(None) as client:
        assert await auth.initialize(client) is None
    assert (await ping(auth, upstream.url)).status_code == 200
    assert await auth.refresh_token() is None


async def test_a_login_of_another_program_is_found_after_a_challenge(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer
) -> None:
    one, other = OAuth(mcp_server.url, storage), OAuth(mcp_server.url, storage)
    async with program(None) as client:
        assert await one.initialize(client) is None
    await user.while_doing(ping(other, mcp_server.url))
    assert (await ping(one, mcp_server.url)).status_code == 200
    assert len(user.links) == 1


async def test_more_scopes_are_asked_for_when_the_server_wants_them(
    user: User, storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    mcp_server.scopes = ("read",)
    auth = OAuth(mcp_server.url, storage)
    assert (await user.while_doing(ping(auth, mcp_server.url))).status_code == 200
    mcp_server.scopes = ("read", "write")
    assert (await user.while_doing(ping(auth, mcp_server.url))).status_code == 200
    assert len(user.links) == 2
    first, second = (asked.form["scope"].split() for asked in authorization_server.seen("authorize"))
    assert (first, sorted(second)) == (["read"], ["read", "write"])


async def test_a_storage_keeps_tokens_that_a_program_gives_it(
    storage: FileTokenStorage, mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer
) -> None:
    token = authorization_server.issue(resource=mcp_server.url)
    await storage.save_tokens(mcp_server.url, {"access_token": token, "refresh_token": "of no known client"})
    kept = await storage.load_tokens(mcp_server.url)
    assert kept is not None
    assert (kept.access_token, kept.refresh_token) == (token, None)
    assert (await ping(OAuth(mcp_server.url, storage), mcp_server.url)).status_code == 200
    with pytest.raises(ValueError, match="no access_token"):
        await storage.save_tokens(mcp_server.url, {"refresh_token": "alone"})
