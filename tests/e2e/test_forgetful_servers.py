"""Authorization servers that forgot our registration, or list more than they grant."""

import asyncio
import json
from pathlib import Path

import pytest

from e2e.test_login import free_port
from fakes.fixtures import Servers
from fakes.headless import Browser, consent
from fakes.http_exchange import FakeResponse
from fakes.proxy import run_command
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.config.settings import Address


async def test_a_client_that_the_token_endpoint_forgot_registers_once_more(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        link = await setup.link()
        async with Browser() as browser:
            callback = await browser.stop_before(link)
            setup.issuer.forget_clients()
            assert "invalid_client" in (await browser.follow(callback)).text
        await setup.connect()
        assert setup.issuer.registrations == 2


async def test_a_client_that_the_authorization_response_calls_unknown_registers_once_more(
    servers: Servers, tmp_path: Path
) -> None:
    options = {"authorize_error": ("invalid_client", "who is that?")}
    async with proxy_setup(servers, tmp_path, issuer=options) as setup:
        assert "invalid_client" in (await consent(await setup.link())).text
        setup.issuer.authorize_error = None
        await setup.connect()
        assert setup.issuer.registrations == 2


async def test_a_registration_that_the_login_page_does_not_know_can_be_forgotten(
    servers: Servers, tmp_path: Path
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        link = await setup.link()
        setup.issuer.forget_clients()
        async with Browser() as browser:
            page = await browser.open((await browser.open(link)).headers["location"])
        assert page.status_code == 400
        assert await setup.link() == link
        config = str(tmp_path / "mcp-auth-proxy.yaml")
        assert (await run_command("logout", "notes", "--forget-client", "--config", config))[0] == 0
        async with asyncio.timeout(10):
            # Changes by another process are noticed within a second; the next request gets the reason.
            while link in (text := json.dumps((await setup.ask()).message)) or "/connect/" not in text:
                pass
        await setup.connect()
        assert setup.issuer.registrations == 2


@pytest.mark.parametrize("choice", ["never", "always"])
async def test_a_registration_that_the_login_page_does_not_know_is_replaced_at_the_second_visit(
    servers: Servers, tmp_path: Path, choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        proxy_setup(servers, tmp_path, authorization={"wait": "20s", "open_browser": choice}) as setup,
        Browser() as browser,
    ):
        call = asyncio.create_task(setup.ask("held"))
        link = await setup.proxy.next_link()
        setup.issuer.forget_clients()
        page = await browser.follow(link)
        assert (page.status_code, "not known here" in page.text) == (400, True)
        assert setup.issuer.registrations == 1
        page = await browser.follow(link)
        assert (page.status_code, "notes is connected" in page.text) == (200, True)
        assert (await call).text == "held"
        assert setup.issuer.registrations == 2
        assert (await browser.open(link)).status_code == 200
        assert setup.proxy.links == [link]
    assert "its client was dropped, and a new one was registered" in caplog.text
    assert "mcp-auth-proxy logout notes --forget-client" in caplog.text


@pytest.mark.parametrize("declined", [0, 1])
async def test_both_visits_of_a_link_end_together(servers: Servers, tmp_path: Path, declined: int) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        callbacks = [await browser.stop_before(link) for _ in range(2)]
        denied = callbacks[declined].replace("code=", "error=access_denied&x=")
        assert (await browser.follow(denied)).status_code == 400
        assert (await browser.follow(callbacks[1 - declined])).status_code == 400
        assert (await browser.open(link)).status_code == 410
        assert await setup.link() != link
        await setup.connect()


async def test_doctor_names_how_to_forget_a_registration(servers: Servers, tmp_path: Path) -> None:
    # The redirect URI is a part of the registration, so the port has to be known to `doctor`.
    listen = Address("127.0.0.1", free_port())
    async with proxy_setup(servers, tmp_path, listen=listen, public_url=f"http://{listen}") as setup:
        config = str(tmp_path / "mcp-auth-proxy.yaml")
        remedy = "mcp-auth-proxy logout notes --forget-client"
        assert remedy not in (await run_command("doctor", "notes", "--config", config))[1]
        await setup.link()
        assert remedy in " ".join((await run_command("doctor", "notes", "--config", config))[1].split())


async def test_refused_offline_access_is_not_requested_again(servers: Servers, tmp_path: Path) -> None:
    listed = {"metadata_changes": {"scopes_supported": ["read", "offline_access"]}, "scopes": ("read",)}
    async with proxy_setup(servers, tmp_path, issuer=listed, upstream={"scopes": ("read",)}) as setup:
        page = await consent(await setup.link())
        assert "invalid_scope" in page.text
        assert "servers.notes.oauth.scopes" in page.text
        await setup.connect()
        assert [r.form["scope"] for r in setup.issuer.seen("authorize")] == ["read offline_access", "read"]


@pytest.mark.parametrize("status", [200, 400, 500])
async def test_a_web_page_instead_of_a_token_response_is_reported(
    servers: Servers, tmp_path: Path, status: int
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        setup.issuer.answers["token"] = FakeResponse.html(status=status)
        page = await consent(await setup.link())
        assert f"HTTP {status}" in page.text
        assert "Maintenance" not in page.text
        setup.issuer.answers.clear()
        await setup.connect()
