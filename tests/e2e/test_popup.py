"""An authorization in a popup, in a real browser: who hears how it ends, and who does not (T70, T71)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from playwright.async_api import Browser, BrowserContext, Page

from fakes.chromium import ALLOW, contrast, watched, website
from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from web.api.made_setup import LOOPBACK, MadeSetup, administer, made_setup

pytestmark = pytest.mark.chromium

OPENER = """<!doctype html><title>opener</title><button onclick="popup = window.open(target, 'popup')">connect</button>
<script>
var target = '', popup = null, heard = [];
addEventListener('message', event => heard.push({origin: event.origin, data: event.data}));
</script>"""

LISTEN = """() => { window.said = [];
    window.channel = new BroadcastChannel('mcp-auth-proxy.oauth');
    window.channel.onmessage = event => window.said.push(event.data); }"""


@asynccontextmanager
async def popups(servers: Servers, folder: Path, *origins: str, **issuer: Any) -> AsyncIterator[MadeSetup]:
    async with made_setup(servers, folder, issuer={"auto_consent": False, **issuer}) as setup:
        administer(setup.api, allow_private=LOOPBACK, adhoc="member", popup_origins=origins)
        yield setup


def start(setup: MadeSetup, **query: str) -> str:
    given = {"mcp_server_url": setup.upstream.url, **query}
    return f"{setup.api.proxy.origin}/oauth/start?" + "&".join(
        f"{name}={quote(value)}" for name, value in given.items()
    )


async def sign_in(context: BrowserContext, setup: MadeSetup, name: str) -> Page:
    """Sign a user in; return a page of the proxy."""
    page = await context.new_page()
    await page.goto(f"{setup.api.proxy.origin}/sign-in")
    await page.fill("input[name=key]", setup.api.keys[name])
    await page.click("text=Sign in with a key")
    return page


async def open_popup(context: BrowserContext, port: str, target: str) -> tuple[Page, Page]:
    """Open a page on this machine, and let it open a popup; return both."""
    opener = await context.new_page()
    await opener.goto(f"http://127.0.0.1:{port}/")
    await opener.evaluate("url => { target = url }", target)
    async with context.expect_page() as opened:
        await opener.click("text=connect")
    return opener, await opened.value


async def heard(page: Page, script: str = "heard") -> list[Any]:
    """Return what a page has heard, once that is something."""
    await page.wait_for_function(f"{script}.length > 0")
    found: list[Any] = await page.evaluate(script)
    return found


@pytest.mark.parametrize("signed_in", [True, False], ids=["signed-in", "signs-in"])
async def test_the_allowed_opener_hears_how_it_ended_and_our_own_pages_do(
    servers: Servers, tmp_path: Path, browser: Browser, signed_in: bool
) -> None:
    async with website(OPENER) as port, popups(servers, tmp_path, f"http://127.0.0.1:{port}") as setup:
        context = await browser.new_context()
        ours = await context.new_page()
        if signed_in:
            ours = await sign_in(context, setup, "ben")
        else:
            await ours.goto(f"{setup.api.proxy.origin}/sign-in")
        await ours.evaluate(LISTEN)
        opener, popup = await open_popup(context, port, start(setup, scopes="read"))
        if not signed_in:
            await popup.fill("input[name=key]", setup.api.keys["ben"])
            await popup.click("text=Sign in with a key")
        assert setup.upstream.url in await popup.inner_text("main")
        assert await contrast(popup) >= 4.5
        await popup.click("text=Continue")
        await popup.click(ALLOW)
        await popup.wait_for_url("**/oauth/connected/**")
        messages = await heard(opener)
        data = messages[0]["data"]
        made = setup.api.proxy.application.made.all()[0]
        flow = (await setup.api.ben.get(f"/flows/{data['flow']}")).json()
        assert data == {
            "type": "mcp-auth-proxy.oauth", "status": "connected", "flow": flow["id"], "server": made.id,
        }  # fmt: skip
        assert (flow["status"], flow["server"]) == ("connected", made.id)
        assert messages[0]["origin"] == setup.api.proxy.origin
        # The same object, once: also if the page is loaded again.
        await popup.reload()
        assert await heard(ours, "said") == [data]
        assert await opener.evaluate("heard.length") == 1


async def test_a_foreign_opener_hears_nothing(servers: Servers, tmp_path: Path, browser: Browser) -> None:  # T71
    async with (
        website(OPENER) as allowed,
        website(OPENER) as foreign,
        popups(servers, tmp_path, f"http://127.0.0.1:{allowed}") as setup,
    ):
        context = await browser.new_context()
        ours = await sign_in(context, setup, "ben")
        await ours.evaluate(LISTEN)
        own = f"http://127.0.0.1:{foreign}"
        _, refused = await open_popup(context, foreign, start(setup, return_origin=own))
        assert "is not allowed" in await refused.inner_text("main")
        await refused.close()
        opener, popup = await open_popup(context, foreign, start(setup))
        await popup.click("text=Continue")
        await popup.click(ALLOW)
        await popup.wait_for_url("**/oauth/connected/**")
        # It has ended for our own pages: whatever the opener was to hear, it would have heard.
        assert (await heard(ours, "said"))[0]["status"] == "connected"
        await opener.evaluate("new Promise(resolve => setTimeout(resolve, 0))")
        assert await opener.evaluate("heard") == []


async def test_an_opener_that_the_sign_in_page_has_severed_is_reached_by_our_own_pages(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    async with popups(servers, tmp_path) as setup:
        context = await browser.new_context()
        ours = await sign_in(context, setup, "ben")
        await ours.evaluate(LISTEN)
        setup.issuer.auto_consent = True
        # Without a page of an application, the origin of the proxy itself hears it.
        async with context.expect_page() as opened:
            await ours.evaluate("url => { window.open(url, '_blank', 'noopener') }", start(setup))
        popup = await opened.value
        await popup.wait_for_url("**/oauth/connected/**")
        assert (await heard(ours, "said"))[0]["status"] == "connected"


async def test_a_user_who_declines_is_a_message_too(servers: Servers, tmp_path: Path, browser: Browser) -> None:
    async with website(OPENER) as port, popups(servers, tmp_path, f"http://127.0.0.1:{port}") as setup:
        context = await browser.new_context()
        await sign_in(context, setup, "ben")
        setup.issuer.authorize_error = ("access_denied", "no")
        opener, popup = await open_popup(context, port, start(setup))
        await popup.click("text=Continue")
        await popup.wait_for_selector("text=Not authorized")
        data = (await heard(opener))[0]["data"]
        assert data["status"] == "failed"
        assert (await setup.api.ben.get(f"/flows/{data['flow']}")).json()["status"] == "failed"


@pytest.mark.parametrize("status", ["connected", "failed"])
async def test_an_authorization_that_does_not_begin_is_a_message_too(
    servers: Servers, tmp_path: Path, browser: Browser, status: str
) -> None:
    async with website(OPENER) as port, popups(servers, tmp_path, f"http://127.0.0.1:{port}") as setup:
        context = await browser.new_context()
        await sign_in(context, setup, "ben")
        if status == "connected":
            setup.upstream.protected = False
        else:
            setup.issuer.answers["metadata"] = FakeResponse(status=500)
        opener, popup = await open_popup(context, port, start(setup))
        await popup.click("text=Continue")
        await popup.wait_for_selector("h1")
        (made,) = setup.api.proxy.application.made.all()
        told = {"type": "mcp-auth-proxy.oauth", "status": status, "flow": None, "server": made.id}
        assert [it["data"] for it in await heard(opener)] == [told]


async def test_an_image_on_a_foreign_page_begins_nothing(  # T70
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    async with popups(servers, tmp_path) as setup:
        html = f"<!doctype html><img src='{start(setup)}'><iframe src='{start(setup)}'></iframe>"
        async with website(html) as port:
            context = await browser.new_context()
            await sign_in(context, setup, "ben")
            page, _ = await watched(context)
            async with asyncio.timeout(20):
                await page.goto(f"http://127.0.0.1:{port}/", wait_until="networkidle")
        assert setup.upstream.requests == []
        assert setup.issuer.requests == []
        assert setup.api.proxy.application.made.all() == []
