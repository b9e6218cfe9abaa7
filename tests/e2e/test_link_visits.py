"""Who opens a link (T89): the browser that the proxy has opened goes on directly, others see a page first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from e2e.test_announcing import BrowserScript, configured
from e2e.test_login import free_port, login
from fakes.fixtures import Servers
from fakes.headless import Browser, Page, consent
from fakes.proxy import link_in, proxy_process, until, write_config
from fakes.proxy_setup import ProxySetup, proxy_setup
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.store.flows import KEPT_ATTEMPTS


def is_page(page: httpx2.Response) -> bool:
    """Return whether it is the page that asks first; otherwise it must be the redirect."""
    assert page.status_code in (200, 303), page.text
    assert ('<form method="post">' in page.text) == (page.status_code == 200)
    return page.status_code == 200


async def visits(browser: Browser, link: str, count: int) -> list[bool]:
    """Open a link ``count`` times, each time as a browser without cookies; return which visits were shown the page."""
    shown = []
    for _ in range(count):
        shown.append(is_page(await browser.open(link)))
        browser.client.cookies.clear()
    return shown


async def press(browser: Browser, link: str, count: int) -> None:
    """Open a link ``count`` times, and continue each time, as browsers without cookies."""
    for _ in range(count):
        form = Page((await browser.open(link)).text).forms[0]
        assert (await browser.submit(link, form, form.buttons[0])).status_code == 303
        browser.client.cookies.clear()


def opened(setup: ProxySetup) -> None:
    """Tell the proxy that the link is opened in a browser now, as the announcer does."""
    pending = setup.proxy.application.broker.pending(Account(LOCAL, "notes"))
    assert pending is not None
    setup.proxy.application.broker.link_opened(pending.flow)


@asynccontextmanager
async def opening(servers: Servers, folder: Path, choice: str = "always") -> AsyncIterator[tuple[ProxySetup, str]]:
    """A proxy that may open browsers, and the link of a flow."""
    async with proxy_setup(servers, folder, authorization={"wait": "0s", "open_browser": choice}) as setup:
        yield setup, await setup.link()


@pytest.mark.parametrize("choice", ["auto", "always"])
async def test_only_the_first_visit_after_the_browser_was_opened_goes_on(  # T89
    servers: Servers, tmp_path: Path, choice: str
) -> None:
    script = BrowserScript(tmp_path)
    config = await configured(servers, tmp_path, wait="0s", open_browser=choice)
    async with (
        proxy_process(config, env=script.env) as proxy,
        proxy.client("notes") as client,
        Browser() as owner,
        Browser() as other,
    ):
        link = link_in((await client.call("echo", text="x")).message)
        await until(lambda: script.calls == [link])
        callback = await owner.stop_before(link)
        assert owner.hops[1].split("?")[0].endswith("/authorize")
        assert await visits(other, link, 3) == [True] * 3
        assert (await owner.follow(callback)).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"
        assert await proxy.stop() == 0


async def test_a_link_that_was_not_opened_shows_the_page(servers: Servers, tmp_path: Path) -> None:  # T89
    """With ``auto`` on a machine without a desktop, for example."""
    async with opening(servers, tmp_path, "auto") as (setup, link), Browser() as browser:
        assert await visits(browser, link, 3) == [True] * 3
        assert setup.issuer.authorizations == 0
        assert (await browser.follow(link)).status_code == 200
        assert (await setup.ask("in")).text == "in"


@pytest.mark.parametrize(("late", "shown"), [(4.0, False), (6.0, True)])
async def test_a_late_first_visit_shows_the_page(  # T89
    servers: Servers, tmp_path: Path, late: float, shown: bool
) -> None:
    async with opening(servers, tmp_path) as (setup, link), Browser() as browser:
        opened(setup)
        setup.clock.ahead += late
        assert await visits(browser, link, 2) == [shown, True]


async def test_a_visit_under_another_loopback_name_is_still_the_first(servers: Servers, tmp_path: Path) -> None:  # T89
    async with opening(servers, tmp_path) as (setup, link), Browser() as browser:
        opened(setup)
        assert (await browser.follow(link.replace("127.0.0.1", "localhost"))).status_code == 200
        assert [hop for hop in browser.hops if "/connect/" in hop][1:] == [f"{link}&redirected=1"]


async def test_the_page_is_shown_even_if_the_sign_in_page_is_remembered(
    servers: Servers, tmp_path: Path
) -> None:  # T89
    async with opening(servers, tmp_path) as (setup, link), Browser() as browser:
        assert (await consent(link)).status_code == 200
        await setup.proxy.application.broker.disconnect(Account(LOCAL, "notes"))
        assert await visits(browser, await setup.link(), 2) == [True] * 2


async def test_the_first_visit_is_asked_too_if_it_leads_to_another_site(  # T78, T89
    servers: Servers, tmp_path: Path
) -> None:
    async with proxy_setup(servers, tmp_path, authorization={"wait": "0s", "open_browser": "always"}) as setup:
        setup.issuer.issuer = setup.issuer.issuer.replace("127.0.0.1", "localhost")
        link = await setup.link()
        opened(setup)
        async with Browser() as browser:
            assert await visits(browser, link, 2) == [True] * 2


@pytest.mark.parametrize("running", [True, False], ids=["proxy runs", "alone"])
async def test_a_browser_that_login_opens_goes_on_directly(  # T89
    servers: Servers, tmp_path: Path, running: bool
) -> None:
    script = BrowserScript(tmp_path)
    env = {name: value or "" for name, value in script.env.items()}
    upstream = await servers.mcp_server(await servers.authorization_server())
    listen = f"127.0.0.1:{free_port()}"
    choice = {"wait": "0s", "open_browser": "always"}
    config = write_config(tmp_path, {"notes": upstream.url}, listen=listen, authorization=choice)
    async with AsyncExitStack() as stack:
        if running:
            await stack.enter_async_context(proxy_process(config, listen=listen))
        setup = await stack.enter_async_context(login("notes", config, **env))
        browser = await stack.enter_async_context(Browser())
        link = await setup.link()
        await until(lambda: script.calls == [link])
        assert await visits(browser, link, 3) == [False, True, True]


@pytest.mark.parametrize("order", ["owner first", "others first", "others before and after"])
@pytest.mark.parametrize("choice", ["always", "never"])
async def test_many_visits_by_others_do_not_end_the_owner_s(  # T89
    servers: Servers, tmp_path: Path, order: str, choice: str
) -> None:
    async with opening(servers, tmp_path, choice) as (setup, link), Browser() as owner, Browser() as others:
        act = press if choice == "always" else visits
        opened(setup)
        if order != "owner first":
            await visits(others, link, 1)
            await act(others, link, 20 if order == "others first" else 200)
        callback = await owner.stop_before(link)
        if order != "others first":
            await act(others, link, 200)
        assert (await owner.follow(callback)).status_code == 200
        assert (await setup.ask("in")).text == "in"


async def test_attempts_stay_bounded(servers: Servers, tmp_path: Path) -> None:  # T89
    async with opening(servers, tmp_path, "never") as (setup, link), Browser() as others:
        # The second visit registers again, with a flow of its own.
        await visits(others, link, 2)
        await asyncio.gather(*(others.open(link) for _ in range(KEPT_ATTEMPTS + 20)))
        database = setup.proxy.application.broker._database
        rows = await database.fetch_all("SELECT count(*) AS kept FROM attempts GROUP BY flow_id ORDER BY kept", {})
        assert [row["kept"] for row in rows] == [1, KEPT_ATTEMPTS]
        assert setup.issuer.registrations == 2
        async with asyncio.timeout(5):
            assert (await consent(link)).status_code == 200


async def test_the_choice_can_change_while_a_link_is_open(servers: Servers, tmp_path: Path) -> None:  # T89
    async with opening(servers, tmp_path, "never") as (setup, link), Browser() as browser:
        assert await visits(browser, link, 2) == [False] * 2
        setup.proxy.application.broker.set_opens_links(True)
        assert await visits(browser, link, 2) == [True] * 2
