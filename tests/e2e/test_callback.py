"""The link and the callback: which responses are accepted, from which browser, how often, and the pages shown."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx2
import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser, Page, consent
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import PlainClient
from fakes.proxy import link_in, running_proxy
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.config.settings import Address

Change = Callable[[dict[str, str], str], list[tuple[str, str]]]
PAGES = ["/", "/nothing", "/connect/notes", "/connect/none?flow=1", "/oauth/callback", "/oauth/callback?state=1"]
ADVERTISED = "authorization_response_iss_parameter_supported"


def without(name: str) -> Change:
    return lambda params, issuer: [pair for pair in params.items() if pair[0] != name]


def with_(name: str, value: str) -> Change:
    return lambda params, issuer: [*{**params, name: value}.items()]


def twice(name: str, value: str) -> Change:
    return lambda params, issuer: [*params.items(), (name, value)]


def changed(url: str, change: Change, issuer: str) -> str:
    """The callback's URL with other parameters."""
    base, _, query = url.partition("?")
    return f"{base}?{urlencode(change(dict(parse_qsl(query)), issuer))}"


def assert_page(page: httpx2.Response, status: int, *, script: bool = False) -> None:
    """A page of ours: at most a script file of ours runs on it, nobody may frame it, and nothing of it is kept."""
    assert page.status_code == status, page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy  # T17
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert "unsafe" not in policy
    assert ("<script" in page.text) is script
    assert not re.search(r"<script(?! src=./static/)|<[^>]* (on[a-z]+|style)=", page.text)


BAD_STATES: dict[str, Change] = {
    "another state": with_("state", "x" * 43),
    "no state": without("state"),
    "an empty state": with_("state", ""),
    "two states": twice("state", "x" * 43),
}


@pytest.mark.parametrize("change", BAD_STATES.values(), ids=BAD_STATES)
async def test_a_bad_state_asks_for_no_token_and_the_right_one_still_works(  # T14
    servers: Servers, tmp_path: Path, change: Change
) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        callback = await browser.stop_before(await setup.link())
        assert_page(bad := await browser.open(changed(callback, change, setup.issuer.issuer)), bad.status_code)
        assert bad.status_code in (400, 403)
        assert setup.issuer.token_requests() == 0
        assert_page(await browser.follow(callback), 200)
        assert (await setup.ask("in")).text == "in"


async def test_another_browser_is_refused_and_the_right_one_still_finishes(  # T13
    servers: Servers, tmp_path: Path
) -> None:
    async with (
        proxy_setup(servers, tmp_path) as setup,
        Browser() as browser,
        Browser() as without_cookie,
        Browser() as other,
    ):
        link = await setup.link()
        callback = await browser.stop_before(link)
        await other.stop_before(link)
        assert_page(await without_cookie.follow(callback), 403)
        assert_page(await other.follow(callback), 403)
        assert setup.issuer.token_requests() == 0
        assert_page(await browser.follow(callback), 200)
        assert (await setup.ask("in")).text == "in"


async def test_a_repeated_callback_is_400_and_asks_for_no_token(servers: Servers, tmp_path: Path) -> None:  # T12
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        callback = await browser.stop_before(await setup.link())
        pages = await asyncio.gather(*(browser.follow(callback) for _ in range(5)))
        assert sorted(page.status_code for page in pages) == [200, 400, 400, 400, 400]
        assert_page(await browser.follow(callback), 400)
        assert setup.issuer.token_requests() == 1
        assert (await setup.ask("in")).text == "in"


async def test_after_ten_minutes_a_callback_is_400(servers: Servers, tmp_path: Path) -> None:  # T12
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        callback = await browser.stop_before(link)
        setup.clock.ahead += 601
        assert_page(await browser.follow(callback), 400)
        assert_page(await browser.open(link), 410)
        assert setup.issuer.token_requests() == 0
        second = await setup.link()
        assert second != link
        assert (await consent(second)).status_code == 200
        assert (await setup.ask("in")).text == "in"


BAD_ISSUERS: dict[str, Change] = {
    "another iss": with_("iss", "https://evil.example"),
    "iss with a slash": lambda params, issuer: [*{**params, "iss": f"{issuer}/"}.items()],
    "iss in capitals": lambda params, issuer: [*{**params, "iss": issuer.replace("http", "HTTP")}.items()],
    "no iss though advertised": without("iss"),
    "two iss": lambda params, issuer: [*params.items(), ("iss", issuer)],
}


@pytest.mark.parametrize("change", BAD_ISSUERS.values(), ids=BAD_ISSUERS)
@pytest.mark.parametrize("error", [None, ("server_error", "MUST NOT BE SHOWN")], ids=["code", "error"])
async def test_a_wrong_issuer_is_refused_before_anything_else_is_read(  # T9
    servers: Servers, tmp_path: Path, change: Change, error: tuple[str, str] | None
) -> None:
    async with (
        proxy_setup(servers, tmp_path, wait="20s", issuer={"authorize_error": error}) as setup,
        Browser() as browser,
    ):
        call = asyncio.create_task(setup.ask())
        callback = await browser.stop_before(await setup.proxy.next_link())
        assert_page(page := await browser.open(changed(callback, change, setup.issuer.issuer)), 400)
        answer = await call
        assert answer.status == 200
        for text in (page.text, answer.error["message"]):
            assert "MUST NOT BE SHOWN" not in text
            assert "iss" in text
        assert setup.issuer.token_requests() == 0


async def test_an_issuer_that_promises_no_iss_need_not_send_it(servers: Servers, tmp_path: Path) -> None:  # T9
    async with proxy_setup(servers, tmp_path, issuer={"iss": None, "metadata_changes": {ADVERTISED: False}}) as setup:
        await setup.connect()


async def test_an_error_is_shown_escaped_and_sent_to_waiting_requests(servers: Servers, tmp_path: Path) -> None:  # T15
    error = ("access_denied", "<script>alert(1)</script><img src=x onerror=alert(2)>")
    async with proxy_setup(servers, tmp_path, wait="20s", issuer={"authorize_error": error}) as setup:
        call = asyncio.create_task(setup.ask())
        page = await consent(await setup.proxy.next_link(1))
        assert_page(page, 400)
        assert "<img" not in page.text
        answer = await call
        assert answer.status == 200
        assert "access_denied" in answer.error["message"]
        assert "/connect/" not in str(answer.message)
        setup.issuer.authorize_error = None
        call = asyncio.create_task(setup.ask("again"))
        assert (await consent(await setup.proxy.next_link(2))).status_code == 200
        assert (await call).text == "again"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (FakeResponse.json({"error": "invalid_grant", "error_description": "<b>no</b>"}, 400), "invalid_grant"),
        (FakeResponse.html(status=500), "500"),
        (FakeResponse.drop(), "token"),
        (FakeResponse.json({"access_token": "x", "token_type": "mac"}), "token_type"),
    ],
    ids=["refused", "broken", "dropped", "unusable"],
)
async def test_a_failed_token_request_is_shown_to_browser_and_client(
    servers: Servers, tmp_path: Path, answer: FakeResponse, text: str
) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s", issuer={"answers": {"token": answer}}) as setup:
        call = asyncio.create_task(setup.ask())
        page = await consent(await setup.proxy.next_link())
        assert page.status_code >= 400
        assert text in page.text
        assert "<b>" not in page.text
        reply = await call
        assert text in reply.error["message"]
        assert reply.status not in (401, 500)
        assert "/connect/" not in str(reply.message)


# the link


async def test_a_link_that_has_ended_says_how(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        assert_page(await browser.open(f"{link}x"), 404)
        assert_page(await browser.open(link.partition("?")[0]), 404)
        assert_page(await browser.open(link.replace("/notes?", "/other?")), 404)
        assert setup.issuer.authorizations == 0
        assert (await browser.follow(link)).status_code == 200
        again = await browser.open(link)
        assert_page(again, 200)
        assert "notes is connected" in again.text
        assert setup.issuer.authorizations == 1
        setup.issuer.end_grants()
        await setup.ask()
        over = await browser.open(link)
        assert_page(over, 410)
        assert "no longer connected" in over.text


async def test_a_link_opened_under_another_loopback_name_ends_well(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        assert "//127.0.0.1:" in link
        assert_page(await browser.follow(link.replace("127.0.0.1", "localhost")), 200)
        assert link.partition("?")[0] == browser.hops[1].partition("?")[0]
        assert (await setup.ask("in")).text == "in"
        assert setup.issuer.authorizations == 1


@asynccontextmanager
async def link_under(servers: Servers, folder: Path, public: str) -> AsyncIterator[tuple[str, str, str]]:
    """A proxy on 127.0.0.1 that says it is reached under ``public``: its address, public_url, and a link's path."""
    upstream = await servers.mcp_server(await servers.authorization_server())
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    address, public_url = f"http://127.0.0.1:{port}", public.format(port)
    listen, wait = Address("127.0.0.1", port), {"wait": "0s"}
    async with (
        running_proxy(
            folder, {"notes": upstream.url}, listen=listen, public_url=public_url, authorization=wait
        ) as proxy,
        PlainClient(f"{address}/notes/mcp") as client,
    ):
        await client.call("echo")
        yield address, public_url, (await proxy.next_link()).removeprefix(public_url)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.0.0.2"])
@pytest.mark.parametrize("public", ["http://127.0.0.1:{}", "http://localhost:{}", "http://[::1]:{}"])
async def test_the_browser_is_redirected_to_the_loopback_name_of_the_callback(
    servers: Servers, tmp_path: Path, name: str, public: str
) -> None:
    async with link_under(servers, tmp_path, public) as (address, public_url, path), Browser() as browser:

        async def location(path: str, method: str = "GET") -> str:
            page = await browser.client.request(method, f"{address}{path}", headers={"host": name})
            assert_page(page, 303)
            return str(page.headers["location"])

        led = await location(path)
        if name.lower() == urlsplit(public_url).netloc.rpartition(":")[0]:
            assert "/authorize?" in led
        else:
            assert led.startswith(f"{public_url}{path}")
            # Something on the way may change the Host: even then it is no loop.
            assert "/authorize?" in await location(led.removeprefix(public_url))
            assert "/authorize?" in await location(path, "HEAD")


@pytest.mark.parametrize(
    "path", ["/connect/a%0d%0aset-cookie:%20x=1?flow=b%0d%0ac", "/connect/%e2%82%ac?flow=%e2%82%ac"]
)
async def test_nothing_in_a_link_can_change_the_host_of_the_redirect(
    servers: Servers, tmp_path: Path, path: str
) -> None:  # T18
    async with link_under(servers, tmp_path, "http://localhost:{}") as (address, public_url, _), Browser() as browser:
        page = await browser.open(f"{address}{path}")
        assert "set-cookie" not in page.headers
        assert page.headers["location"].lower().startswith(f"{public_url}{path.partition('=')[0].replace(':', '%3a')}")


async def test_a_browser_is_not_redirected_to_another_machine(servers: Servers, tmp_path: Path) -> None:
    async with link_under(servers, tmp_path, "https://proxy.example:{}") as (address, _, path), Browser() as browser:
        page = await browser.open(f"{address}{path}")
        assert "/authorize?" in page.headers["location"]


async def test_a_link_of_one_server_is_not_valid_for_another(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    config = {name: (await servers.mcp_server(issuer)).url for name in ("one", "two")}
    async with (
        running_proxy(tmp_path, dict(config), authorization={"wait": "0s"}) as proxy,
        proxy.client("one") as client,
        Browser() as browser,
    ):
        await client.call("echo")
        link = await proxy.next_link()
        assert_page(await browser.open(link.replace("/one?", "/two?")), 404)


async def test_connecting_needs_no_script(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        page = await browser.open(link)
        assert "<script" not in page.text
        (onward,) = Page(page.text).links
        assert onward.startswith(f"{setup.issuer.issuer}/authorize?")
        assert page.headers.get("location", onward) == onward
        finished = await browser.follow(onward)
        assert_page(finished, 200)
        assert "close this tab" in finished.text


async def test_an_attempt_sets_one_cookie_that_only_the_callback_gets(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        page = await browser.open(await setup.link())
        (cookie,) = page.headers.get_list("set-cookie")
        fields = [field.strip().lower() for field in cookie.split(";")[1:]]
        assert {"httponly", "samesite=lax", "path=/oauth/callback"} <= set(fields)


@pytest.mark.parametrize("name", ["next", "redirect_uri", "redirect", "return_to", "url"])
async def test_no_parameter_leads_elsewhere(servers: Servers, tmp_path: Path, name: str) -> None:  # T18
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        evil = urlencode({name: "https://evil.example/"})
        page = await browser.open(f"{await setup.link()}&{evil}")
        onward = page.headers["location"]
        assert urlsplit(onward).netloc == urlsplit(setup.issuer.issuer).netloc
        assert "evil" not in onward + page.text
        callback = await browser.stop_before(setup.proxy.links[0])
        finished = await browser.follow(f"{callback}&{evil}")
        assert browser.hops[-1] == f"{setup.proxy.origin}/oauth/connected/notes"
        assert_page(finished, 200)
        assert "evil" not in finished.text


@pytest.mark.parametrize(("left", "used"), [(40, 1), (40, 2), (0, 2), (-40, 2)])
async def test_near_its_end_a_link_is_replaced_and_either_lets_all_requests_continue(
    servers: Servers, tmp_path: Path, left: int, used: int
) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        calls = [asyncio.create_task(setup.ask("1"))]
        await setup.proxy.next_link()
        setup.clock.ahead += 600 - left
        calls += [asyncio.create_task(setup.ask("2")) for _ in range(5)]
        await setup.proxy.next_link(2)
        assert_page(await consent(setup.proxy.links[used - 1]), 200)
        assert [(await call).text for call in calls] == ["1"] + ["2"] * 5
        assert (len(setup.proxy.links), setup.issuer.authorizations) == (2, 1)


async def test_a_request_that_waited_beyond_the_end_of_its_link_gets_another(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, wait="2s") as setup:
        calls = [asyncio.create_task(setup.ask()) for _ in range(5)]
        first = await setup.proxy.next_link()
        setup.clock.ahead += 590
        (link,) = {link_in((await call).message) for call in calls}
        assert link != first
        assert setup.proxy.links == [first, link]
        setup.clock.ahead += 500
        assert_page(await consent(link), 200)
        assert (await setup.ask("in")).text == "in"


async def test_a_link_is_given_out_again_while_it_has_a_minute_left(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        first = await setup.link()
        setup.clock.ahead += 530
        assert await setup.link() == first
        assert setup.proxy.links == [first]
        setup.clock.ahead += 20
        assert await setup.link() != first


async def test_requests_of_two_processes_continue_whichever_link_is_used(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, wait="20s") as setup:
        first = asyncio.create_task(setup.ask("1"))
        await setup.proxy.next_link()
        setup.clock.ahead += 560
        async with (
            running_proxy(tmp_path, {"notes": setup.upstream.url}, clock=setup.clock) as other,
            other.client("notes") as client,
        ):
            second = asyncio.create_task(client.call("echo", text="2"))
            await other.next_link()
            assert_page(await consent(setup.proxy.links[0]), 200)
            assert [(await first).text, (await second).text] == ["1", "2"]
            assert setup.issuer.authorizations == 1


async def test_a_second_attempt_does_not_affect_the_first(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        link = await setup.link()
        first = await browser.stop_before(link)
        await browser.stop_before(link)
        assert_page(await browser.follow(first), 200)


async def test_a_callback_after_a_restart_finishes_the_flow(servers: Servers, tmp_path: Path) -> None:
    issuer: FakeAuthorizationServer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    config, wait = {"notes": upstream.url}, {"wait": "20s"}
    async with Browser() as browser:
        async with running_proxy(tmp_path, dict(config), authorization=wait) as proxy, proxy.client("notes") as client:
            call = asyncio.create_task(client.call("echo"))
            callback = await browser.stop_before(await proxy.next_link())
            call.cancel()
            parts = urlsplit(proxy.origin)
        address = Address(str(parts.hostname), int(parts.port or 0))
        async with running_proxy(tmp_path, dict(config), listen=address, authorization=wait) as proxy:
            assert_page(await browser.follow(callback), 200)
            async with proxy.client("notes") as client:
                assert (await client.call("echo", text="in")).text == "in"
            assert proxy.links == []
    assert issuer.token_requests() == 1


async def test_old_flows_are_deleted_while_the_proxy_runs(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser, asyncio.timeout(10):
        link = await setup.link()
        setup.clock.ahead += 3601
        assert_page(await browser.open(link), 410)
        setup.clock.ahead += 31 * 86_400
        while (await browser.open(link)).status_code != 404:
            pass


async def test_every_page_forbids_framing_and_script(servers: Servers, tmp_path: Path) -> None:  # T17
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        for path in PAGES:
            page = await browser.open(f"{setup.proxy.origin}{path}")
            assert_page(page, page.status_code, script=path == "/")
        assert_page(page := await browser.open(await setup.link()), page.status_code)
