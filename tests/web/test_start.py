"""``/oauth/start``: a page that only checks and shows, and a form of ours that begins."""

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser, Page
from fakes.proxy import running_proxy
from fakes.team import post
from mcp_auth_proxy.identity.sessions import new_link
from mcp_auth_proxy.store.sessions import Sessions
from web.api.api_setup import assert_problem
from web.api.made_setup import LOOPBACK, MadeSetup, administer, made_setup

APP = "https://app.example"


@asynccontextmanager
async def started(servers: Servers, folder: Path, **admin: object) -> AsyncIterator[MadeSetup]:
    async with made_setup(servers, folder) as setup:
        administer(setup.api, **{"allow_private": LOOPBACK, "adhoc": "member", "popup_origins": (APP,), **admin})
        yield setup


def start(setup: MadeSetup, path: str = "/oauth/start", **query: str) -> str:
    given = {"mcp_server_url": setup.upstream.url, **query}
    return f"{setup.api.proxy.origin}{path}?" + "&".join(f"{name}={quote(value)}" for name, value in given.items())


def sent(setup: MadeSetup) -> int:
    """Return how many requests came to the server and to its authorization server."""
    return len(setup.upstream.requests) + len(setup.issuer.requests)


def names(setup: MadeSetup) -> list[str]:
    return [server.name for server in setup.api.proxy.application.made.all()]


@pytest.mark.parametrize("path", ["/oauth/start", "/api/v1/oauth/start"])
async def test_a_get_shows_what_is_asked_for_and_sends_nothing(servers: Servers, tmp_path: Path, path: str) -> None:
    """T70: what <img src=…/oauth/start?…> on a foreign page leads to, even if the cookie came with it."""
    async with started(servers, tmp_path) as setup, setup.signed_in("ben") as browser:
        elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "image", "sec-fetch-mode": "no-cors"}
        page = await browser.client.get(start(setup, path, scopes="read,write"), headers=elsewhere)
        assert page.status_code == 200
        assert setup.upstream.url in page.text
        assert "<code>read</code> <code>write</code>" in page.text
        assert APP in page.text
        assert "script-src" not in page.headers["content-security-policy"]
        assert (sent(setup), names(setup)) == (0, [])


async def test_the_form_begins_an_adhoc_server_and_its_flow(servers: Servers, tmp_path: Path) -> None:
    async with started(servers, tmp_path) as setup, setup.signed_in("ben") as browser:
        url = start(setup, scopes="read", account="work")
        page = await browser.open(url)
        onward = await browser.submit(url, Page(page.text).forms[0], None)
        assert onward.status_code == 303
        link = onward.headers["location"]
        assert re.fullmatch(rf"{setup.api.proxy.origin}/connect/adhoc-server-\w{{8}}\?flow=[\w-]+", link), link
        assert onward.headers["cross-origin-opener-policy"] == "unsafe-none"
        flow = (await setup.api.ben.get(f"/flows/{link.partition('flow=')[2]}")).json()
        assert (flow["status"], flow["account"], flow["return_origin"]) == ("pending", "work", APP)
        assert "read" in flow["scopes"]
        assert (await browser.follow(link)).status_code == 200
        last = (await setup.api.ben.get(f"/flows/{flow['id']}")).json()
        assert last["status"] == "connected"
        # The same URL again leads to the same server, which belongs to nobody else.
        assert len(names(setup)) == 1
        again = await setup.api.ben.get(start(setup), headers={"sec-fetch-site": "none"})
        assert again.status_code == 303
        assert len(names(setup)) == 1
        assert names(setup)[0] not in (await setup.api.eve.get("/servers")).text
        events = (await setup.api.ada.get("/events")).json()["items"]
        assert ("prn_ben", "flows.create", "ok") in [(it["principal"], it["action"], it["outcome"]) for it in events]


async def test_a_form_that_is_not_ours_begins_nothing(servers: Servers, tmp_path: Path) -> None:
    async with (
        started(servers, tmp_path) as setup,
        setup.signed_in("ben") as browser,
        setup.signed_in("ben") as other,
    ):
        url = start(setup)
        token = Page((await browser.open(url)).text).forms[0].fields["token"]
        own = {"origin": setup.api.proxy.origin}
        for sender, target, data, headers in (
            (browser, url, {"token": token}, {"origin": "https://evil.example"}),
            (browser, url, {"token": token}, {**own, "sec-fetch-site": "cross-site"}),
            (browser, url, {"token": "0" * 64}, own),
            (browser, url, {}, own),
            (browser, start(setup, scopes="admin"), {"token": token}, own),
            (other, url, {"token": token}, own),
        ):
            refused = await sender.client.post(target, data=data, headers=headers)
            assert refused.status_code == 403, (target, data, headers)
        assert (sent(setup), names(setup)) == (0, [])


async def test_without_a_session_the_user_signs_in_first_and_keeps_the_opener(servers: Servers, tmp_path: Path) -> None:
    async with started(servers, tmp_path) as setup, Browser() as browser:
        page = await browser.open(start(setup))
        assert page.status_code == 303
        onward = page.headers["location"]
        assert onward.startswith("/sign-in?next=%2Foauth%2Fstart%3F")
        form = await browser.open(f"{setup.api.proxy.origin}{onward}")
        for response in (page, form):
            assert response.headers["cross-origin-opener-policy"] == "unsafe-none"
        assert sent(setup) == 0
        # Whoever led the browser to the sign-in: after it, the user is asked.
        target = start(setup).removeprefix(setup.api.proxy.origin)
        done = await post(browser, f"{setup.api.proxy.origin}/sign-in", key=setup.api.keys["ben"], next=target)
        assert done.headers["cross-origin-opener-policy"] == "unsafe-none"
        onward = f"{setup.api.proxy.origin}{done.headers['location']}"
        asked = await browser.client.get(onward, headers={"sec-fetch-site": "same-origin"})
        assert (asked.status_code, sent(setup), names(setup)) == (200, 0, [])
        assert (await browser.submit(onward, Page(asked.text).forms[0], None)).status_code == 303


@pytest.mark.parametrize(
    ("path", "more"),
    [("/oauth/start", "#x"), ("/oauth/%73tart", ""), ("/x/../oauth/start", ""), ("/%2e/oauth/start", "")],
)
async def test_a_page_that_leads_to_the_sign_in_can_not_leave_out_the_question(
    servers: Servers, tmp_path: Path, path: str, more: str
) -> None:  # T70
    async with started(servers, tmp_path) as setup, Browser() as browser:
        origin = setup.api.proxy.origin
        target = start(setup, path).removeprefix(origin) + more
        done = await post(browser, f"{origin}/sign-in", key=setup.api.keys["ben"], next=target)
        onward = f"{origin}{done.headers['location']}"
        await browser.client.get(onward, headers={"sec-fetch-site": "same-origin"})
        assert (sent(setup), names(setup)) == (0, [])


async def test_a_password_that_a_browser_adds_by_itself_begins_nothing(servers: Servers, tmp_path: Path) -> None:  # T70
    async with started(servers, tmp_path) as setup, httpx2.AsyncClient(trust_env=False) as browser:
        for site in ("cross-site", "same-site"):
            fields = {"sec-fetch-site": site, "sec-fetch-mode": "navigate"}
            page = await browser.get(start(setup), headers=fields, auth=("any", setup.api.keys["ben"]))
            assert (page.status_code, sent(setup), names(setup)) == (200, 0, [])


async def test_programs_with_a_key_and_our_own_pages_need_no_form(servers: Servers, tmp_path: Path) -> None:
    async with started(servers, tmp_path) as setup, setup.signed_in("eve") as browser:
        async with httpx2.AsyncClient(trust_env=False, headers=setup.key("ben")) as program:
            assert (await program.get(start(setup))).status_code == 303
        ours = await browser.client.get(start(setup), headers={"sec-fetch-site": "same-origin"})
        assert ours.status_code == 303
        async with httpx2.AsyncClient(trust_env=False, headers={"authorization": "Bearer mapk_no_key"}) as stranger:
            assert (await stranger.get(start(setup))).status_code == 401
        assert len(names(setup)) == 2


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ({"mcp_server_url": "http://169.254.169.254/latest"}, 422),
        ({"mcp_server_url": "javascript:alert(1)"}, 422),
        ({"mcp_server_url": ""}, 422),
        ({"scopes": 'a,b"c'}, 422),
        ({"account": "No"}, 422),
        ({"return_origin": "https://evil.example"}, 422),
        ({"return_origin": "*"}, 422),
    ],
)
async def test_what_breaks_a_rule_is_refused_by_the_page(
    servers: Servers, tmp_path: Path, query: dict[str, str], status: int
) -> None:
    async with started(servers, tmp_path) as setup, setup.signed_in("ben") as browser:
        page = await browser.open(start(setup, **query))
        assert page.status_code == status
        assert not Page(page.text).forms
        assert sent(setup) == 0


@pytest.mark.parametrize(("adhoc", "member", "admin"), [("off", 403, 403), ("admin", 403, 200), ("member", 200, 200)])
async def test_the_configuration_says_who_may(
    servers: Servers, tmp_path: Path, adhoc: str, member: int, admin: int
) -> None:
    async with (
        started(servers, tmp_path, adhoc=adhoc) as setup,
        setup.signed_in("ben") as ben,
        setup.signed_in("ada") as ada,
    ):
        assert (await ben.open(start(setup))).status_code == member
        assert (await ada.open(start(setup))).status_code == admin


async def test_a_user_who_declines_and_one_who_consents_are_told_apart_by_the_last_page(
    servers: Servers, tmp_path: Path
) -> None:
    async with started(servers, tmp_path) as setup, setup.signed_in("ben") as browser:
        setup.issuer.authorize_error = ("access_denied", "no")
        flow = (await setup.api.ben.post(f"/servers/{(await setup.make())['id']}/flows", json={})).json()
        page = await browser.follow(flow["connect_url"])
        assert page.status_code == 400
        assert page.headers["cross-origin-opener-policy"] == "unsafe-none"
        assert f'data-origin="{APP}"' in page.text
        assert "&#34;status&#34;: &#34;failed&#34;" in page.text
        setup.issuer.authorize_error = None
        flow = (await setup.api.ben.post(f"/servers/{flow['server']}/flows", json={})).json()
        page = await browser.follow(flow["connect_url"])
        assert "&#34;status&#34;: &#34;connected&#34;" in page.text
        assert f"&#34;flow&#34;: &#34;{flow['id']}&#34;" in page.text
        assert f"&#34;server&#34;: &#34;{flow['server']}&#34;" in page.text
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


async def test_the_last_page_of_other_flows_has_no_script(servers: Servers, tmp_path: Path) -> None:  # T71
    async with started(servers, tmp_path) as setup, setup.signed_in("ben") as browser:
        await setup.make()
        async with setup.mcp("tickets", "ben") as client:
            answer = await client.call("echo", text="x")
        found = re.search(r"http://[^\s\"\\]+/connect/[^\s\"\\]+", str(answer.message))
        assert found
        page = await browser.follow(found[0].rstrip("'"))
        assert page.status_code == 200
        assert "script" not in page.text
        assert page.headers["cross-origin-opener-policy"] == "same-origin"


async def test_if_callers_are_not_identified_the_link_of_the_dashboard_is_needed(
    servers: Servers, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server()
    admin = {"allow_private": list(LOOPBACK)}
    async with running_proxy(tmp_path, {"notes": upstream.url}, admin=admin) as proxy, Browser() as browser:
        url = f"{proxy.origin}/oauth/start?mcp_server_url={quote(upstream.url)}"
        page = await browser.open(url)
        assert page.status_code == 401
        assert "mcp-auth-proxy dashboard" in page.text
        api = proxy.application.site.api
        assert api is not None
        link = await new_link(Sessions(api.context.database), now=time.time())
        await browser.client.get(f"{proxy.origin}/sign-in?link={link}", headers={"sec-fetch-site": "none"})
        assert Page((await browser.open(url)).text).forms
        assert upstream.requests == []


async def test_a_program_is_answered_as_by_the_rest_of_the_api(servers: Servers, tmp_path: Path) -> None:
    async with started(servers, tmp_path) as setup:
        api = setup.api
        assert_problem(await api.nobody.get("/oauth/start"), 401, "unauthenticated")
        wrong = {"mcp_server_url": "ftp://x", "scopes": 'a"b', "account": "No", "return_origin": "https://evil.example"}
        problem = assert_problem(await api.ben.get("/oauth/start", params=wrong), 422, "invalid")
        assert [it["loc"] for it in problem["errors"]] == [["query", name] for name in wrong]
        assert_problem(await api.ben.put("/oauth/start"), 405, "method-not-allowed")
        browser = await api.nobody.get("/oauth/start", headers={"accept": "text/html,*/*;q=0.8"})
        assert (browser.status_code, browser.headers["location"][:9]) == (303, "/sign-in?")
