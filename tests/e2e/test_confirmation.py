"""The page before the first redirect to a sign-in page on another site, or of an issuer known already (T78)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser, Form, Page, consent, decline
from fakes.proxy import link_in, proxy_process, running_proxy, write_config
from fakes.proxy_setup import ProxySetup, proxy_setup
from fakes.raw_client import RawClient
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.models import LOCAL, Account

NOTES = Account(LOCAL, "notes")


def move(issuer: FakeAuthorizationServer, host: str = "localhost") -> None:
    """Give a server another host; the MCP servers stay at 127.0.0.1."""
    issuer.issuer = issuer.issuer.replace("127.0.0.1", host)


@asynccontextmanager
async def foreign(servers: Servers, folder: Path, **options: Any) -> AsyncIterator[ProxySetup]:
    """The proxy before a server whose users sign in on another site."""
    async with proxy_setup(servers, folder, **options) as setup:
        move(setup.issuer)
        yield setup


def asks(page: httpx2.Response) -> bool:
    """Return whether a page asks for confirmation; otherwise it must be the redirect."""
    assert page.status_code in (200, 303), page.text
    if page.status_code == 303:
        return False
    assert "location" not in page.headers
    (form,) = Page(page.text).forms
    assert (form.method, form.action, list(form.fields), len(form.buttons)) == ("POST", "", ["token"], 1)
    return True


async def opens_with_page(link: str) -> bool:
    async with Browser() as browser:
        return asks(await browser.open(link))


async def forget(setup: ProxySetup) -> None:
    """Log out: the next request needs a new authorization."""
    await setup.proxy.application.broker.disconnect(NOTES)


async def test_a_page_says_who_sends_the_user_where_before_the_first_redirect(  # T78
    servers: Servers, tmp_path: Path
) -> None:
    async with foreign(servers, tmp_path, oauth={"scopes": ["read", "mail:send"]}) as setup, Browser() as browser:
        link = await setup.link()
        page = await browser.open(link)
        assert asks(page)
        upstream = setup.upstream.url.removesuffix("/mcp")
        for told in ("notes", upstream, setup.issuer.issuer, "read", "mail:send"):
            assert told in page.text
        assert setup.issuer.authorizations == 0
        assert (await browser.follow(link)).status_code == 200
        assert (await setup.ask("in")).text == "in"


async def test_the_log_names_server_and_sign_in_page_in_one_line(servers: Servers, tmp_path: Path) -> None:  # T78
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    move(issuer)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"})
    async with proxy_process(config) as proxy, proxy.client("notes") as client, Browser() as browser:
        link = link_in((await client.call("echo", text="x")).message)
        for _ in range(3):
            assert asks(await browser.open(link))
        assert await proxy.stop() == 0
    (line,) = [line for line in proxy.err.splitlines() if "needs your authorization" in line]
    assert f"server notes needs your authorization at {issuer.issuer}," in line


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
async def test_it_is_remembered_once_a_grant_came_of_it(  # T78
    servers: Servers, tmp_path: Path, restart: bool
) -> None:
    async with foreign(servers, tmp_path) as setup:
        await setup.connect()
        await forget(setup)
        if not restart:
            assert not await opens_with_page(await setup.link())
            await setup.connect()
    if restart:
        config = {"notes": setup.upstream.url}
        async with (
            running_proxy(tmp_path, dict(config), authorization={"wait": "0s"}) as proxy,
            proxy.client("notes") as client,
        ):
            assert not await opens_with_page(link_in((await client.call("echo", text="x")).message))


async def test_it_is_not_remembered_before(servers: Servers, tmp_path: Path) -> None:  # T78
    async with foreign(servers, tmp_path, issuer={"auto_consent": False}) as setup:
        link = await setup.link()
        async with Browser() as browser:
            page = await browser.open(link)
            form = Page(page.text).forms[0]
            assert (await browser.submit(link, form, form.buttons[0])).status_code == 303
        assert await opens_with_page(link)
        assert (await decline(link)).status_code == 400
        assert await opens_with_page(await setup.link())
        setup.issuer.answers["token"] = lambda _: None
        await setup.connect()
        await forget(setup)
        assert not await opens_with_page(await setup.link())


async def test_a_grant_that_came_without_the_page_is_no_confirmation(servers: Servers, tmp_path: Path) -> None:  # T78
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        await forget(setup)
        move_sign_in(setup.issuer, "localhost")
        assert await opens_with_page(await setup.link())


def move_sign_in(issuer: FakeAuthorizationServer, host: str) -> None:
    """Move only the page that users sign in at."""
    endpoint = f"{issuer.issuer}/authorize".replace("127.0.0.1", host)
    issuer.metadata_changes = {"authorization_endpoint": endpoint}


async def test_another_sign_in_host_is_asked_about_again(servers: Servers, tmp_path: Path) -> None:  # T78
    async with proxy_setup(servers, tmp_path) as setup:
        move_sign_in(setup.issuer, "localhost")
        await setup.connect()
        await forget(setup)
        assert not await opens_with_page(await setup.link())
        await forget(setup)
        move_sign_in(setup.issuer, "login.localhost")
        async with Browser() as browser:
            page = await browser.open(await setup.link())
            assert asks(page)
            assert "login.localhost" in page.text


async def test_another_server_of_the_same_name_is_asked_about_after_a_logout(  # T78
    servers: Servers, tmp_path: Path
) -> None:
    async with foreign(servers, tmp_path) as setup:
        await setup.connect()
        await forget(setup)
        assert not await opens_with_page(await setup.link())
        other = await servers.mcp_server(setup.issuer)
        running = setup.proxy.application
        running.apply(compare(running.settings, load(write_config(tmp_path, {"notes": other.url}))))
        async with Browser() as browser:
            page = await browser.open(await setup.link())
        assert asks(page)
        assert other.url.removesuffix("/mcp") in page.text


async def test_an_issuer_that_another_server_uses_already_is_asked_about(  # T78
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    config = {name: (await servers.mcp_server(issuer)).url for name in ("honest", "hostile")}
    async with running_proxy(tmp_path, dict(config), authorization={"wait": "0s"}) as proxy:
        honest, hostile = proxy.client("honest"), proxy.client("hostile")
        async with honest, hostile:
            first = link_in((await honest.call("echo", text="x")).message)
            second = link_in((await hostile.call("echo", text="x")).message)
            assert not await opens_with_page(second)
            assert (await consent(first)).status_code == 200
            # Also a link that was opened before: the grant came in between.
            assert await opens_with_page(second)
            assert issuer.token_requests() == 1
            assert (await consent(second)).status_code == 200
            assert (await hostile.call("echo", text="in")).text == "in"


FORGED: dict[str, tuple[str, dict[str, str]]] = {
    "without a token": ("", {}),
    "with another token": (f"token={'0' * 64}", {}),
    "of another site": ("OWN", {"origin": "https://evil.example"}),
    "of another port": ("OWN", {"origin": "http://127.0.0.1:1"}),
    "of nowhere": ("OWN", {"origin": "null"}),
    "cross-site": ("OWN", {"sec-fetch-site": "cross-site"}),
    "same-site": ("OWN", {"sec-fetch-site": "same-site"}),
    "without the cookie": ("OWN", {"cookie": ""}),
}


@pytest.mark.parametrize(("body", "headers"), FORGED.values(), ids=FORGED)
async def test_a_form_that_is_not_ours_leads_nowhere(  # T78
    servers: Servers, tmp_path: Path, body: str, headers: dict[str, str]
) -> None:
    async with foreign(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        page = await browser.open(link)
        cookie = page.headers["set-cookie"].partition(";")[0]
        (form,) = Page(page.text).forms
        body = body.replace("OWN", f"token={form.fields['token']}")
        fields = {"origin": setup.proxy.origin, "cookie": cookie, **headers}
        async with RawClient.to(setup.proxy.origin) as raw:
            target = link.removeprefix(setup.proxy.origin)
            lines = "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
            kind = "content-type: application/x-www-form-urlencoded"
            raw.send(f"POST {target} HTTP/1.1\nHost: HOST\n{kind}\ncontent-length: {len(body)}\n{lines}\n{body}")
            answer = await raw.answer()
        assert answer.status == 403
        assert not answer.all("location")
        assert not answer.all("set-cookie")
        # The attack changes nothing for the browser that was shown the page.
        assert (await browser.submit(link, form, form.buttons[0])).status_code == 303
        assert setup.issuer.token_requests() == 0


async def test_a_form_of_another_browser_or_flow_leads_nowhere(servers: Servers, tmp_path: Path) -> None:  # T78
    async with foreign(servers, tmp_path) as setup, Browser() as browser, Browser() as other:
        link = await setup.link()
        mine = Page((await browser.open(link)).text).forms[0]
        theirs = Page((await other.open(link)).text).forms[0]
        assert mine.fields != theirs.fields
        refused = await browser.submit(link, Form("", "POST", theirs.fields), None)
        assert (refused.status_code, "Open the link again" in refused.text) == (403, True)
        setup.clock.ahead += 700
        second = await setup.link()
        assert second != link
        assert (await browser.submit(second, mine, None)).status_code == 403
        # The old flow has expired.
        assert (await browser.submit(link, mine, None)).status_code == 410
        assert (await browser.follow(second)).status_code == 200
        assert (await browser.submit(second, mine, None)).status_code == 403
        assert (await setup.ask("in")).text == "in"


async def test_a_form_can_not_be_used_once_the_server_is_connected(servers: Servers, tmp_path: Path) -> None:  # T78
    async with foreign(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        form = Page((await browser.open(link)).text).forms[0]
        assert (await consent(link)).status_code == 200
        assert (await browser.submit(link, form, form.buttons[0])).status_code == 410


async def test_hostile_scopes_do_not_hide_what_is_asked_for(servers: Servers, tmp_path: Path) -> None:  # T78
    scopes = ["<b>bold</b>", "a" * 3000, *(f"s{number}" for number in range(2000))]
    async with foreign(servers, tmp_path, oauth={"scopes": scopes}) as setup, Browser() as browser:
        page = await browser.open(await setup.link())
        assert asks(page)
        assert "&lt;b&gt;bold" in page.text
        assert "more" in page.text
        assert len(page.text) < 8000


async def test_many_visits_do_not_slow_down_a_clean_server(servers: Servers, tmp_path: Path) -> None:  # T78
    clean = await servers.mcp_server(protected=False)
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    move(issuer)
    config = {"hostile": upstream.url, "clean": clean.url}
    async with (
        running_proxy(tmp_path, dict(config), authorization={"wait": "0s"}) as proxy,
        proxy.client("hostile") as hostile,
        proxy.client("clean") as client,
        Browser() as browser,
    ):
        link = link_in((await hostile.call("echo", text="x")).message)
        pages = asyncio.gather(*(browser.open(link) for _ in range(50)))
        async with asyncio.timeout(5):
            assert (await client.call("echo", text="here")).text == "here"
        assert all(asks(page) for page in await pages)
