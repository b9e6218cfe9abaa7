"""An MCP address in a browser: what goes to the server, and who may press the button."""

from pathlib import Path

import pytest

from e2e.test_announcing import BrowserScript, configured
from fakes.fixtures import Servers
from fakes.headless import Browser, Page
from fakes.proxy import proxy_process
from fakes.proxy_setup import ProxySetup, proxy_setup

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


async def get(setup: ProxySetup, accept: str, **headers: str) -> int:
    """Send a GET to the address; return the status."""
    names = {"accept": accept} | {name.replace("_", "-"): value for name, value in headers.items()}
    async with setup.client.http.stream("GET", setup.client.url, headers=names) as answer:
        return answer.status_code


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (BROWSER, True),
        ("TEXT/HTML", True),
        ("text/event-stream", False),
        ("application/json, text/event-stream", False),
        ("text/html, text/event-stream", False),
        ("*/*", False),
    ],
)
async def test_only_a_browser_gets_the_page(servers: Servers, tmp_path: Path, accept: str, page: bool) -> None:
    async with proxy_setup(servers, tmp_path, upstream={"protected": False}) as setup:
        # 405 is the server's own answer.
        assert await get(setup, accept) == (200 if page else 405)
        assert len(setup.upstream.requests) == (not page)


async def test_a_link_of_another_site_may_lead_to_the_page_but_not_to_the_server(
    servers: Servers, tmp_path: Path
) -> None:  # T41
    async with proxy_setup(servers, tmp_path, upstream={"protected": False}) as setup:
        assert await get(setup, BROWSER, sec_fetch_site="cross-site") == 200
        assert await get(setup, "text/event-stream", sec_fetch_site="cross-site") == 403
        assert setup.upstream.requests == []


async def test_no_other_page_can_press_the_button(servers: Servers, tmp_path: Path) -> None:  # T41
    async with proxy_setup(servers, tmp_path) as setup:
        for field in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            answer = await setup.client.http.post(f"{setup.proxy.origin}/connect/notes/start", headers=field)
            assert answer.status_code == 403
        assert setup.upstream.requests == []
        assert setup.issuer.requests == []


async def test_the_button_opens_no_other_browser_and_its_own_goes_on_directly(  # T89
    servers: Servers, tmp_path: Path
) -> None:
    script = BrowserScript(tmp_path)
    config = await configured(servers, tmp_path, wait="0s", open_browser="always")
    async with proxy_process(config, env=script.env) as proxy, proxy.client("notes") as client, Browser() as browser:
        address = f"{proxy.origin}/notes/mcp"
        page = await browser.open(address)
        done = await browser.submit(address, Page(page.text).forms[0], None)
        last = await browser.follow(done.headers["location"])
        assert "notes is connected" in last.text
        assert browser.hops[3].partition("?")[0].endswith("/authorize")
        assert (await client.call("echo", text="in")).text == "in"
        assert await proxy.stop() == 0
    assert script.calls == []
    assert "was begun in a browser" in proxy.err
