"""Signing in with a real browser: forms, cookies over redirects from other sites, and what foreign pages can't do."""

from pathlib import Path

import pytest
from playwright.async_api import Browser

from e2e.test_dashboard import link_of, served
from e2e.test_openid_sign_in import openid_team
from fakes.chromium import ALLOW, EVIL, contrast, watched, website
from fakes.fixtures import Servers
from fakes.team import team

pytestmark = pytest.mark.chromium

CONNECTED = "**/oauth/connected/*"


@pytest.mark.parametrize("script", [True, False], ids=["with-script", "without-script"])
async def test_a_link_leads_over_the_sign_in_to_the_consent(
    servers: Servers, tmp_path: Path, browser: Browser, script: bool
) -> None:
    async with team(servers, tmp_path, "anna", "bert") as setup:
        setup.issuer.auto_consent = False
        link = await setup.link("anna")
        page, faults = await watched(await browser.new_context(java_script_enabled=script))
        await page.goto(link)
        await page.fill("input[name=key]", setup.keys["anna"])
        await page.click("text=Sign in with a key")
        await page.click(ALLOW)
        await page.wait_for_url(CONNECTED)
        assert await page.inner_text("h1") == "notes is connected"
        async with setup.client("anna") as client:
            assert (await client.call("echo", text="mine")).text == "mine"
        assert faults == []
        # T51: the same link in the browser of somebody else.
        other, _ = await watched(await browser.new_context())
        theirs = await setup.link("bert")
        await other.goto(theirs)
        await other.fill("input[name=key]", setup.keys["anna"])
        await other.click("text=Sign in with a key")
        assert other.url == theirs
        assert "You are signed in as anna" in await other.inner_text("main")
        # The page leads to the sign-in, and back.
        await other.click("main >> text=Sign in")
        await other.fill("input[name=key]", setup.keys["bert"])
        await other.click("text=Sign in with a key")
        await other.click(ALLOW)
        await other.wait_for_url(CONNECTED)


async def test_a_sign_in_at_an_identity_provider_comes_back_to_the_link(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    issuer = {"audience": "mcp"}
    async with openid_team(servers, tmp_path, mode="jwt", jwt=[issuer]) as (setup, provider):
        provider.asks = True
        token = provider.token("mcp")
        async with setup.proxy.client("notes", headers={"authorization": f"Bearer {token}"}) as client:
            text = (await client.call("echo", text="x")).text
        link = text[text.index(setup.proxy.origin) :].split()[0].rstrip(".")
        page, faults = await watched(await browser.new_context())
        await page.goto(link)
        await page.click(f"text=Sign in at {provider.issuer}")
        await page.click(ALLOW)
        await page.wait_for_url(CONNECTED)
        assert faults == []
        await page.goto(setup.proxy.origin)
        await page.click("text=Sign out")
        assert "/sign-in" in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_sign_in_page_can_be_read(servers: Servers, tmp_path: Path, browser: Browser, scheme: str) -> None:
    context = await browser.new_context(color_scheme=scheme, viewport={"width": 380, "height": 640})  # type: ignore[arg-type]
    async with openid_team(servers, tmp_path, "anna") as (setup, _):
        page, faults = await watched(context)
        await page.goto(f"{setup.proxy.origin}/sign-in?next=/notes/mcp")
        assert await contrast(page) >= 4.5
        assert faults == []
        await page.fill("input[name=key]", "wrong")
        await page.click("text=Sign in with a key")
        assert await page.inner_text("[role=alert]")
        assert await contrast(page) >= 4.5


async def test_a_foreign_page_can_neither_sign_in_nor_use_a_link(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:  # T54
    async with served(servers, tmp_path) as (proxy, config), website("<p>foreign</p>") as port:
        link = await link_of(config)
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(f"http://{EVIL}:{port}/")
        await page.evaluate(
            """async link => {
                const image = new Image();
                await new Promise(done => { image.onerror = image.onload = done; image.src = link; });
                await fetch(link, {mode: 'no-cors', credentials: 'include'}).catch(() => 0);
            }""",
            link,
        )
        assert await context.cookies() == []
        # A link on that page leads to a button; the session begins with a click.
        await page.evaluate("link => { location = link }", link)
        await page.wait_for_selector("text=Open the dashboard")
        assert await context.cookies() == []
        await page.click("main button")
        await page.wait_for_url(f"{proxy.origin}/")
        (cookie,) = await context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Lax", "/")


async def test_an_opened_link_is_at_the_front_page_at_once(servers: Servers, tmp_path: Path, browser: Browser) -> None:
    async with served(servers, tmp_path) as (proxy, config):
        context = await browser.new_context()
        page, faults = await watched(context)
        await page.goto(await link_of(config))
        assert page.url == f"{proxy.origin}/"
        assert len(await context.cookies()) == 1
        session = await context.new_cdp_session(page)
        history = await session.send("Page.getNavigationHistory")
        assert not any("link=" in entry["url"] for entry in history["entries"])
        assert faults == []
