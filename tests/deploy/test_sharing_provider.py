"""The second way of docs/sharing.md: a certified identity provider, where MCP clients and browsers sign in."""

import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
import yaml
from mcp import ClientSession
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken
from mcp.types import TextContent
from pydantic import AnyUrl

from fakes.fixtures import Servers
from fakes.identity_provider import Person, identity_provider
from fakes.mcp_client import PlainClient
from fakes.proxy import PROGRAM
from fakes.sharing import Shared, block
from identity import idp

CONFIG = block("yaml", "sign_in:")
CURL = block("sh", "oauth-protected-resource")
CLAUDE = block("sh", "claude mcp add", without="--header")
FILE = block("json", '{"mcpServers": {"linear": {"url"')
LIST = block("sh", "principals list")
LISTED = block("yaml", "provision: listed")
ADD = block("sh", "principals add")
KUBERNETES = block("yaml", "kubernetes: true")
KEYS_CONFIG = block("yaml", "mode: api_key")
POD = block("yaml", "serviceAccountToken")

CALLBACK = "/callback"


class Tokens:
    """What a client of the SDK keeps."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None
        self.info: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.info

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.info = client_info


def login(url: str, person: Person, tokens: Tokens) -> OAuthClientProvider:
    """Return the SDK's OAuth client, whose user signs in with a browser."""
    answers: list[AuthorizationCodeResult] = []

    async def redirect(address: str) -> None:
        callback = await person.stop_before(address, CALLBACK)
        found = {name: values[0] for name, values in parse_qs(urlsplit(callback).query).items()}
        answers.append(AuthorizationCodeResult(code=found["code"], state=found["state"], iss=found["iss"]))

    async def answer() -> AuthorizationCodeResult:
        return answers.pop()

    metadata = OAuthClientMetadata(client_name="test", redirect_uris=[AnyUrl(f"http://127.0.0.1:4711{CALLBACK}")])
    return OAuthClientProvider(url, metadata, tokens, redirect_handler=redirect, callback_handler=answer)


def client_of(shared: Shared, url: str, person: Person, tokens: Tokens) -> PlainClient:
    """Return a client that knows nothing but the address, with the OAuth of the MCP SDK."""
    client = shared.client(url, {})
    client.http.auth = login(url, person, tokens)
    return client


async def echo(client: PlainClient, text: str) -> str:
    """Call a tool with the SDK's client."""
    async with (
        streamable_http_client(client.url, http_client=client.http) as (read, write, *_),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        result = await session.call_tool("echo", {"text": text})
    return "".join(part.text for part in result.content if isinstance(part, TextContent))


def audience(tokens: Tokens) -> object:
    assert tokens.tokens is not None
    return jwt.decode(tokens.tokens.access_token, options={"verify_signature": False})["aud"]


@asynccontextmanager
async def company(servers: Servers, folder: Path) -> AsyncIterator[Shared]:
    """Set up a proxy and its identity provider, without running the former."""
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.real_mcp_server(authority)
    shared = Shared.on(folder, mcp_linear_app=upstream.url)
    async with identity_provider(folder, f"{shared.origin}/sign-in/callback") as issuer:
        shared.moves["https://idp.example.com"] = issuer
        yield shared


@pytest.mark.nginx
@pytest.mark.idp
async def test_clients_and_browsers_sign_in_at_a_certified_identity_provider(servers: Servers, tmp_path: Path) -> None:
    async with company(servers, tmp_path) as shared:
        shared.configure(CONFIG)
        issuer = shared.moves["https://idp.example.com"]
        async with shared.serving():
            shown = await shared.run(CURL)
            assert shown.startswith("HTTP/1.1 401")
            (named,) = re.findall(r'resource_metadata="([^"]+)"', shown)
            assert named == f"{shared.origin}/.well-known/oauth-protected-resource/linear/mcp"
            document = json.loads(shown[shown.index("\n{") :])
            assert (document["resource"], document["authorization_servers"]) == (shared.origin, [issuer])
            client = await shared.added_to_claude(CLAUDE)
            assert client.url == shared.configured(FILE).url
            for name in ("ada", "root"):
                tokens = Tokens()
                async with (
                    shared.person(name=name) as person,
                    client_of(shared, client.url, person, tokens) as program,
                ):
                    link = shared.link_in((await program.call("echo", text="x")).body.decode())
                    assert audience(tokens) == shared.origin
                    assert (await person.follow(link)).status_code == 200
                    assert await echo(program, name) == name
                    # The browser was signed in at the provider already.
                    assert person.asked_at == [urlsplit(issuer).netloc]
            listed = await shared.run(LIST)
            assert "ada  member  active" in listed
            assert "root  admin  active" in listed
            assert listed.count("active") == 2


@pytest.mark.nginx
@pytest.mark.idp
async def test_with_a_list_a_valid_token_is_not_enough(servers: Servers, tmp_path: Path) -> None:
    async with company(servers, tmp_path) as shared:
        shared.configure(CONFIG, LISTED)
        async with shared.serving(), shared.person(name="00u1a2b3c4") as ada:
            page = await ada.follow(f"{shared.origin}/sign-in")
            assert page.status_code == 403
            assert shared.moved(ADD.text).split()[-1] in page.text
            await shared.run(ADD)
            page = await ada.follow(f"{shared.origin}/linear/mcp", until="/linear/mcp")
            assert page.status_code == 200


CLUSTER = "https://kubernetes.default.svc.cluster.local"
ACCOUNT = "system:serviceaccount:team:agent"


@pytest.mark.nginx
async def test_pods_are_callers(servers: Servers, tmp_path: Path) -> None:
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(authority)
    shared = Shared.on(tmp_path, mcp_linear_app=upstream.url)
    shared.configure(KEYS_CONFIG, KUBERNETES)
    (volume,) = yaml.safe_load(shared.moved(POD.text))["spec"]["volumes"]
    (source,) = volume["projected"]["sources"]
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(shared.files.certificate, shared.files.key)
    async with idp.identity_provider(tls) as api_server:
        now = int(time.time())
        common = {"iss": CLUSTER, "iat": now, "exp": now + source["serviceAccountToken"]["expirationSeconds"]}
        own = api_server.token(**common, sub="system:serviceaccount:mcp:proxy", aud=CLUSTER)
        agents = api_server.token(**common, sub=ACCOUNT, aud=source["serviceAccountToken"]["audience"])
        account = tmp_path / "serviceaccount"
        account.mkdir()
        (account / "token").write_text(own)
        (account / "ca.crt").write_bytes(shared.files.authority.read_bytes())
        shared.env = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": api_server.issuer.rpartition(":")[2],
        }
        async with shared.serving(program=in_pod(account)):
            for token, status in {own: 401, agents: 200}.items():
                async with shared.client(f"{shared.origin}/linear/mcp", {"Authorization": f"Bearer {token}"}) as client:
                    assert (await client.call("echo", text="x")).status == status
            assert ACCOUNT in await shared.run(LIST)


def in_pod(account: Path) -> Sequence[str]:
    """Return how the proxy is started with the files of a service account where a pod has them."""
    place = "/run/secrets/kubernetes.io"
    script = f'mount -t tmpfs none /run; mkdir -p {place}; cp -r {account} {place}; exec "$@"'
    return ("unshare", "--map-root-user", "--mount", "sh", "-euc", script, "sh", *PROGRAM)
