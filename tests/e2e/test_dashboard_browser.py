"""The dashboard in a real browser: connect, deny, expire, disconnect, and how it can be used.

All tests share one browser and one proxy; each begins with nothing connected.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Locator, Page, expect

from fakes.authorization_server import AUTO, FakeAuthorizationServer
from fakes.chromium import ALLOW, chromium, watched
from fakes.fixtures import Servers
from fakes.headless import Browser as HeadlessBrowser
from fakes.http_exchange import FakeResponse
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import RunningProxy, running_proxy
from fakes.proxy_setup import Clock
from fakes.team import post
from mcp_auth_proxy.cli.demo_servers.authorization_server import PAGE_HEADERS
from mcp_auth_proxy.identity.sessions import new_link
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store.sessions import Sessions

pytestmark = [pytest.mark.chromium, pytest.mark.asyncio(loop_scope="module")]

AXE = Path(__file__).parent / "axe/node_modules/axe-core/axe.min.js"
CONNECTED = "**/oauth/connected/*"
SET_STATES = """states => {
    document.querySelectorAll('[data-server]').forEach((card, number) => { card.dataset.state = states[number]; });
}"""


@dataclass(kw_only=True)
class Scene:
    """A proxy with the servers ``linear`` and ``notion``, each with an authorization server of its own."""

    browser: Browser
    proxy: RunningProxy
    clock: Clock
    issuers: dict[str, FakeAuthorizationServer]
    upstreams: dict[str, FakeMcpServer]

    async def reset(self) -> None:
        self.clock.ahead = 0
        for name, issuer in self.issuers.items():
            issuer.configure(authorize_error=None, iss=AUTO, auto_consent=False, answers={}, token_changes={})
            self.upstreams[name].log.requests.clear()
            await self.proxy.application.broker.disconnect(Account(LOCAL, name), forget_client=True)

    async def link(self) -> str:
        """Return the link that ``mcp-auth-proxy dashboard`` prints."""
        api = self.proxy.application.site.api
        assert api is not None
        return f"{self.proxy.origin}/sign-in?link={await new_link(Sessions(api.context.database), now=self.clock())}"

    async def context(self, **options: Any) -> BrowserContext:
        return await self.browser.new_context(**options)

    async def open(self, context: BrowserContext | None = None, *, session: bool = True) -> tuple[Page, list[str]]:
        """Open the dashboard; return the page, and what goes wrong on it."""
        page, faults = await watched(context or await self.context())
        await page.goto(await self.link() if session else self.proxy.origin)
        assert page.url == f"{self.proxy.origin}/"
        return page, faults

    async def connect(self, *names: str) -> None:
        """Connect servers without a browser."""
        for name in names or self.issuers:
            self.issuers[name].auto_consent = True
            async with HeadlessBrowser() as browser:
                begun = await post(browser, f"{self.proxy.origin}/connect/{name}/start")
                assert (await browser.follow(begun.headers["location"])).status_code == 200
            self.issuers[name].auto_consent = False


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    clock = Clock()
    async with chromium() as browser, AsyncExitStack() as stack:
        servers = Servers(stack)
        issuers = {name: await servers.authorization_server() for name in ("linear", "notion")}
        upstreams = {name: await servers.mcp_server(issuer) for name, issuer in issuers.items()}
        config = {name: upstream.url for name, upstream in upstreams.items()}
        folder = tmp_path_factory.mktemp("dashboard")
        async with running_proxy(folder, dict(config), clock=clock, authorization={"wait": "0s"}) as proxy:
            yield Scene(browser=browser, proxy=proxy, clock=clock, issuers=issuers, upstreams=upstreams)


@pytest_asyncio.fixture(loop_scope="module")
async def scene(shared: Scene) -> AsyncIterator[Scene]:
    await shared.reset()
    yield shared
    for context in shared.browser.contexts:
        await context.close()


def card(page: Page, name: str) -> Locator:
    return page.locator(f'[data-server="{name}"]')


async def press(page: Page, name: str) -> None:
    await page.get_by_role("button", name=name, exact=True).click()


async def popup_of(page: Page, name: str) -> Page:
    """Press a button; return the popup that it opens."""
    async with page.expect_popup() as opened:
        await press(page, name)
    return await opened.value


async def becomes(page: Page, name: str, state: str) -> None:
    await expect(card(page, name)).to_have_attribute("data-state", state)


def only_the_stream(faults: list[str]) -> bool:
    """Whether nothing went wrong but that a page was left while its stream was open."""
    return all("/static/live" in fault for fault in faults)


@pytest.mark.parametrize("opener_policy", ["unsafe-none", "same-origin"])
async def test_connecting_in_a_popup_is_seen_at_once_and_the_popup_closes_itself(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, opener_policy: str
) -> None:
    """Also if the authorization server severs the popup from its opener."""
    monkeypatch.setitem(PAGE_HEADERS, "cross-origin-opener-policy", opener_policy)
    scene.issuers["linear"].token_changes = {"workspace": {"name": "<Acme>"}}
    page, faults = await scene.open(session=False)
    await becomes(page, "linear", "needs-consent")
    await page.evaluate("window.mark = 1")
    popup = await popup_of(page, "Connect linear")
    await becomes(page, "linear", "authorizing")
    await popup.click(ALLOW)
    async with popup.expect_event("close"):
        await popup.wait_for_selector("text=You are connected as workspace <Acme>")
        await becomes(page, "linear", "connected")
    await expect(page.locator("[data-announce]")).to_have_text("linear: connected")
    await expect(card(page, "linear")).to_contain_text("default · workspace <Acme>")
    await expect(page.locator("[data-events] li").first).to_contain_text("linear connected")
    assert await page.evaluate("window.mark") == 1
    await becomes(page, "notion", "needs-consent")
    assert only_the_stream(faults), faults


async def test_two_servers_at_once(scene: Scene) -> None:
    page, _ = await scene.open()
    popups = {name: await popup_of(page, f"Connect {name}") for name in scene.issuers}
    for name in ("notion", "linear"):
        await popups[name].click(ALLOW)
        await becomes(page, name, "connected")


@pytest.mark.parametrize("script", [True, False], ids=["popup-blocked", "without-script"])
async def test_without_a_popup_it_works_in_the_same_tab(scene: Scene, script: bool) -> None:
    context = await scene.context(java_script_enabled=script)
    await context.add_init_script("window.open = () => null")
    page, faults = await scene.open(context)
    await press(page, "Connect linear")
    await page.click(ALLOW)
    await page.wait_for_url(CONNECTED)
    await page.click("footer a")
    await becomes(page, "linear", "connected")
    await press(page, "Disconnect linear")
    assert page.url == f"{scene.proxy.origin}/"
    await becomes(page, "linear", "needs-consent")
    assert scene.issuers["linear"].revocations
    assert not await page.get_by_role("button", name="Disconnect linear").count()
    assert only_the_stream(faults), faults


async def test_whoever_declines_is_offered_a_new_start(scene: Scene) -> None:
    page, _ = await scene.open(session=False)
    popup = await popup_of(page, "Connect linear")
    await popup.click("button[value=deny]")
    await popup.wait_for_selector("text=Not authorized")
    await becomes(page, "linear", "needs-consent")
    await expect(card(page, "linear")).to_contain_text("Last error")
    await expect(card(page, "linear")).to_contain_text("What helps")
    await press(popup, "Connect linear again")
    await popup.click(ALLOW)
    await becomes(page, "linear", "connected")
    await expect(card(page, "linear")).not_to_contain_text("Last error")


@pytest.mark.parametrize(
    ("fault", "title"),
    [
        ({"authorize_error": ("server_error", "<img src=x onerror=alert(1)>")}, "Not authorized"),
        ({"iss": "https://evil.example"}, "This authorization was not accepted"),
        ({"answers": {"token": FakeResponse(status=500, body=b"<b>down</b>")}}, "The authorization failed"),
    ],
    ids=["error", "iss", "token-endpoint"],
)
async def test_what_the_authorization_server_does_wrong_is_told_in_words(
    scene: Scene, fault: dict[str, Any], title: str
) -> None:
    scene.issuers["linear"].configure(auto_consent=True, **fault)
    page, _ = await scene.open(await scene.context(java_script_enabled=False), session=False)
    await press(page, "Connect linear")
    await page.wait_for_url("**/oauth/callback?**")
    assert await page.inner_text("h1") == title
    assert await page.locator("main img, main b").count() == 0
    scene.issuers["linear"].configure(authorize_error=None, iss=AUTO, answers={})
    await press(page, "Connect linear again")
    await page.wait_for_url(CONNECTED)


@pytest.mark.parametrize("link", ["expired", "used", "unknown"])
async def test_a_link_that_can_not_be_used_leads_to_a_new_one(scene: Scene, link: str) -> None:
    async with scene.proxy.client("linear") as client:
        answer = await client.call("echo", text="x")
    await scene.proxy.next_link(1)
    address = scene.proxy.links[-1]
    assert address in str(answer.message)
    if link == "expired":
        scene.clock.ahead += 700
    elif link == "used":
        await scene.connect("linear")
        await scene.proxy.application.broker.disconnect(Account(LOCAL, "linear"))
    else:
        address = f"{scene.proxy.origin}/connect/linear?flow=nothing"
    scene.issuers["linear"].auto_consent = True
    page = await (await scene.context()).new_page()
    response = await page.goto(address)
    assert response is not None
    assert response.status in (404, 410)
    assert await page.inner_text("h1") == "This link can't be used"
    await press(page, "Connect linear again")
    await page.wait_for_url(CONNECTED)


async def test_a_callback_in_another_browser_leads_to_a_new_start(scene: Scene) -> None:
    page, _ = await scene.open(session=False)
    popup = await popup_of(page, "Connect linear")
    await popup.wait_for_selector(ALLOW)
    state = parse_qs(urlsplit(popup.url).query)["state"][0]
    other = await (await scene.context()).new_page()
    response = await other.goto(f"{scene.proxy.origin}/oauth/callback?code=c&state={state}")
    assert response is not None
    assert response.status == 403
    scene.issuers["linear"].auto_consent = True
    await press(other, "Connect linear again")
    await other.wait_for_url(CONNECTED)


async def test_only_the_session_of_the_dashboard_command_may_disconnect(scene: Scene) -> None:
    await scene.connect("linear")
    page, _ = await scene.open(session=False)
    assert await page.get_by_role("button", name="Disconnect").count() == 0
    assert await page.get_by_role("button", name="Forget client").count() == 0
    assert "mcp-auth-proxy dashboard" in await page.inner_text("main")
    for action in ("disconnect", "forget"):
        status = await page.evaluate(
            "async path => (await fetch(path, {method: 'POST'}).catch(() => ({status: 0}))).status",
            f"/connect/linear/{action}",
        )
        assert status == 403
    await becomes(page, "linear", "connected")
    admin, _ = await scene.open(await scene.context())
    status = await admin.evaluate("async () => (await fetch('/connect/linear/disconnect', {method: 'POST'})).status")
    assert status == 403  # without the token of the form
    before = scene.issuers["linear"].registrations
    await press(admin, "Forget client linear")
    await becomes(admin, "linear", "needs-consent")
    await becomes(page, "linear", "needs-consent")
    await expect(admin.locator("[data-events] li", has_text="forgot the client").first).to_contain_text("linear")
    await scene.connect("linear")
    assert scene.issuers["linear"].registrations == before + 1


async def test_reconnecting_keeps_the_connection_until_it_is_replaced(scene: Scene) -> None:
    await scene.connect("linear")
    page, _ = await scene.open()
    popup = await popup_of(page, "Reconnect linear")
    await popup.wait_for_selector(ALLOW)
    await becomes(page, "linear", "connected")
    before = scene.issuers["linear"].token_requests("authorization_code")
    await popup.click(ALLOW)
    await popup.wait_for_url("**/oauth/connected/**")
    assert scene.issuers["linear"].token_requests("authorization_code") == before + 1


async def test_it_can_be_used_with_the_keyboard_alone(scene: Scene) -> None:
    page, _ = await scene.open()
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to the content"
    await page.keyboard.press("Enter")
    for _ in range(12):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement.textContent") == "Connect linear":
            break
    ring = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    async with page.expect_popup() as opened:
        await page.keyboard.press("Enter")
    popup = await opened.value
    await popup.wait_for_selector(ALLOW)
    await popup.locator(ALLOW).focus()
    await popup.keyboard.press("Enter")
    await becomes(page, "linear", "connected")
    # The card has other buttons now; the focus is still in it.
    assert await page.evaluate("document.activeElement.closest('[data-server]').dataset.server") == "linear"


async def test_an_address_is_copied_with_one_click_and_can_be_selected_without(scene: Scene) -> None:
    context = await scene.context(permissions=["clipboard-read", "clipboard-write"])
    page, _ = await scene.open(context)
    await press(page, "Copy address of linear")
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert copied == f"{scene.proxy.origin}/linear/mcp"
    await page.click("text=Use linear in your client")
    for client in ("Claude Code", "Claude Desktop", "Cursor", "VS Code", "Codex", "Gemini CLI"):
        await press(page, f"Copy {client} setup of linear")
        await expect(page.locator("[data-announce]")).to_have_text("Copied")
        copied = await page.evaluate("navigator.clipboard.readText()")
        assert f"{scene.proxy.origin}/linear/mcp" in copied, client
    plain, _ = await scene.open(await scene.context(java_script_enabled=False))
    assert await plain.get_by_role("button", name="Copy").count() == 0
    assert await plain.locator("[data-copy-text]").first.evaluate("node => getComputedStyle(node).userSelect") == "all"


async def axe(page: Page) -> list[str]:
    """Return what the rules find, below what the page's own policy would let a script in."""
    await page.evaluate(AXE.read_text())
    found = await page.evaluate(
        """async () => (await axe.run(document)).violations.map(
            fault => `${fault.id}: ${fault.nodes.map(node => node.html + ' ' + node.failureSummary).join(' | ')}`)"""
    )
    return list(found)


@pytest.mark.axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_accessibility_rules_find_nothing_and_it_fits_a_narrow_window(scene: Scene, scheme: Any) -> None:
    await scene.connect("linear")
    scene.proxy.application.broker.outages.note_unreachable("notion", "It is down.")
    context = await scene.context(color_scheme=scheme)
    page, _ = await scene.open(context)
    await becomes(page, "notion", "unreachable")
    await page.click("text=Use linear in your client")
    states = ["needs-consent", "authorizing", "retrying", "degraded", "expired", "ended", "unreachable", "connected"]
    for pair in zip(states[::2], states[1::2], strict=True):
        await page.evaluate(SET_STATES, pair)
        assert await axe(page) == [], pair
    for width in (1280, 320):
        await page.set_viewport_size({"width": width, "height": 800})
        assert await axe(page) == []
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    scene.proxy.application.broker.outages.forget("notion")
    for path in ("/connect/linear?flow=x", "/linear/mcp", "/sign-in", "/oauth/connected/linear"):
        await page.goto(f"{scene.proxy.origin}{path}")
        assert await axe(page) == [], path
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


async def test_a_page_that_is_open_while_its_session_ends_loses_its_rights(scene: Scene) -> None:
    await scene.connect("linear")
    context = await scene.context()
    page, _ = await scene.open(context)
    await page.wait_for_selector("[data-live]:not([hidden])")
    other = await context.new_page()
    await other.goto(scene.proxy.origin)
    await press(other, "Sign out")
    await expect(page.get_by_role("button", name="Disconnect linear")).to_have_count(0)
    await becomes(page, "linear", "connected")
