"""The page before the first redirect to a sign-in page, in a real browser (T78)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fakes.chromium import ALLOW, EVIL, contrast, watched, website
from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.proxy import RunningProxy, running_proxy
from mcp_auth_proxy.cli.demo_servers.local_server import serve

pytestmark = pytest.mark.chromium

PROMISE = "authorization_response_iss_parameter_supported"


def hop(target: str) -> ASGIApp:
    """Redirect to ``target`` with the query of the request, as the steps of a single sign-on do."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = RedirectResponse(f"{target}?{Request(scope).url.query}", status_code=302)
        await response(scope, receive, send)

    return app


@asynccontextmanager
async def redirected(servers: Servers, folder: Path, **options: Any) -> AsyncIterator[tuple[RunningProxy, PlainClient]]:
    """A proxy before a server whose sign-in leads over three more origins, the second with a name of its own."""
    issuer = await servers.authorization_server(**options)
    upstream = await servers.mcp_server(issuer)
    async with AsyncExitStack() as stack:

        async def before(target: str) -> str:
            local = await stack.enter_async_context(serve(lambda _: hop(target)))
            return local.origin

        third = await before(f"{issuer.issuer}/authorize")
        second = await before(f"{third}/third")
        first = await before(f"{second.replace('127.0.0.1', EVIL)}/second")
        endpoint = f"{first.replace('127.0.0.1', 'localhost')}/first"
        issuer.metadata_changes = {"authorization_endpoint": endpoint, PROMISE: True}
        config = {"notes": upstream.url}
        proxy = await stack.enter_async_context(running_proxy(folder, dict(config), authorization={"wait": "20s"}))
        yield proxy, await stack.enter_async_context(proxy.client("notes"))


@pytest.mark.parametrize("script", [True, False], ids=["with-script", "without-script"])
@pytest.mark.parametrize("auto", [True, False], ids=["single-sign-on", "consent"])
async def test_the_button_leads_over_several_origins_to_the_end(  # T78
    servers: Servers, tmp_path: Path, browser: Browser, script: bool, auto: bool
) -> None:
    async with redirected(servers, tmp_path, auto_consent=auto) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="hello"))
        page, faults = await watched(await browser.new_context(java_script_enabled=script))
        await page.goto(await proxy.next_link())
        assert await page.inner_text("h1") == "Authorize notes"
        assert page.url == proxy.links[0]
        await page.dblclick("button")
        if not auto:
            await page.click(ALLOW)
        await page.wait_for_url("**/oauth/connected/*")
        assert await page.inner_text("h1") == "notes is connected"
        assert (await call).text == "hello"
    assert [fault for fault in faults if "ERR_ABORTED" not in fault] == []


async def test_back_and_continue_again_leads_on(servers: Servers, tmp_path: Path, browser: Browser) -> None:  # T78
    async with redirected(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="hello"))
        page, _ = await watched(await browser.new_context())
        await page.goto(await proxy.next_link())
        await page.click("button")
        await page.wait_for_selector(ALLOW)
        await page.go_back()
        await page.click("button")
        await page.click(ALLOW)
        await page.wait_for_url("**/oauth/connected/*")
        assert (await call).text == "hello"


async def test_a_link_in_a_foreign_page_shows_ours_and_its_form_works(  # T78
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    async with redirected(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="hello"))
        link = await proxy.next_link()
        async with website(f'<a href="{link}">go</a>') as port:
            page, _ = await watched(await browser.new_context())
            await page.goto(f"http://{EVIL}:{port}/")
            await page.click("a")
            await page.click("button")
            await page.click(ALLOW)
            await page.wait_for_url("**/oauth/connected/*")
        assert (await call).text == "hello"


@pytest.mark.parametrize("host", [EVIL, "127.0.0.1"])
async def test_a_foreign_page_can_not_press_the_button(  # T78
    servers: Servers, tmp_path: Path, browser: Browser, host: str
) -> None:
    async with redirected(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="hello"))
        link = await proxy.next_link()
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(link)
        token = await page.get_attribute("input[name=token]", "value")
        form = f'<form method="post" action="{link}"><input name="token" value="{token}"><button>Win</button></form>'
        async with website(form) as port:
            foreign = await context.new_page()
            await foreign.goto(f"http://{host}:{port}/")
            async with foreign.expect_navigation() as navigation:
                await foreign.click("button")
            response = await navigation.value
            assert response is not None
            assert response.status == 403
        await page.click("button")
        await page.click(ALLOW)
        assert (await call).text == "hello"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_can_be_read_on_a_small_screen(  # T78
    servers: Servers, tmp_path: Path, browser: Browser, scheme: Any
) -> None:
    async with redirected(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="x"))
        context = await browser.new_context(color_scheme=scheme, viewport={"width": 380, "height": 640})
        page, faults = await watched(context)
        await page.goto(await proxy.next_link())
        await page.screenshot(path=tmp_path / f"confirm-{scheme}.png")
        assert await contrast(page) >= 4.5
        assert faults == []
        await page.click("button")
        await page.click(ALLOW)
        await call
