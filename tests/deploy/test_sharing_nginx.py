"""The third way of docs/sharing.md: nginx signs people in, and tells the proxy who they are."""

import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.sharing import Block, Shared, block
from mcp_auth_proxy.cli.demo_servers.local_server import serve

CONFIG = block("yaml", "mode: trusted_header")
MAKE_SECRET = block("sh", "openssl rand")
BASIC = block("nginx", "auth_basic")
REQUEST = block("nginx", "auth_request")
CLAUDE_PASSWORD = block("sh", "Authorization: Basic")
TRY = block("sh", "X-Forwarded-User: grace")

PASSWORD = "correct horse"
SECRET_LINE = "include /etc/nginx/mcp-secret.conf;"
PASSWORD_LINE = 'proxy_set_header Authorization "";'
WITHOUT_SECRET = "inbound: {trusted_header: {name: X-Forwarded-User, from: [127.0.0.1]}}"
NAME_LINE = "proxy_set_header X-Forwarded-User $remote_user;"

pytestmark = pytest.mark.nginx


@asynccontextmanager
async def prepared(servers: Servers, folder: Path) -> AsyncIterator[Shared]:
    """Set up a proxy and the files of nginx, without running either."""
    authority = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(authority)
    shared = Shared.on(folder, mcp_linear_app=upstream.url)
    shared.moves["-g www-data"] = f"-g {os.getgid()}"
    await shared.run(MAKE_SECRET, typed=f"{PASSWORD}\n")
    shared.configure(CONFIG)
    yield shared
    fields = {name for request in upstream.requests for name, _ in request.headers}
    assert not fields & {b"x-forwarded-user", b"x-proxy-secret"}


def client_of(shared: Shared, **headers: str) -> PlainClient:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return shared.client(f"{shared.origin}/linear/mcp", named)


def basic(name: str, password: str = PASSWORD) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


async def name_of(shared: Shared, **headers: str) -> str | int:
    """Return as whom a request is answered, or the status if as nobody."""
    async with client_of(shared, **headers) as client:
        page = await client.http.get(f"{shared.origin}/")
    return page.text.split("signed in as ")[1].split("<")[0] if page.status_code == 200 else page.status_code


async def test_nginx_says_who_calls(servers: Servers, tmp_path: Path) -> None:
    async with prepared(servers, tmp_path) as shared, shared.serving(nginx=BASIC.text):
        async with (
            await shared.added_to_claude(CLAUDE_PASSWORD, MCP_PASSWORD=PASSWORD) as client,
            shared.person() as person,
        ):
            link = shared.link_in((await client.call("echo", text="x")).body.decode())
            # The link opens at once, because nginx says who is at the browser too.
            person.client.auth = ("ada", PASSWORD)
            assert (await person.follow(link)).status_code == 200
            assert "/sign-in" not in [urlsplit(hop).path for hop in person.hops]
            assert (await client.call("echo", text="in")).text == "in"
        assert await name_of(shared, authorization=basic("ada")) == "ada"
        # What a client says about itself counts for nothing.
        assert await name_of(shared, authorization=basic("ada"), x_forwarded_user="grace") == "ada"
        assert await name_of(shared, authorization=basic("grace")) == 401
        assert await shared.run(TRY) == "401\n"
        async with client_of(shared, authorization=basic("ada")) as client:
            twin = await client.http.get(f"{shared.origin}/", headers={"X_Forwarded_User": "grace"})
            assert "signed in as ada" in twin.text


async def test_nginx_asks_something_else_who_calls(servers: Servers, tmp_path: Path) -> None:
    async def sign_on(request: Request) -> Response:
        names = {"session=1": "ada"}
        name = names.get(request.headers.get("cookie", ""))
        return Response(status_code=202, headers={"x-auth-request-user": name}) if name else Response(status_code=401)

    server = BASIC.text.partition("    auth_basic")[0] + REQUEST.text + "}\n"
    async with (
        prepared(servers, tmp_path) as shared,
        serve(lambda origin: Starlette(routes=[Route("/oauth2/auth", sign_on)])) as single_sign_on,
    ):
        shared.sign_on = int(single_sign_on.origin.rpartition(":")[2])
        async with shared.serving(nginx=server):
            assert await name_of(shared, cookie="session=1") == "ada"
            assert await name_of(shared, cookie="session=1", x_forwarded_user="grace") == "ada"
            assert await name_of(shared, cookie="session=2", x_forwarded_user="grace") == 401
            assert await shared.run(TRY) == "401\n"


async def test_the_mistakes_of_the_page_let_callers_forge_a_name(servers: Servers, tmp_path: Path) -> None:
    """Else the page would warn of nothing. Two more are refused, as it says."""
    off = BASIC.text.replace("    location / {", "    location / {\n        auth_basic off;")
    async with prepared(servers, tmp_path) as shared:
        async with shared.serving(nginx=off):
            assert await name_of(shared, authorization=basic("grace", "wrong")) == "grace"
        async with shared.serving(nginx=off.replace(NAME_LINE, "")):
            assert await name_of(shared, x_forwarded_user="grace") == "grace"
        async with shared.serving(nginx=BASIC.text.replace(SECRET_LINE, "")):
            assert await name_of(shared, authorization=basic("ada")) == 401
        shared.configure(CONFIG, Block("yaml", "inbound: {mode: [trusted_header, api_key]}"))
        async with (
            shared.serving(nginx=BASIC.text.replace(PASSWORD_LINE, "")),
            client_of(shared, authorization=basic("ada")) as client,
        ):
            assert (await client.call("echo", text="x")).status == 400
        shared.configure(
            CONFIG, Block("yaml", "inbound: {trusted_header: {name: X-Forwarded-User, from: [127.0.0.1]}}")
        )
        async with shared.serving(), client_of(shared, x_forwarded_user="grace") as client:
            page = await client.http.get(f"http://127.0.0.1:{shared.behind}/")
            assert "signed in as grace" in page.text
