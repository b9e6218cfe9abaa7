"""A link is opened, and finished, by the user that it was made for: nobody gives others an account, or takes one."""

from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import httpx2

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.team import Team, add_member, post, team
from mcp_auth_proxy.models import Role


def path_of(link: str) -> str:
    parts = urlsplit(link)
    return f"{parts.path}?{parts.query}"


def assert_nothing_was_done(team: Team, page: httpx2.Response, status: int = 403) -> None:
    """No state was made, nothing was sent, nobody is connected."""
    assert page.status_code == status, page.text
    assert "set-cookie" not in page.headers
    assert (team.issuer.authorizations, team.issuer.token_requests("authorization_code")) == (0, 0)


async def test_a_link_in_the_browser_of_another_user_is_refused(servers: Servers, tmp_path: Path) -> None:  # T51
    async with team(servers, tmp_path, "anna", "bert") as setup, Browser() as browser:
        link = await setup.link("anna")
        await setup.sign_in(browser, "bert")
        page = await browser.open(link)
        assert_nothing_was_done(setup, page)
        assert "You are signed in as bert" in page.text
        # The form that confirms is refused too, before anything else is looked at.
        assert_nothing_was_done(setup, await post(browser, link, token="x"))
        # It is still good for its own user.
        await setup.sign_in(browser, "anna")
        assert (await browser.follow(link)).status_code == 200
        async with setup.client("anna") as client:
            assert (await client.call("echo", text="mine")).text == "mine"
        assert "/connect/" in await setup.link("bert")


async def test_without_a_session_the_sign_in_comes_first_and_leads_back_to_the_link(
    servers: Servers, tmp_path: Path
) -> None:  # T51
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        link = await setup.link("anna")
        page = await browser.open(link)
        assert_nothing_was_done(setup, page, 303)
        assert page.headers["location"] == f"/sign-in?next={quote(path_of(link), safe='')}"
        form = await browser.open(f"{setup.proxy.origin}{page.headers['location']}")
        assert form.status_code == 200
        assert f'value="{path_of(link)}"' in form.text
        signed_in = await setup.sign_in(browser, "anna", path_of(link))
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, path_of(link))
        finished = await browser.follow(link)
        assert finished.status_code == 200
        assert browser.hops[-1] == f"{setup.proxy.origin}/oauth/connected/notes"


async def test_a_session_that_is_lost_or_changed_before_the_callback_is_refused(
    servers: Servers, tmp_path: Path
) -> None:  # T52
    async with team(servers, tmp_path, "anna", "bert") as setup, Browser() as browser:
        await setup.sign_in(browser, "anna")
        callback = await browser.stop_before(await setup.link("anna"))
        for become in (setup.sign_out(browser), setup.sign_in(browser, "bert")):
            await become
            page = await browser.open(callback)
            assert page.status_code == 403
            assert setup.issuer.token_requests("authorization_code") == 0
        # The attempt stays good for the user that it belongs to.
        await setup.sign_in(browser, "anna")
        assert (await browser.follow(callback)).status_code == 200
        assert setup.issuer.token_requests("authorization_code") == 1


async def test_the_address_of_the_authorization_server_is_of_no_use_to_another_user(
    servers: Servers, tmp_path: Path
) -> None:  # T53
    async with team(servers, tmp_path, "anna", "bert") as setup, Browser() as annas, Browser() as berts:
        for browser, name in ((annas, "anna"), (berts, "bert")):
            await setup.sign_in(browser, name)
        opened = await annas.open(await setup.link("anna"))
        onward = opened.headers["location"]
        assert onward.startswith(setup.issuer.issuer)
        page = await berts.follow(onward, until="/oauth/callback")
        assert page.status_code == 403
        assert "another browser" in page.text
        assert setup.issuer.token_requests("authorization_code") == 0
        # Nor with a session of the same user.
        await setup.sign_in(berts, "anna")
        assert (await berts.follow(onward, until="/oauth/callback")).status_code == 403
        assert setup.issuer.token_requests("authorization_code") == 0


async def test_the_button_at_an_address_authorizes_its_own_user_alone(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna", "bert") as setup, Browser() as annas, Browser() as berts:
        origin = setup.proxy.origin
        assert (await annas.open(f"{origin}/notes/mcp")).headers["location"] == "/sign-in?next=%2Fnotes%2Fmcp"
        assert (await post(annas, f"{origin}/connect/notes/start")).headers["location"] == "/sign-in"
        for browser, name in ((annas, "anna"), (berts, "bert")):
            await setup.sign_in(browser, name)
        started = await post(annas, f"{origin}/connect/notes/start")
        link = started.headers["location"]
        assert (await berts.open(link)).status_code == 403
        assert (await annas.follow(link)).status_code == 200
        for browser, status in ((annas, 200), (berts, 404)):
            assert (await browser.open(f"{origin}/oauth/connected/notes")).status_code == status
        async with setup.client("anna") as client:
            assert (await client.call("echo", text="in")).text == "in"


async def test_an_account_has_an_address_and_a_link_of_its_own(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        origin = setup.proxy.origin
        await setup.sign_in(browser, "anna")
        credential = {"authorization": f"Bearer {setup.keys['anna']}"}
        async with setup.proxy.client("notes@work", headers=credential) as client:
            assert "Server notes@work needs your authorization" in (await client.call("echo", text="x")).text
        page = await browser.open(f"{origin}/notes@work/mcp")
        assert f"{origin}/notes@work/mcp" in page.text
        started = await post(browser, f"{origin}/connect/notes@work/start")
        assert (await browser.follow(started.headers["location"])).status_code == 200
        assert browser.hops[-1] == f"{origin}/oauth/connected/notes@work"
        assert (await browser.open(f"{origin}/oauth/connected/notes")).status_code == 404


SHARED = {"grant_owner": "shared"}


async def test_a_shared_server_is_authorized_by_an_admin_alone(servers: Servers, tmp_path: Path) -> None:
    # T51
    admins_key = await add_member(tmp_path, "root", role=Role.ADMIN)
    async with team(servers, tmp_path, "anna", server=SHARED) as setup, Browser() as annas, Browser() as admins:
        origin = setup.proxy.origin
        await setup.sign_in(annas, "anna")
        await post(admins, f"{origin}/sign-in", key=admins_key)
        page = await annas.open(f"{origin}/notes/mcp")
        assert page.status_code == 200
        assert "<form" not in page.text
        assert "only an admin" in page.text
        refused = await post(annas, f"{origin}/connect/notes/start")
        assert_nothing_was_done(setup, refused)
        started = await post(admins, f"{origin}/connect/notes/start")
        link = started.headers["location"]
        page = await annas.open(link)
        assert_nothing_was_done(setup, page)
        assert "Ask an admin" in page.text
        assert (await admins.follow(link)).status_code == 200
        async with setup.client("anna") as client:
            assert (await client.call("echo", text="ours")).text == "ours"
        assert (await annas.open(f"{origin}/oauth/connected/notes")).status_code == 200


async def test_a_server_that_a_user_may_not_use_has_no_page_for_them(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna", "bert", server={"allow": ["a*"]}) as setup:
        origin = setup.proxy.origin
        for name, status in (("anna", 200), ("bert", 404)):
            async with Browser() as browser:
                await setup.sign_in(browser, name)
                assert (f"{origin}/notes/mcp" in (await browser.open(f"{origin}/")).text) is (status == 200)
                assert (await browser.open(f"{origin}/notes/mcp")).status_code == status
                if status == 404:
                    assert (await post(browser, f"{origin}/connect/notes/start")).status_code == status


async def test_whom_a_web_server_in_front_names_opens_their_own_links_alone(servers: Servers, tmp_path: Path) -> None:
    # T51, T52
    header: dict[str, object] = {"name": "X-Forwarded-User", "from": ["127.0.0.0/8"]}
    header |= {"secret": "s3cret", "secret_header": "X-Proxy-Secret"}
    inbound = {"mode": "trusted_header", "trusted_header": header}
    async with team(servers, tmp_path, inbound=inbound) as setup, Browser() as annas, Browser() as berts:
        origin = setup.proxy.origin
        for browser, name in ((annas, "anna"), (berts, "bert")):
            browser.client.headers.update({"x-forwarded-user": name, "x-proxy-secret": "s3cret"})
        assert "signed in as anna" in (await annas.open(f"{origin}/")).text
        started = await post(annas, f"{origin}/connect/notes/start")
        link = started.headers["location"]
        assert_nothing_was_done(setup, await berts.open(link))
        annas_way = await annas.open(link)
        onward = annas_way.headers["location"]
        assert onward.startswith(setup.issuer.issuer)
        # Another name in the same browser, before the callback.
        annas.client.headers["x-forwarded-user"] = "bert"
        callback = urljoin(onward, (await annas.open(onward)).headers["location"])
        assert (await annas.open(callback)).status_code == 403
        annas.client.headers["x-forwarded-user"] = "anna"
        assert (await annas.follow(callback)).status_code == 200
        # T63: a forged name is refused, and no session counts beside it.
        for forged in ({"x-proxy-secret": "wrong"}, {"x_forwarded_user": "bert"}):
            page = await annas.client.get(f"{origin}/", headers=forged)
            assert page.status_code in (400, 401)
