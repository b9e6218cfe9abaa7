"""``dashboard``: a link for one session, which nobody can be led into."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.proxy import ProxyProcess, proxy_process, run_command, serving, until, write_config
from fakes.team import add_member, post

OPENED = {"sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
"""What a browser sends if it is opened with an address."""


@asynccontextmanager
async def served(servers: Servers, folder: Path, **inbound: str) -> AsyncIterator[tuple[ProxyProcess, Path]]:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(folder, {"notes": upstream.url}, inbound=inbound)
    async with proxy_process(config) as proxy:
        yield proxy, config


async def link_of(config: Path, *arguments: str) -> str:
    code, out, err = await run_command("dashboard", "--config", str(config), *arguments)
    assert code == 0, err
    assert "within 5 minutes" in err
    (link,) = out.split()
    return link


async def has_session(browser: Browser, link: str) -> bool:
    """Return whether a browser still has the session that it has opened with a link: then it may open it again."""
    return (await browser.client.get(link, headers=OPENED)).status_code == 303


async def test_the_link_opens_one_session_and_leaves_the_address(servers: Servers, tmp_path: Path) -> None:
    async with served(servers, tmp_path) as (proxy, config), Browser() as browser:
        link = await link_of(config)
        assert link.startswith(f"{proxy.origin}/sign-in?link=")
        secret = link.partition("=")[2]
        page = await browser.client.get(link, headers=OPENED)
        assert (page.status_code, page.headers["location"]) == (303, "/")
        (cookie,) = page.headers.get_list("set-cookie")
        assert {"httponly", "samesite=lax", "path=/"} <= {field.strip().lower() for field in cookie.split(";")}
        assert secret not in page.text + cookie
        assert await has_session(browser, link)
        assert secret not in proxy.log
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
        assert secret.encode() not in stored  # T76
        (value,) = browser.client.cookies.values()
        assert value.encode() not in stored


async def test_a_program_without_fetch_metadata_is_redirected_too(servers: Servers, tmp_path: Path) -> None:
    async with served(servers, tmp_path) as (_, config), Browser() as browser:
        page = await browser.open(await link_of(config))
        assert (page.status_code, page.headers["location"]) == (303, "/")


async def test_a_link_that_somebody_else_opens_too_leaves_nobody_a_session(servers: Servers, tmp_path: Path) -> None:
    async with served(servers, tmp_path) as (_, config), Browser() as first, Browser() as second:
        link = await link_of(config)
        assert (await first.open(link)).status_code == 303
        page = await second.open(link)
        assert page.status_code == 403
        assert "set-cookie" not in page.headers
        assert "has just ended" in page.text
        assert not await has_session(first, link)


@pytest.mark.parametrize(
    "headers",
    [
        {**OPENED, "sec-fetch-site": "cross-site"},
        {**OPENED, "sec-fetch-site": "same-site"},
        {**OPENED, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {**OPENED, "sec-purpose": "prefetch"},
        {**OPENED, "sec-purpose": "prefetch;prerender"},
        {**OPENED, "purpose": "prefetch"},
    ],
)
async def test_a_link_that_a_page_leads_to_or_that_is_prefetched_is_not_used(
    servers: Servers, tmp_path: Path, headers: dict[str, str]
) -> None:  # T54
    async with served(servers, tmp_path) as (proxy, config), Browser() as browser:
        link = await link_of(config)
        page = await browser.client.get(link, headers=headers)
        assert page.status_code == 200
        assert "set-cookie" not in page.headers
        assert (await browser.client.head(link)).status_code == 200
        foreign = await post(browser, f"{proxy.origin}/sign-in", origin="https://evil.example", link=link[-43:])
        assert foreign.status_code == 403
        # The button on the page uses it.
        pressed = await post(browser, f"{proxy.origin}/sign-in", link=link[-43:])
        assert (pressed.status_code, pressed.headers["location"]) == (303, "/")
        assert await has_session(browser, link)


@pytest.mark.parametrize("secret", ["", "x", "A" * 43, "%00", "'" * 43])
async def test_any_other_link_is_refused(servers: Servers, tmp_path: Path, secret: str) -> None:
    async with served(servers, tmp_path) as (proxy, _), Browser() as browser:
        page = await browser.open(f"{proxy.origin}/sign-in?link={secret}")
        assert page.status_code == 403
        assert "set-cookie" not in page.headers


async def test_the_link_is_opened_in_a_browser_if_there_is_one(servers: Servers, tmp_path: Path) -> None:
    told = tmp_path / "told"
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\nprintf "%s|" "$#" "$@" > {told}\n')
    program.chmod(0o755)
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"open_browser": "always"})
    async with proxy_process(config, env={"BROWSER": "true"}):
        code, out, _ = await run_command("dashboard", "--config", str(config), env={"BROWSER": str(program)})
        assert code == 0
        await until(told.exists)
        assert told.read_text() == f"1|{out.strip()}|"


async def test_the_link_names_the_public_url(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"notes": upstream.url}, public_url="https://proxy.example")
    async with proxy_process(config):
        assert (await link_of(config)).startswith("https://proxy.example/sign-in?link=")


async def test_without_a_running_proxy_there_is_no_link(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"notes": upstream.url})
    code, out, err = await run_command("dashboard", "--config", str(config))
    assert (code, out) == (1, "")
    assert "No proxy is running" in err


async def test_the_proxy_of_a_url_alone_has_a_dashboard_too(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    env = {"XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path), "MCP_AUTH_PROXY_CONFIG": None}
    async with serving(upstream.url, "--listen", "0", env=env, cwd=tmp_path) as proxy, Browser() as browser:
        code, out, err = await run_command("dashboard", env=env, cwd=tmp_path)
        assert code == 0, err
        assert out.startswith(f"{proxy.origin}/sign-in?link=")
        assert (await browser.open(out.strip())).status_code == 303


async def test_if_callers_are_identified_a_principal_is_named(servers: Servers, tmp_path: Path) -> None:
    await add_member(tmp_path, "anna")
    async with served(servers, tmp_path, mode="api_key") as (proxy, config), Browser() as browser:
        for arguments, problem in (((), "--as NAME"), (("--as", "nobody"), "no principal 'nobody'")):
            code, out, err = await run_command("dashboard", "--config", str(config), *arguments)
            assert (code, out) == (1, "")
            assert problem in err
        link = await link_of(config, "--as", "anna")
        assert (await browser.open(link)).status_code == 303
        assert "signed in as anna" in (await browser.open(f"{proxy.origin}/")).text


async def test_links_of_two_commands_at_once_are_both_good(servers: Servers, tmp_path: Path) -> None:
    async with served(servers, tmp_path) as (_, config):
        for link in await asyncio.gather(link_of(config), link_of(config)):
            async with Browser() as browser:
                assert (await browser.open(link)).status_code == 303
