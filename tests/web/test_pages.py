"""What all pages have in common: a title, an icon, and a way to the front page."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from mcp_auth_proxy import web
from mcp_auth_proxy.broker import ConfirmationPrompt, ConnectedServer, DevicePrompt
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    AuthorizationError,
    CallbackRefused,
    McpAuthProxyError,
    StoreUnavailable,
)
from mcp_auth_proxy.models import DeviceAuthorization
from web.site_setup import SIGN_IN, Shown, site_setup

NOTES = {"notes": ServerSettings(name="notes", url="https://notes.example/mcp")}
CONNECTED = ConnectedServer(server="notes", issuer="https://as.example")
LINK = "/connect/notes?flow=F1"
CALLBACK = "/oauth/callback?code=C&state=S"
DEVICE = DeviceAuthorization(device_code="d", user_code="AB-CD", verification_uri="https://as.example/device")

OPENED: dict[str, Shown | McpAuthProxyError] = {
    "confirmation": ConfirmationPrompt(flow_id="F1", sign_in=SIGN_IN, max_age=600, visited=False),
    "code for a device": DevicePrompt(server="notes", device=DEVICE, sign_in=SIGN_IN),
    "used link": CONNECTED,
    "refused link": CallbackRefused("It is not known.", 404),
    "no start": AuthorizationError("It has no metadata."),
    "no store": StoreUnavailable("It is locked."),
}
"""What a link leads to."""

ENDED: dict[str, McpAuthProxyError] = {
    "refused callback": CallbackRefused("It was used."),
    "denied": AuthorizationDenied("You said no.", "access_denied"),
    "failed": AuthorizationError("It was removed."),
    "not stored": StoreUnavailable("It is locked."),
}
"""How an authorization ends."""

REQUESTS = {
    "front page": ("GET", "/"),
    "address": ("GET", "/notes/mcp"),
    "open server": ("POST", "/connect/notes/start"),
    "forged form": ("POST", LINK),
    "last page": ("GET", "/oauth/connected/notes"),
    "no document": ("GET", "/oauth/client-metadata.json"),
    "no page": ("GET", "/nowhere"),
    "no such method": ("POST", "/"),
}

TITLES = {
    "front page": "Dashboard",
    "address": "notes",
    "confirmation": "Authorize notes",
    "code for a device": "Authorize notes",
    "used link": "notes is connected",
    "last page": "notes is not connected",
}
"""The titles that are more than the heading of a message."""


class Page(HTMLParser):
    """The title, icons and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.title = self.heading = ""
        self.icons: list[str] = []
        self.links: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self._open = tag
        if tag == "link" and found.get("rel") == "icon":
            self.icons.append(found["href"])
        elif tag == "a":
            self.links.append(found["href"])

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "title":
            self.title += data
        elif self._open == "h1":
            self.heading += data


@pytest.mark.parametrize("name", [*REQUESTS, *OPENED, *ENDED])
async def test_every_kind_of_page_has_a_title_an_icon_and_a_link_to_the_front_page(name: str) -> None:
    async with site_setup(servers=NOTES) as setup:
        setup.broker.visit = OPENED.get(name, setup.broker.visit)
        setup.broker.outcome = ENDED.get(name, setup.broker.outcome)
        method, path = REQUESTS.get(name, ("GET", LINK if name in OPENED else CALLBACK))
        answer = await setup.client.request(method, path)
        page = Page(answer.text)
        assert page.title == f"{TITLES.get(name, page.heading)} · mcp-auth-proxy"
        assert len(page.title) > len(" · mcp-auth-proxy")
        (icon,) = page.icons
        assert icon.startswith("data:image/svg+xml,")
        assert "img-src data:" in answer.headers["content-security-policy"]
        assert "/" in page.links
        assert (await setup.client.get("/")).status_code == 200


def test_there_is_no_other_kind_of_page() -> None:
    """A new one belongs into the list above; those of sign-ins and popups share the base, and have tests elsewhere."""
    templates = {file.stem: file.read_text() for file in (Path(web.__file__).parent / "templates").iterdir()}
    parts = {"base", "sign_in", "dashboard_card", "dashboard_events"}
    elsewhere = {"open_link", "sign_in_form", "start"}
    assert templates.keys() - parts == {"address", "confirm", "dashboard", "device", "message"} | elsewhere
    assert all('{% extends "base.html" %}' in templates[name] for name in elsewhere)
