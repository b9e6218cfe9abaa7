"""Make the pictures of the dashboard in docs/pictures: ``python deploy/screenshots.py``. Needs Chromium.

The servers are those of the demo, on this machine; the page is a real one, of a proxy that runs here.
"""

import asyncio
import json
import logging
import re
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from playwright.async_api import Browser, async_playwright
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mcp_auth_proxy.app import Application, lifespan
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationServer
from mcp_auth_proxy.cli.demo_servers.ledger import Rules
from mcp_auth_proxy.cli.demo_servers.local_server import serve
from mcp_auth_proxy.cli.demo_servers.mcp_server import ProtectedMcpServer, Protection
from mcp_auth_proxy.cli.listener import bind, listening
from mcp_auth_proxy.config.settings import (
    Address,
    AuthorizationSettings,
    KeySource,
    ServerSettings,
    Settings,
    StoreSettings,
)
from mcp_auth_proxy.identity.sessions import new_link
from mcp_auth_proxy.models import LOCAL, Account, Flow
from mcp_auth_proxy.store.sessions import Sessions

PICTURES = Path(__file__).resolve().parents[1] / "docs/pictures"
MAX_BYTES = 150_000

VIEWS: dict[str, Any] = {
    "dashboard-light": {"color_scheme": "light", "viewport": {"width": 1180, "height": 980}},
    "dashboard-dark": {"color_scheme": "dark", "viewport": {"width": 1180, "height": 980}},
    "dashboard-narrow": {"color_scheme": "light", "viewport": {"width": 320, "height": 860}},
}
CONNECTED = ("linear", "notion")


class WorkspaceServer(AuthorizationServer):
    """Says whose account a token is for, as some providers do."""

    async def _token(self, request: Request) -> Response:
        response = await super()._token(request)
        document = json.loads(bytes(response.body))
        if "access_token" in document:
            document |= {"user": {"email": "me@work.example"}, "workspace": {"name": "Acme"}}
        return JSONResponse(document, status_code=response.status_code, headers={"cache-control": "no-store"})


async def protected_server(stack: AsyncExitStack) -> str:
    """Start a server with an authorization server of its own; return its URL."""
    made: list[AuthorizationServer] = []

    def make_authorization_server(origin: str) -> AuthorizationServer:
        made.append(WorkspaceServer(origin, rules=Rules(token_seconds=3600)))
        return made[0]

    def make_mcp_server(origin: str) -> ProtectedMcpServer:
        find = made[0].ledger.token
        return ProtectedMcpServer(Protection(resource=f"{origin}/mcp", issuer=made[0].issuer, find_token=find))

    await stack.enter_async_context(serve(make_authorization_server))
    local = await stack.enter_async_context(serve(make_mcp_server, lifespan="on"))
    return f"{local.origin}/mcp"


@asynccontextmanager
async def upstreams(stack: AsyncExitStack) -> AsyncIterator[dict[str, str]]:
    """Yield the URLs of three servers, and of one that is down."""
    urls = {name: await protected_server(stack) for name in ("linear", "notion", "sentry")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        urls["staging"] = f"http://127.0.0.1:{free.getsockname()[1]}/mcp"
    yield urls


@asynccontextmanager
async def proxy(folder: Path, urls: dict[str, str]) -> AsyncIterator[Application]:
    settings = Settings(
        listen=Address("127.0.0.1", 0),
        public_url=None,
        store=StoreSettings(
            path=folder / "store.db", keys=(KeySource(kind="file", name=str(folder / "store.key")),), default_key=True
        ),
        authorization=replace(AuthorizationSettings(), open_browser="never", wait=0.0),
        servers={name: ServerSettings(name=name, url=url) for name, url in urls.items()},
    )
    sock, address = bind(settings.listen)

    def announce(flow: Flow, link: str) -> None:
        pass

    with sock:
        async with (
            lifespan(settings, address, announce=announce, announce_key=lambda line: None) as application,
            listening(application, sock),
        ):
            yield application


async def consent(origin: str, server: str) -> None:
    """Press *Connect*, and allow it, without a script."""
    async with httpx2.AsyncClient(follow_redirects=True, trust_env=False) as browser:
        page = await browser.post(f"{origin}/connect/{server}/start", headers={"origin": origin})
        ticket, form = re.search(r'name="ticket" value="([^"]+)"', page.text), re.search(r'action="([^"]+)"', page.text)
        assert ticket is not None, page.text
        assert form is not None, page.text
        await browser.post(page.url.join(form[1]), data={"ticket": ticket[1], "decision": "allow"})


async def prepare(application: Application) -> None:
    """Bring the servers into different states."""
    origin = application.public_url
    for name in CONNECTED:
        await consent(origin, name)
    api = application.site.api
    assert api is not None
    for name in CONNECTED:
        await api.context.list_tools(application.servers[name], Account(LOCAL, name))
    async with httpx2.AsyncClient(trust_env=False) as client:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
        await client.post(f"{origin}/staging/mcp", json=call, headers={"accept": "application/json"})


async def take(application: Application, browser: Browser, name: str, options: dict[str, Any]) -> None:
    api = application.site.api
    assert api is not None
    secret = await new_link(Sessions(api.context.database), now=time.time())
    context = await browser.new_context(**options)
    page = await context.new_page()
    await page.goto(f"{application.public_url}/sign-in?link={secret}")
    await page.wait_for_selector("[data-live]:not([hidden])")
    path = PICTURES / f"{name}.png"
    await page.screenshot(path=path)
    await context.close()
    assert path.stat().st_size < MAX_BYTES, f"{path} is too large"
    print(path)


async def main() -> None:
    logging.getLogger("mcp_auth_proxy").setLevel(logging.CRITICAL)
    PICTURES.mkdir(parents=True, exist_ok=True)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory(prefix="mcp-auth-proxy-pictures-") as folder:
        async with AsyncExitStack() as stack, upstreams(stack) as urls, proxy(Path(folder), urls) as application:
            await prepare(application)
            async with async_playwright() as playwright:
                browser = await playwright.chromium.launch(executable_path=chromium, chromium_sandbox=False)
                for name, options in VIEWS.items():
                    await take(application, browser, name, options)
                await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
