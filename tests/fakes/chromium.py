"""A real Chromium, and foreign web pages on this machine."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, BrowserContext, Page, async_playwright
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp

from mcp_auth_proxy.cli.demo_servers.local_server import serve

EVIL = "evil.example"
"""A name that the browser resolves to this machine."""

ALLOW = "button[value=allow]"
"""The button of the fake authorization server with which a user consents."""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(found for name in names if (found := shutil.which(name)))
    arguments = ["--disable-gpu", "--disable-dev-shm-usage", f"--host-resolver-rules=MAP {EVIL} 127.0.0.1"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, chromium_sandbox=False, args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


async def watched(context: BrowserContext) -> tuple[Page, list[str]]:
    """A page, and what goes wrong on it: script errors, refused loads, violations of the policy."""
    page = await context.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"{request.url}: {request.failure}"))
    return page, faults


async def contrast(page: Page) -> float:
    """The least contrast of a text to its background on the page (WCAG 2.2 §1.4.3), and nothing wider than it."""
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return float(
        await page.evaluate("""() => {
            const light = text => {
                const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(value => value / 255)
                    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            return Math.min(...[...document.querySelectorAll('h1, p, td, th, footer')].map(element => {
                const ink = light(getComputedStyle(element).color);
                return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            }));
        }""")
    )


@asynccontextmanager
async def website(html: str) -> AsyncIterator[str]:
    """A foreign page on this machine; yields its port."""

    def make(origin: str) -> ASGIApp:
        return HTMLResponse(html)

    async with serve(make) as local:
        yield local.origin.rpartition(":")[2]
