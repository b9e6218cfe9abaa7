"""The pages in a real browser: a complete consent, attacks by other pages, and how the pages look."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page

from fakes.chromium import ALLOW, EVIL, contrast, watched, website
from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.proxy import RunningProxy, running_proxy, until

pytestmark = pytest.mark.chromium

CONNECTED = "**/oauth/connected/*"
CALL = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{"text":"stolen"}}}'


@asynccontextmanager
async def notes(servers: Servers, folder: Path, **sections: Any) -> AsyncIterator[tuple[RunningProxy, PlainClient]]:
    """A proxy before one protected server, and a client of it."""
    upstream = await servers.mcp_server(await servers.authorization_server())
    async with (
        running_proxy(folder, {"notes": upstream.url}, **{"authorization": {"wait": "20s"}, **sections}) as proxy,
        proxy.client("notes") as client,
    ):
        yield proxy, client


@pytest.mark.parametrize("script", [True, False], ids=["with-script", "without-script"])
async def test_consent_in_a_browser_ends_on_a_page_that_confirms_it(
    servers: Servers, tmp_path: Path, browser: Browser, script: bool
) -> None:
    async with notes(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="hello"))
        page, faults = await watched(await browser.new_context(java_script_enabled=script))
        await page.goto(await proxy.next_link())
        await page.click(ALLOW)
        await page.wait_for_url(CONNECTED)
        assert await page.inner_text("h1") == "notes is connected"
        assert "You can close this tab" in await page.inner_text("main")
        assert (await call).text == "hello"
    assert faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_pages_can_be_read_in_light_and_dark(
    servers: Servers, tmp_path: Path, browser: Browser, scheme: Any
) -> None:
    context = await browser.new_context(color_scheme=scheme, viewport={"width": 380, "height": 640})
    async with notes(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="hello"))
        page, faults = await watched(context)
        link = await proxy.next_link()
        for address, name in ((proxy.origin, "index"), (f"{proxy.origin}/connect/notes?flow=x", "refused")):
            await page.goto(address)
            await page.screenshot(path=tmp_path / f"{name}-{scheme}.png")
            assert await contrast(page) >= 4.5
        faults.clear()  # the browser reports the 404, as it should
        await page.goto(link)
        await page.click(ALLOW)
        await page.wait_for_url(CONNECTED)
        await page.screenshot(path=tmp_path / f"connected-{scheme}.png")
        assert await contrast(page) >= 4.5
        await call
    assert faults == []


async def test_the_last_page_is_at_a_clean_address_and_can_be_loaded_again(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    async with notes(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="x"))
        page, faults = await watched(await browser.new_context())
        link = await proxy.next_link()
        await page.goto(link)
        callbacks: list[str] = []
        page.on("request", lambda request: callbacks.append(request.url) if "code=" in request.url else None)
        await page.click(ALLOW)
        await page.wait_for_url(CONNECTED)
        await call
        assert page.url == f"{proxy.origin}/oauth/connected/notes"
        (callback,) = callbacks
        for _ in range(2):
            response = await page.reload()
            assert response is not None
            assert response.status == 200
            assert await page.inner_text("h1") == "notes is connected"
        # Nothing in the history has the code either.
        session = await page.context.new_cdp_session(page)
        history = await session.send("Page.getNavigationHistory")
        ours = {entry["url"] for entry in history["entries"] if entry["url"].startswith(proxy.origin)}
        assert ours == {page.url}
        response = await page.goto(link)
        assert response is not None
        assert (response.status, await page.inner_text("h1")) == (200, "notes is connected")
        assert faults == []
        response = await page.goto(callback)
        assert response is not None
        assert response.status == 400  # T12
        assert "finished already" in await page.inner_text("main")
        assert (await client.call("echo", text="still")).text == "still"


async def test_every_page_has_a_title_an_icon_and_a_link_to_the_front_page(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    async with notes(servers, tmp_path) as (proxy, _):
        page, faults = await watched(await browser.new_context())
        titles = set()
        for path in ("/", "/notes/mcp", "/mcp", "/nowhere", "/connect/notes?flow=x", "/oauth/callback?state=x"):
            await page.goto(f"{proxy.origin}{path}")
            titles.add(await page.title())
            assert await page.evaluate("""async () => {
                const icon = new Image();
                icon.src = document.querySelector('link[rel=icon]').href;
                await icon.decode();
                return icon.width;
            }""")
            await page.click("footer a")
            await page.wait_for_load_state()
            assert page.url == f"{proxy.origin}/"
        assert all(title.endswith(" · mcp-auth-proxy") for title in titles)
        assert len(titles) == 5
    # The browser reports the pages that are errors, as it should, and nothing that the policy forbids.
    assert [fault for fault in faults if "the server responded with a status of 4" not in fault] == []


async def test_an_address_opened_in_a_browser_has_a_button_that_authorizes(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, proxy.client("notes") as client:
        page, faults = await watched(await browser.new_context())
        for button, count in (("Authorize", 1), ("Authorize again", 2)):
            for path in ("mcp", "notes/mcp"):
                before = len(upstream.requests)
                await page.goto(f"{proxy.origin}/{path}")
                assert f"{proxy.origin}/notes/mcp" in await page.inner_text("main")
                assert await page.inner_text("button") == button
                assert len(upstream.requests) == before
            await page.click("button")
            await page.click(ALLOW)
            await page.wait_for_url(CONNECTED)
            assert (await client.call("echo", text="in")).text == "in"
            assert issuer.token_requests("authorization_code") == count
    assert faults == []


async def test_declining_in_a_browser_is_shown_in_plain_words(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    async with notes(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="x"))
        page = await browser.new_page()
        await page.goto(await proxy.next_link())
        await page.click("button[value=deny]")
        await page.wait_for_url("**/oauth/callback?**")
        assert await page.inner_text("h1") == "Not authorized"
        assert "You can close this tab" in await page.inner_text("main")
        assert "access_denied" in (await call).error["message"]


async def test_two_flows_at_once_in_one_browser_do_not_affect_each_other(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:
    upstreams = [await servers.mcp_server(await servers.authorization_server()) for _ in range(2)]
    config = {f"s{n}": upstream.url for n, upstream in enumerate(upstreams)}
    async with running_proxy(tmp_path, dict(config), authorization={"wait": "20s"}) as proxy:
        clients = [proxy.client(name) for name in config]
        calls = [asyncio.create_task(client.call("echo", text=client.url)) for client in clients]
        await proxy.next_link(2)
        context = await browser.new_context()
        # The first link in two tabs: the older one must still be good.
        pages = [await context.new_page() for _ in range(3)]
        for page, link in zip(pages, [proxy.links[0], *proxy.links], strict=True):
            await page.goto(link)
        for page in (pages[2], pages[0]):
            await page.click(ALLOW)
            await page.wait_for_url(CONNECTED)
            assert "is connected" in await page.inner_text("h1")
        assert [(await call).text for call in calls] == [client.url for client in clients]
        for client in clients:
            await client.http.aclose()


async def test_no_other_page_can_frame_ours(servers: Servers, tmp_path: Path, browser: Browser) -> None:  # T17
    async with notes(servers, tmp_path) as (proxy, client):
        call = asyncio.create_task(client.call("echo", text="x"))
        link = await proxy.next_link()
        frames = "".join(f'<iframe src="{url}"></iframe>' for url in (proxy.origin, f"{proxy.origin}/oauth/callback"))
        async with website(frames) as port:
            page, faults = await watched(await browser.new_context())
            await page.goto(f"http://{EVIL}:{port}/")
            await until(lambda: len([fault for fault in faults if "frame-ancestors" in fault]) == 2, str(faults))
            for frame in page.frames[1:]:
                assert "mcp-auth-proxy" not in await frame.content()
        await page.goto(link)
        await page.click(ALLOW)
        await call


@pytest.mark.parametrize("host", [EVIL, "127.0.0.1"])
async def test_a_foreign_page_can_neither_read_nor_make_the_proxy_do_anything(
    servers: Servers, tmp_path: Path, browser: Browser, host: str
) -> None:  # T41, T42
    upstream = await servers.mcp_server(protected=False, response_headers=(("access-control-allow-origin", "*"),))
    async with running_proxy(tmp_path, {"notes": upstream.url}) as proxy, website("<p>foreign</p>") as port:
        page = await browser.new_page()
        await page.goto(f"http://{host}:{port}/")
        heard = await page.evaluate(
            """async ([origin, call]) => {
                const heard = [];
                const ask = async (path, options) => {
                    try { heard.push([path, await (await fetch(origin + path, options)).text()]); } catch (error) {}
                };
                for (const path of ['/', '/notes/mcp', '/mcp', '/api/v1/servers', '/oauth/callback', '/readyz']) {
                    await ask(path, {});
                    await ask(path, {credentials: 'include'});
                    await ask(path, {method: 'POST', body: call});
                    await ask(path, {method: 'POST', body: call, headers: {'content-type': 'application/json'}});
                    await ask(path, {method: 'DELETE'});
                    await fetch(origin + path, {method: 'POST', body: call, mode: 'no-cors'}).catch(() => 0);
                    await fetch(origin + path, {mode: 'no-cors'}).catch(() => 0);
                }
                return heard;
            }""",
            [proxy.origin, CALL],
        )
        assert heard == []
        for path in ("/notes/mcp", "/", "/oauth/callback", "/api/v1/servers"):
            status = await post_form(page, f"{proxy.origin}{path}")
            assert status == 403, path
            await page.goto(f"http://{host}:{port}/")
        assert upstream.requests == []
        async with proxy.client("notes") as client:
            assert (await client.call("echo", text="mine")).text == "mine"


async def post_form(page: Page, target: str) -> int:
    """Send a form whose text is a JSON-RPC request, as a page can without asking anybody."""
    head, _, tail = CALL.partition('"text":"')
    async with page.expect_navigation() as navigation:
        await page.evaluate(
            """([target, name, value]) => {
                const form = Object.assign(document.createElement('form'), {method: 'post', action: target});
                form.enctype = 'text/plain';
                form.append(Object.assign(document.createElement('input'), {name, value}));
                document.body.append(form);
                form.submit();
            }""",
            [target, f'{head}"text":"', tail],
        )
    response = await navigation.value
    assert response is not None
    return response.status


async def test_an_opener_learns_nothing_about_the_authorization(
    servers: Servers, tmp_path: Path, browser: Browser
) -> None:  # T16
    async with notes(servers, tmp_path) as (proxy, client), website("<p>opener</p>") as port:
        call = asyncio.create_task(client.call("echo", text="x"))
        context = await browser.new_context()
        opener = await context.new_page()
        await opener.goto(f"http://{EVIL}:{port}/")
        await opener.evaluate("heard = []; addEventListener('message', event => heard.push(String(event.data)))")
        link = await proxy.next_link()
        async with context.expect_page() as opening:
            await opener.evaluate("link => { popup = window.open(link) }", link)
        popup = await opening.value
        await popup.click(ALLOW)
        await popup.wait_for_url(CONNECTED)
        assert (await call).text == "x"
        assert await popup.evaluate("window.opener") is None
        assert await opener.evaluate("heard") == []
