"""The page that a user confirms before the redirect (T78): what it shows, and which forms are accepted."""

import logging
import re
from dataclasses import replace
from http.cookies import SimpleCookie

import httpx2
import pytest

from mcp_auth_proxy.broker import ConfirmationPrompt
from web.site_setup import REDIRECT, SIGN_IN, SiteSetup, site_setup

LINK = "/connect/notes?flow=F1"
FORM = {"content-type": "application/x-www-form-urlencoded"}


def prompt(flow_id: str = "F1", **changes: object) -> ConfirmationPrompt:
    sign_in = replace(SIGN_IN, **changes)  # type: ignore[arg-type]
    return ConfirmationPrompt(flow_id=flow_id, sign_in=sign_in, max_age=600, visited=False)


async def opened(setup: SiteSetup, link: str = LINK, cookie: str = "") -> tuple[httpx2.Response, str, str]:
    """The page of a link, its cookie and the token of its form."""
    page = await setup.client.get(link, headers={"cookie": cookie} if cookie else {})
    setup.client.cookies.clear()
    (token,) = re.findall(r'name="token" value="([^"]*)"', page.text)
    return page, page.headers["set-cookie"].partition(";")[0], token


async def send(setup: SiteSetup, body: str, *, cookie: str = "", link: str = LINK, **headers: str) -> int:
    """Send a form; return the status of the answer."""
    cookies = {"cookie": cookie} if cookie else {}
    answer = await setup.client.post(link, content=body, headers={**FORM, **cookies, **headers})
    assert ("set-cookie" in answer.headers) == (answer.status_code == 303)
    assert (answer.headers.get("location") == REDIRECT.authorization_url) == (answer.status_code == 303)
    setup.client.cookies.clear()
    return answer.status_code


@pytest.mark.parametrize("public_url", ["http://127.0.0.1:8787", "https://mcp.example.com"])
async def test_the_page_says_who_sends_the_user_where_with_which_scopes(public_url: str) -> None:  # T78
    async with site_setup(public_url) as setup:
        setup.broker.visit = prompt()
        page, _, token = await opened(setup)
        assert page.status_code == 200
        for told in ("https://notes.example", "https://as.example", "read", "write"):
            assert f"<code>{told}</code>" in page.text
        assert (page.text.count("<form"), page.text.count("<button")) == (1, 1)
        assert '<form method="post">' in page.text
        assert "<script" not in page.text
        assert "location" not in page.headers
        assert "F1" not in page.text
        (morsel,) = SimpleCookie(page.headers["set-cookie"]).values()
        assert (morsel["path"], morsel["max-age"], morsel["samesite"]) == ("/connect/notes", "600", "strict")
        assert (morsel["httponly"], bool(morsel["secure"])) == (True, public_url.startswith("https"))
        assert token not in page.headers["set-cookie"]


@pytest.mark.parametrize("visited", [False, True])
async def test_a_page_that_is_opened_again_says_what_to_do_about_a_client_that_is_not_known(visited: bool) -> None:
    async with site_setup() as setup:
        setup.broker.visit = replace(prompt(), visited=visited)
        page, _, _ = await opened(setup)
        assert ("mcp-auth-proxy logout notes --forget-client" in page.text) is visited


async def test_the_form_of_the_page_leads_on_also_if_it_is_sent_twice() -> None:  # T78
    async with site_setup() as setup:
        setup.broker.visit = prompt()
        _, cookie, token = await opened(setup)
        assert await send(setup, f"token={token}", cookie=cookie) == 303
        assert await send(setup, f"token={token}", cookie=cookie) == 303
        # The page is open in two tabs.
        _, again, other = await opened(setup, cookie=cookie)
        assert (again, other) == (cookie, token)
        assert await send(setup, f"token={other}", cookie=again) == 303
        assert setup.broker.confirmed == [("notes", "F1")] * 3


async def test_any_other_form_is_refused(caplog: pytest.LogCaptureFixture) -> None:  # T78
    async with site_setup(servers={"notes": None}) as setup:  # type: ignore[dict-item]
        setup.broker.visit = prompt()
        _, cookie, token = await opened(setup)
        _, foreign_cookie, foreign = await opened(setup)
        setup.broker.visit = prompt("F2")
        _, second_cookie, second = await opened(setup, "/connect/notes?flow=F2")
        name, _, value = cookie.partition("=")
        bad = [
            ("", ""),
            ("", cookie),
            (f"token={token}", ""),
            ("token=", cookie),
            (f"token={token[:-1]}", cookie),
            (f"token={token}&token={token}", cookie),
            (f"token={foreign}", cookie),
            (f"token={token}", foreign_cookie),
            (f"token={second}", second_cookie),
            (f"token={second}", f"{name}={second_cookie.partition('=')[2]}"),
            (f"token={value}", cookie),
            ("token=%ff%00%e2%80%ae", cookie),
            (f"token={token}", f"{name}="),
            (f"x={'x' * 2000}&token={token}", cookie),
            (f"token={token}&x={'x' * 2_000_000}", cookie),
        ]
        for body, sent in bad:
            assert await send(setup, body, cookie=sent) == 403, (body[:100], sent)
        assert await send(setup, f"token={token}", cookie=cookie, link="/connect/notes") == 403
        assert await send(setup, f"token={token}", cookie=cookie, link="/connect/other?flow=F2") == 403
        assert setup.broker.confirmed == []
        assert await send(setup, f"token={token}", cookie=cookie) == 303
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "server notes" in record.getMessage()
    assert token not in caplog.text


@pytest.mark.parametrize("cookie", ["x", "a" * 44, "a b", "é" * 43, '"><script>', "a" * 4000])
async def test_an_odd_cookie_is_replaced(cookie: str) -> None:  # T78
    async with site_setup() as setup:
        setup.broker.visit = prompt()
        name = (await opened(setup))[1].partition("=")[0]
        page = await setup.client.get(LINK, headers=[(b"cookie", f"{name}={cookie}".encode())])
        fresh = page.headers["set-cookie"].partition(";")[0].partition("=")[2]
        assert re.fullmatch(r"[\w-]{43}", fresh)
        assert "<script" not in page.text


async def test_hostile_texts_are_escaped_bounded_and_can_not_turn_the_page_around() -> None:  # T78
    host = "https://accounts.example.com." + "a" * 60 + "." + "b" * 60 + "." + "c" * 60 + ".evil.example"
    scopes = ("<script>alert(1)</script>", "\u202egnp.exe\u2066\x1b[31m", "x" * 60_000, *map(str, range(5000)))
    async with site_setup() as setup:
        setup.broker.visit = prompt(upstream='https://n"><img src=x>', address=host, scopes=scopes)
        page, _, _ = await opened(setup)
    assert "<script" not in page.text
    assert "<img" not in page.text
    assert "&lt;script&gt;" in page.text
    assert not {"\u202e", "\u2066", "\x1b"} & set(page.text)
    # The end of a host name says whose it is.
    assert host in page.text
    assert re.search(r"and 4\d\d\d more", page.text)
    assert len(page.text) < 16_000


async def test_no_scopes_are_said_to_be_none() -> None:  # T78
    async with site_setup() as setup:
        setup.broker.visit = prompt(scopes=())
        page, _, _ = await opened(setup)
        assert "none named" in page.text


@pytest.mark.parametrize(
    ("address", "sources"),
    [("https://as.example", "'self' https:"), ("http://[::1]:9", "'self' https: http:")],
)
async def test_the_policy_lets_the_redirects_of_a_sign_in_through(address: str, sources: str) -> None:  # T78
    async with site_setup() as setup:
        setup.broker.visit = prompt(address=address)
        page, _, _ = await opened(setup)
    policy = [part.strip() for part in page.headers["content-security-policy"].split(";")]
    assert f"form-action {sources}" in policy
    assert {"default-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= set(policy)
    # With no-referrer, browsers send "Origin: null" with the form, which the guard refuses.
    assert page.headers["referrer-policy"] == "same-origin"
