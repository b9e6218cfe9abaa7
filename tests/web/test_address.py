"""The page of an MCP address, what its button leads to, and the last page of an authorization."""

import html

import pytest

from fakes.forwarding import pending_authorization
from mcp_auth_proxy.broker import ConfirmationPrompt, ConnectedServer
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, McpAuthProxyError, UpstreamUnreachable
from mcp_auth_proxy.models import AccessToken
from web.site_setup import SIGN_IN, site_setup

NOTES = {"notes": ServerSettings(name="notes", url="https://notes.example/mcp")}
START = "/connect/notes/start"
CONNECTED = ConnectedServer(server="notes", issuer="https://as.example")


@pytest.mark.parametrize("path", ["/mcp", "/notes/mcp"])
@pytest.mark.parametrize("connected", [None, CONNECTED])
async def test_the_page_of_an_address_has_a_button(path: str, connected: ConnectedServer | None) -> None:
    async with site_setup(servers=NOTES) as setup:
        setup.broker.is_connected = connected
        page = await setup.client.get(path)
        assert page.status_code == 200
        assert "<code>http://127.0.0.1:8787/notes/mcp</code>" in page.text
        assert f'<form method="post" action="{START}">' in page.text
        assert ("Authorize again" in page.text) is (connected is not None)
        assert "logout notes --forget-client" in page.text


async def test_the_pages_name_a_server_without_a_configuration_by_its_url() -> None:
    served = {"notes": ServerSettings(name="notes", url="https://notes.example/mcp?key=1&b", from_url=True)}
    async with site_setup(servers=served) as setup:
        setup.broker.visit = ConfirmationPrompt(flow_id="F1", sign_in=SIGN_IN, max_age=600, visited=True)
        for path in ("/notes/mcp", "/connect/notes?flow=F1"):
            page = html.unescape((await setup.client.get(path)).text)
            assert "mcp-auth-proxy logout 'https://notes.example/mcp?key=****&****' --forget-client" in page


@pytest.mark.parametrize(
    ("public_url", "url", "sources"),
    [
        ("https://mcp.example.com", "https://notes.example/mcp", "'self' https:;"),
        ("https://mcp.example.com", "http://127.0.0.1:9/mcp", "'self' https: http:;"),
        ("http://127.0.0.1:8787", "https://notes.example/mcp", "'self' https: http:;"),
    ],
)
async def test_the_policy_of_the_page_lets_the_sign_in_through(public_url: str, url: str, sources: str) -> None:
    async with site_setup(public_url, {"notes": ServerSettings(name="notes", url=url)}) as setup:
        page = await setup.client.get("/notes/mcp")
        assert f"form-action {sources}" in page.headers["content-security-policy"]
        assert page.headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("outcome", "status", "location", "text"),
    [
        (AccessToken(b"Bearer x", 1), 303, "/oauth/connected/notes", "notes is connected"),
        (None, 200, None, "asks for no authorization"),
        (AuthorizationError("It has no metadata."), 502, None, "It has no metadata."),
        (UpstreamUnreachable("It is down."), 502, None, "It is down."),
    ],
)
async def test_the_button_says_if_there_is_no_link(
    outcome: AccessToken | McpAuthProxyError | None,
    status: int,
    location: str | None,
    text: str,
) -> None:
    async with site_setup(servers=NOTES) as setup:
        setup.broker.begins = outcome
        page = await setup.client.post(START)
        assert (page.status_code, page.headers.get("location")) == (status, location)
        assert text in page.text


async def test_the_button_leads_to_the_link() -> None:
    async with site_setup(servers=NOTES) as setup:
        setup.broker.begins = pending = pending_authorization()
        page = await setup.client.post(START)
        assert (page.status_code, page.headers["location"]) == (303, pending.link)


async def test_only_the_button_starts_an_authorization_and_only_for_a_server() -> None:
    async with site_setup(servers=NOTES) as setup:
        assert (await setup.client.get(START)).status_code == 405
        assert (await setup.client.post("/connect/other/start")).status_code == 404
        assert (await setup.client.get("/other/mcp")).status_code == 404


async def test_the_last_page_says_only_what_is_true() -> None:
    async with site_setup(servers=NOTES) as setup:
        page = await setup.client.get("/oauth/connected/notes")
        assert (page.status_code, "notes is not connected" in page.text) == (404, True)
        setup.broker.is_connected = CONNECTED
        page = await setup.client.get("/oauth/connected/notes")
        assert (page.status_code, "notes is connected" in page.text) == (200, True)
        assert "https://as.example" in page.text
        assert "<form" not in page.text
