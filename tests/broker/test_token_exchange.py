"""On behalf of a caller: the requests for a grant once the caller's token is known; and credentials in files."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakes.extension_server import TOKEN_EXCHANGE, ExtensionServer
from fakes.fixtures import Servers
from mcp_auth_proxy.broker import credentials
from mcp_auth_proxy.broker.backoff import Backoff
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.planning import Planner
from mcp_auth_proxy.broker.renewal import renewable
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.config.settings import OAuthSettings, Secret, ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, TokenRefused
from mcp_auth_proxy.models import Account, GrantType
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.oauth.token_exchange import SubjectToken
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import store_settings


@dataclass(frozen=True, kw_only=True)
class Client:
    """What plans an authorization, and what carries the plan out."""

    planner: Planner
    tokens: TokenClient


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    database = await open_store(store_settings(tmp_path))
    fetcher = Fetcher()
    discoverer = Discoverer(fetcher=fetcher, allow_private=())
    tokens = TokenClient(fetcher=fetcher, discoverer=discoverer, clock=time.time)
    registrar = ClientRegistrar(
        fetcher=fetcher,
        registrations=Registrations(database),
        public_url="http://127.0.0.1:8787",
        clock=time.time,
    )
    backoff = Backoff(clock=time.time)
    planner = Planner(discoverer=discoverer, registrar=registrar, token_client=tokens, backoff=backoff)
    yield Client(planner=planner, tokens=tokens)
    await fetcher.aclose()
    await database.close()


@pytest.fixture
async def issuer() -> AsyncIterator[ExtensionServer]:
    async with ExtensionServer.running() as server:
        server.add_client(client_id="proxy", secret="proxy-secret")
        server.subject_tokens["token-of-ada"] = "ada"
        yield server


def exchanging(url: str) -> ServerSettings:
    oauth = OAuthSettings(
        grant=GrantType.TOKEN_EXCHANGE, client_id="proxy", client_secret=Secret("proxy-secret"), scopes=("read",)
    )
    return ServerSettings(name="notes", url=url, oauth=oauth)


async def test_the_token_of_a_caller_is_exchanged_for_the_callers_own_grant(
    servers: Servers, issuer: ExtensionServer, client: Client
) -> None:
    upstream = await servers.mcp_server(issuer)
    plan = await client.planner.plan(Account("ada", "mcp"), exchanging(upstream.url), None)
    grant = await client.tokens.obtain(plan, subject=SubjectToken("token-of-ada"))
    assert (grant.key.account.principal, grant.grant_type) == ("ada", GrantType.TOKEN_EXCHANGE)
    assert not renewable(grant)
    token = upstream.find_token(grant.tokens.access_token)
    assert token is not None
    assert (token.client_id, token.resource, token.scopes) == ("proxy for ada", upstream.url, ("read",))
    (asked,) = issuer.seen("token", grant_type=TOKEN_EXCHANGE)
    assert (asked.form["subject_token"], asked.form["resource"]) == ("token-of-ada", upstream.url)


async def test_a_caller_that_the_server_does_not_know_is_refused_without_its_token_being_shown(  # T45
    servers: Servers, issuer: ExtensionServer, client: Client
) -> None:
    upstream = await servers.mcp_server(issuer)
    plan = await client.planner.plan(Account("eve", "mcp"), exchanging(upstream.url), None)
    with pytest.raises(TokenRefused, match="invalid_grant") as caught:
        await client.tokens.obtain(plan, subject=SubjectToken("token-of-eve"))
    assert "token-of-eve" not in str(caught.value)


async def test_without_a_caller_nothing_is_sent(servers: Servers, issuer: ExtensionServer, client: Client) -> None:
    upstream = await servers.mcp_server(issuer)
    plan = await client.planner.plan(Account("local", "mcp"), exchanging(upstream.url), None)
    with pytest.raises(AuthorizationError, match="needs the JWT that a caller was identified by"):
        await client.tokens.obtain(plan)
    assert issuer.token_requests() == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "can't be read"),
        (b"", "holds no token"),
        (b"two words", "holds no token"),
        (b"a\r\nX-Evil: b", "holds no token"),
        (b"\xff\xfe", "is not text"),
        (b"x" * 70_000, "too large"),
    ],
)
async def test_an_error_about_a_file_without_a_token_has_only_key_and_path(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AuthorizationError, match=problem) as caught:
        await credentials.read(path, "servers.a.oauth.assertion")
    assert "servers.a.oauth.assertion" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "Evil" not in str(caught.value)


async def test_a_token_file_is_read_at_each_use(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for text in ("one", "two"):
        await asyncio.to_thread(path.write_text, f"{text}\n")
        assert await credentials.read(path, "k") == text
    assert await credentials.read(Secret("three"), "k") == "three"
