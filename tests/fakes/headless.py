"""A headless browser: opens a link, follows redirects, and submits the form on the consent page."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Self
from urllib.parse import urljoin, urlsplit

import httpx2

MOST_STEPS = 20
CALLBACK = "/oauth/callback"
DECLINING = ("deny", "decline", "cancel", "no")


@dataclass
class Form:
    """One form of a page, with its buttons in order."""

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: list[tuple[str, str]] = field(default_factory=list)


class Page(HTMLParser):
    """The forms and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(given.get("action", ""), given.get("method", "get").upper()))
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "button" and self.forms and given.get("type", "submit") == "submit":
            self.forms[-1].buttons.append((given.get("name", ""), given.get("value", "")))
        elif tag == "input" and self.forms and given.get("name"):
            if given.get("type") == "submit":
                self.forms[-1].buttons.append((given["name"], given.get("value", "")))
            else:
                self.forms[-1].fields[given["name"]] = given.get("value", "")


class Browser:
    """One browser profile. Cookies are kept by host without the port, as browsers do.

    ``hops`` holds every URL that was opened, in order.
    """

    def __init__(self, cookies: Mapping[str, str] | None = None, *, trusted: ssl.SSLContext | None = None) -> None:
        """``trusted``: which certificates; by default, those of the system."""
        verify = trusted if trusted is not None else True
        self.client = httpx2.AsyncClient(follow_redirects=False, trust_env=False, timeout=20, verify=verify)
        for name, value in (cookies or {}).items():
            self.client.cookies.set(name, value, domain="127.0.0.1")
        self.hops: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def open(self, url: str) -> httpx2.Response:
        """Send one GET; follow no redirect."""
        self.hops.append(url)
        return await self.client.get(url, headers={"accept": "text/html"})

    async def submit(self, page_url: str, form: Form, button: tuple[str, str] | None) -> httpx2.Response:
        """Send a form as a browser would, with the Origin of its page."""
        url = urljoin(page_url, form.action or page_url)
        data = form.fields | ({button[0]: button[1]} if button and button[0] else {})
        self.hops.append(url)
        if form.method == "GET":
            return await self.client.get(url, params=data)
        parts = urlsplit(page_url)
        return await self.client.post(url, data=data, headers={"origin": f"{parts.scheme}://{parts.netloc}"})

    async def follow(self, link: str, *, allow: bool = True, until: str = CALLBACK) -> httpx2.Response:
        """Return the first page, from the link on, that has no form to submit.

        Redirects are followed. Forms are submitted, with the button that allows or the one that declines. A page at
        the path ``until`` is the last one, whatever is on it.
        """
        response = await self.open(link)
        for _ in range(MOST_STEPS):
            here = str(response.url)
            if response.has_redirect_location:
                response = await self.open(urljoin(here, response.headers["location"]))
                continue
            page = Page(response.text) if response.status_code == httpx2.codes.OK else Page("")
            if urlsplit(here).path == until:
                return response
            if page.forms:
                form = page.forms[0]
                response = await self.submit(here, form, _button(form, allow=allow))
            elif onward := [href for href in page.links if "authorize" in href]:
                response = await self.open(urljoin(here, onward[0]))
            else:
                return response
        raise AssertionError(f"no end after {MOST_STEPS} pages: {[urlsplit(hop).path for hop in self.hops]}")

    async def stop_before(self, link: str, path: str = CALLBACK) -> str:
        """Do as ``follow`` does, but return the URL at ``path`` instead of opening it."""
        response = await self.open(link)
        for _ in range(MOST_STEPS):
            here = str(response.url)
            if response.has_redirect_location:
                onward = urljoin(here, response.headers["location"])
                if urlsplit(onward).path == path:
                    return onward
                response = await self.open(onward)
                continue
            page = Page(response.text)
            if not page.forms:
                break
            response = await self.submit(here, page.forms[0], _button(page.forms[0], allow=True))
        raise AssertionError(f"never came to {path}: {[urlsplit(hop).path for hop in self.hops]}")


async def consent(link: str, *, cookies: Mapping[str, str] | None = None) -> httpx2.Response:
    """Open the link, allow what is asked, and return the last page."""
    async with Browser(cookies) as browser:
        return await browser.follow(link)


async def decline(link: str, *, cookies: Mapping[str, str] | None = None) -> httpx2.Response:
    """Open the link, decline what is asked, and return the last page."""
    async with Browser(cookies) as browser:
        return await browser.follow(link, allow=False)


def _button(form: Form, *, allow: bool) -> tuple[str, str] | None:
    declining = [button for button in form.buttons if button[1].lower() in DECLINING or button[0].lower() in DECLINING]
    others = [button for button in form.buttons if button not in declining]
    wanted = others if allow or not declining else declining
    return wanted[0] if wanted else None
