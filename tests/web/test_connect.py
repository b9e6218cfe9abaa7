"""The link that a user opens: a redirect with a cookie for this browser, a code for another device, or a refusal."""

from html import escape
from http.cookies import SimpleCookie

import pytest

from mcp_auth_proxy.broker import ConnectedServer, DevicePrompt
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused, McpAuthProxyError
from mcp_auth_proxy.models import DeviceAuthorization
from mcp_auth_proxy.web.connect import REDIRECTED
from web.site_setup import REDIRECT, SIGN_IN, site_setup

LINK = "/connect/notes?flow=F1"


@pytest.mark.parametrize("public_url", ["http://127.0.0.1:8787", "https://mcp.example.com"])
async def test_the_browser_is_sent_on_with_a_cookie_for_the_callback_alone(public_url: str) -> None:
    async with site_setup(public_url) as setup:
        page = await setup.client.get(LINK)
        assert (page.status_code, page.headers["location"]) == (303, REDIRECT.authorization_url)
        assert setup.broker.opened == [("notes", "F1")]
        cookie = SimpleCookie(page.headers["set-cookie"])[REDIRECT.cookie_name]
        assert cookie.value == REDIRECT.cookie_value
        assert (cookie["path"], cookie["max-age"], cookie["samesite"]) == ("/oauth/callback", "600", "lax")
        assert (cookie["httponly"], bool(cookie["secure"])) == (True, public_url.startswith("https"))
        # For those that follow no redirect; what the server named is no markup.
        assert f'href="{escape(REDIRECT.authorization_url)}"' in page.text
        assert "<script>" not in page.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CallbackRefused("This link is not known.", 404), 404),
        (CallbackRefused("This link was used."), 400),
        (AuthorizationError("It was <removed>."), 502),
        (AuthorizationDenied("No."), 502),
    ],
)
async def test_a_link_that_can_not_be_used_says_why(error: McpAuthProxyError, status: int) -> None:
    async with site_setup() as setup:
        setup.broker.visit = error
        page = await setup.client.get(LINK)
        assert (page.status_code, escape(str(error)) in page.text) == (status, True)
        assert "set-cookie" not in page.headers


async def test_a_link_without_a_flow_is_asked_for_all_the_same() -> None:
    async with site_setup() as setup:
        setup.broker.visit = CallbackRefused("This link is not known.", 404)
        assert (await setup.client.get("/connect/n%20%C3%A4")).status_code == 404
        assert setup.broker.opened == [("n ä", "")]


@pytest.mark.parametrize("complete", ["", "https://as.example/device?user_code=AB-CD"])
async def test_a_code_for_another_device_is_shown_until_the_user_is_done(complete: str) -> None:
    device = DeviceAuthorization(
        device_code="secret-device-code",
        user_code="AB-CD<",
        verification_uri="https://as.example/device",
        verification_uri_complete=complete,
    )
    async with site_setup() as setup:
        setup.broker.visit = DevicePrompt(server="notes", device=device, sign_in=SIGN_IN)
        page = await setup.client.get(LINK)
        assert page.status_code == 200
        assert "AB-CD&lt;" in page.text
        assert f'href="{escape(complete or device.verification_uri)}"' in page.text
        assert 'http-equiv="refresh"' in page.text
        assert "secret-device-code" not in page.text
        for told in (SIGN_IN.upstream, SIGN_IN.address, *SIGN_IN.scopes):
            assert f"<code>{told}</code>" in page.text
        setup.broker.visit = ConnectedServer(server="notes", issuer="https://as.example")
        page = await setup.client.get(LINK)
        assert (page.status_code, "notes is connected" in page.text) == (200, True)
        assert 'http-equiv="refresh"' not in page.text


async def test_the_last_page_says_whose_account_is_connected() -> None:
    async with site_setup() as setup:
        setup.broker.visit = ConnectedServer(server="notes", issuer="https://as.example", label="<me>, workspace Acme")
        page = await setup.client.get(LINK)
        assert "You are connected as &lt;me&gt;, workspace Acme." in page.text
        assert "Authorized by https://as.example." in page.text


@pytest.mark.parametrize(
    ("public_url", "host", "moved"),
    [
        ("http://127.0.0.1:8787", "localhost:8787", True),
        ("http://127.0.0.1:8787", "[::1]:8787", True),
        ("http://127.0.0.1:8787", "127.0.0.1:9999", False),
        ("http://localhost:8787", "127.0.0.1:8787", True),
        # Only a loopback name is sure to be this machine.
        ("https://mcp.example.com", "localhost:8787", False),
        ("http://127.0.0.1:8787", "mcp.internal:8787", False),
    ],
)
async def test_the_browser_is_sent_to_the_name_that_the_callback_will_have(
    public_url: str, host: str, moved: bool
) -> None:
    """To a browser, ``localhost`` and ``127.0.0.1`` are two hosts: the callback would not get the cookie."""
    async with site_setup(public_url) as setup:
        page = await setup.client.get(f"{LINK}&a=b", headers={"host": host})
        assert page.status_code == 303
        if moved:
            assert page.headers["location"] == f"{public_url}{LINK}&a=b&{REDIRECTED}=1"
            assert (setup.broker.opened, "set-cookie" in page.headers) == ([], False)
        else:
            assert page.headers["location"] == REDIRECT.authorization_url


async def test_a_browser_that_comes_back_under_its_first_name_is_not_sent_round_again() -> None:
    async with site_setup() as setup:
        page = await setup.client.get(f"{LINK}&{REDIRECTED}=1", headers={"host": "localhost:8787"})
        assert page.headers["location"] == REDIRECT.authorization_url


async def test_a_head_request_is_not_sent_to_another_name() -> None:
    async with site_setup() as setup:
        page = await setup.client.head(LINK, headers={"host": "localhost:8787"})
        assert page.headers["location"] == REDIRECT.authorization_url
