"""The dashboard over a socket: what it shows of each state, to whom, and how long a stream of changes lasts."""

import asyncio
import json
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.http_exchange import FakeResponse
from fakes.proxy import running_proxy
from fakes.proxy_setup import ProxySetup, proxy_setup
from fakes.team import post
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.identity.sessions import new_link
from mcp_auth_proxy.models import LOCAL, Account, Scope
from mcp_auth_proxy.store.sessions import Sessions
from mcp_auth_proxy.web.dashboard import stream
from mcp_auth_proxy.web.dashboard.client_setup import KEY_VARIABLE, client_setups
from web.api.api_setup import ApiSetup, api_setup

PAGE = {"sec-fetch-site": "same-origin"}


def states(text: str) -> dict[str, str]:
    """Return the state of each card of a page."""
    return dict(re.findall(r'data-server="([^"]+)" data-state="([^"]+)"', text))


def token_of(text: str) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', text)
    assert found is not None
    return found[1]


@asynccontextmanager
async def signed_in(setup: ApiSetup, name: str) -> AsyncIterator[Browser]:
    """Yield a browser in which somebody has signed in with their key."""
    async with Browser() as browser:
        done = await post(browser, f"{setup.proxy.origin}/sign-in", key=setup.keys[name], next="/")
        assert done.status_code == 303, done.text
        yield browser


async def shown(setup: ApiSetup, name: str) -> str:
    async with signed_in(setup, name) as browser:
        return (await browser.open(f"{setup.proxy.origin}/")).text


class Stream:
    """The events of a stream, as they come."""

    def __init__(self, response: httpx2.Response) -> None:
        self._lines = response.aiter_lines()

    async def next(self) -> tuple[str, Any]:
        """Return the name and the data of the next event; ("", None) at the end of the stream."""
        name = ""
        async with asyncio.timeout(15):
            async for line in self._lines:
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    return name, json.loads(line.removeprefix("data: "))
        return "", None


@asynccontextmanager
async def streaming(origin: str, browser: Browser) -> AsyncIterator[Stream]:
    async with browser.client.stream("GET", f"{origin}/static/live", headers=PAGE) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield Stream(response)


async def test_every_state_has_its_word_and_what_helps(tmp_path: Path) -> None:
    names = ["good", "worn", "dead", "over", "down", "none"]
    async with api_setup(tmp_path, {name: f"http://127.0.0.1:9/{name}" for name in names}) as setup:
        now = setup.clock()
        resource = "http://127.0.0.1:9"
        await setup.add_grant("prn_ben", "good", resource=resource, refresh_token="r")
        await setup.add_grant("prn_ben", "worn", resource=resource, refresh_token=None, expires_at=now + 90)
        await setup.add_grant("prn_ben", "dead", resource=resource, refresh_token="r", expires_at=now - 5)
        await setup.add_grant("prn_ben", "over", resource=resource, refresh_token=None, expires_at=now - 5)
        setup.proxy.application.broker.outages.note_unreachable("down", "nobody answers at <9>")
        text = await shown(setup, "ben")
    assert states(text) == {
        "good": "connected", "worn": "degraded", "dead": "expired", "over": "ended", "down": "unreachable",
        "none": "needs-consent",
    }  # fmt: skip
    assert "nobody answers at &lt;9&gt;" in text
    assert "Check that the server runs" in text
    assert "can’t be renewed" in text
    for name, button in (("good", "Reconnect"), ("over", "Reconnect"), ("none", "Connect")):
        assert f'>{button}<span class="visually-hidden"> {name}</span>' in text


async def test_a_renewal_that_fails_is_told_and_when_the_connection_was_used(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path, issuer={"token_seconds": 3600.0}) as setup, Browser() as browser:
        origin = setup.proxy.origin
        assert "Last used</dt><dd>–" in (await browser.open(f"{origin}/")).text
        await setup.connect()
        page = (await browser.open(f"{origin}/")).text
        assert states(page) == {"notes": "connected"}
        assert re.search(r"Last used</dt><dd><time datetime=", page)
        assert "Recent events" in page
        setup.issuer.answers = {"token": FakeResponse(status=503)}
        setup.clock.ahead += 3500
        await setup.ask()
        for _ in range(200):
            page = (await browser.open(f"{origin}/")).text
            if states(page) == {"notes": "retrying"}:
                break
            await asyncio.sleep(0.02)
        assert "Last error:" in page
        assert "not renewed, is tried again" in page
        setup.issuer.answers = {"token": FakeResponse.json({"error": "invalid_grant"}, status=400)}
        setup.skip_pause()
        await setup.ask()
        page = (await browser.open(f"{origin}/")).text
        assert "ended: " in page


async def test_each_account_has_a_card_and_a_member_sees_no_other(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as setup:
        await setup.add_grant("prn_ben", "notes", resource="http://127.0.0.1:9")
        await setup.add_grant("prn_ben", "notes", "work", resource="http://127.0.0.1:9")
        setup.proxy.application.broker.journal.connected(Account("prn_ben", "notes"))
        assert states(await shown(setup, "ben")) == {
            "notes": "connected", "notes@work": "connected", "linear": "needs-consent",
        }  # fmt: skip
        eve, ada, zoe = [await shown(setup, name) for name in ("eve", "ada", "zoe")]
        assert states(eve) == {"notes": "needs-consent", "linear": "needs-consent"}
        # Events: admins see those of their project, members their own.
        assert [("· ben" in text) for text in (eve, ada, zoe)] == [False, True, False]
        assert "· ben" in await shown(setup, "ben")


async def test_the_audit_trail_is_shown_in_the_rights_of_who_looks(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as setup:
        assert (await setup.ben.post("/keys", json={"name": "laptop"})).status_code == 201
        texts = {name: await shown(setup, name) for name in ("ada", "ben", "eve", "zoe")}
    assert {name: "made an API key" in text for name, text in texts.items()} == {
        "ada": True, "ben": True, "eve": False, "zoe": False,
    }  # fmt: skip


async def test_a_form_needs_its_token_and_a_credential_that_may_change_something(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as setup:
        await setup.add_grant("prn_ben", "notes", resource="http://127.0.0.1:9")
        url = f"{setup.proxy.origin}/connect/notes/disconnect"
        async with signed_in(setup, "ben") as browser:
            token = token_of((await browser.open(f"{setup.proxy.origin}/")).text)
            for given in ({}, {"token": ""}, {"token": token[::-1]}, {"token": "\u00e4"}):
                assert (await post(browser, url, **given)).status_code == 403
            assert (await post(browser, url, origin="https://evil.example", token=token)).status_code == 403
            assert (await browser.client.get(url)).status_code == 405
            async with signed_in(setup, "eve") as other:
                assert (await post(other, url, token=token)).status_code == 403
            assert states(await shown(setup, "ben"))["notes"] == "connected"
            done = await post(browser, url, token=token)
            assert (done.status_code, done.headers["location"]) == (303, "/")
            assert states((await browser.open(f"{setup.proxy.origin}/")).text)["notes"] == "needs-consent"
            gone = await post(browser, f"{setup.proxy.origin}/connect/other/disconnect", token=token)
            assert gone.status_code == 404
        async with Browser() as nobody:
            assert (await post(nobody, url, token=token)).headers["location"].startswith("/sign-in")
        events = (await setup.ada.get("/events")).json()["items"]
        found = [(each["server_name"], each["outcome"]) for each in events if each["action"] == "connections.delete"]
        assert found == [("notes", "ok")]


async def test_a_key_for_calls_alone_may_look_and_connect(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as setup:
        await setup.add_grant("prn_ben", "notes", resource="http://127.0.0.1:9")
        setup.keys["ben"] = await setup.key_of("prn_ben", {Scope.MCP})
        text = await shown(setup, "ben")
        assert "Reconnect" in text
        assert "/disconnect" not in text
        async with signed_in(setup, "ben") as browser:
            refused = await post(browser, f"{setup.proxy.origin}/connect/notes/disconnect", token="x")
            assert refused.status_code == 403
            assert "may only look" in refused.text


async def test_what_all_share_is_for_admins(tmp_path: Path) -> None:
    entry = {"url": "http://127.0.0.1:9/mcp", "grant_owner": "shared"}
    async with api_setup(tmp_path, {"notes": entry}) as setup:
        await setup.add_grant("project:default", "notes", resource="http://127.0.0.1:9")
        ben, ada = await shown(setup, "ben"), await shown(setup, "ada")
        assert states(ben) == states(ada) == {"notes": "connected"}
        assert "shared by all" in ben
        assert "/connect/notes/" not in ben
        assert "/connect/notes/disconnect" in ada
        async with signed_in(setup, "ben") as browser:
            refused = await post(browser, f"{setup.proxy.origin}/connect/notes/disconnect", token="x")
            assert (refused.status_code, "only an admin" in refused.text) == (403, True)


async def test_a_caller_whom_a_web_server_names_has_a_token_without_a_session(tmp_path: Path) -> None:
    trusted = {
        "name": "x-user",
        "from": ["127.0.0.1/32"],
        "secret": "s3cret-value-of-the-proxy",
        "secret_header": "x-s",
    }
    inbound = {"mode": "trusted_header", "trusted_header": trusted}
    async with api_setup(tmp_path, inbound=inbound) as setup, Browser() as browser:
        browser.client.headers |= {"x-user": "ann", "x-s": "s3cret-value-of-the-proxy"}
        page = await browser.open(f"{setup.proxy.origin}/")
        (cookie,) = page.headers.get_list("set-cookie")
        assert {"httponly", "samesite=strict", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
        url = f"{setup.proxy.origin}/connect/notes/forget"
        assert (await post(browser, url, token=token_of(page.text))).status_code == 303
        browser.client.cookies.clear()
        assert (await post(browser, url, token=token_of(page.text))).status_code == 403


@asynccontextmanager
async def live(servers: Servers, folder: Path) -> AsyncIterator[tuple[ProxySetup, Browser]]:
    """Yield a proxy in mode ``none``, and a browser with the session of the dashboard."""
    async with proxy_setup(servers, folder) as setup, Browser() as browser:
        api = setup.proxy.application.site.api
        assert api is not None
        secret = await new_link(Sessions(api.context.database), now=setup.clock())
        assert (await browser.open(f"{setup.proxy.origin}/sign-in?link={secret}")).status_code == 303
        yield setup, browser


async def test_the_stream_tells_what_changes_and_nothing_else(servers: Servers, tmp_path: Path) -> None:
    async with live(servers, tmp_path) as (setup, browser), streaming(setup.proxy.origin, browser) as events:
        name, first = await events.next()
        assert (name, first["cards"][0]["word"]) == ("change", "needs consent")
        page = (await browser.open(f"{setup.proxy.origin}/")).text
        assert f'data-digest="{first["cards"][0]["digest"]}"' in page
        assert first["cards"][0]["html"].strip() in page
        await setup.connect()
        while first["cards"][0]["word"] != "connected":
            name, first = await events.next()
        assert 'data-state="connected"' in first["cards"][0]["html"]
        assert token_of(first["cards"][0]["html"])
        # Only the events change.
        setup.proxy.application.broker.journal.ended(Account(LOCAL, "other"), "x")
        _, last = await events.next()
        while last["events"] is None or "other" not in last["events"]:
            _, last = await events.next()
        assert [card["html"] for card in last["cards"]] == [None]


async def test_the_stream_ends_within_a_second_with_its_session(servers: Servers, tmp_path: Path) -> None:
    async with live(servers, tmp_path) as (setup, browser), streaming(setup.proxy.origin, browser) as events:
        await events.next()
        assert (await post(browser, f"{setup.proxy.origin}/sign-in/out")).status_code == 303
        begun = asyncio.get_running_loop().time()
        while (event := await events.next())[0] == "change":
            pass
        assert event == ("over", {})
        assert await events.next() == ("", None)
        # 1 s, and what a busy machine needs.
        assert asyncio.get_running_loop().time() - begun < 3 * stream.TICK + 1


async def test_the_stream_of_a_principal_that_is_disabled_ends(tmp_path: Path) -> None:  # T74
    async with api_setup(tmp_path) as setup, signed_in(setup, "ben") as browser:
        async with streaming(setup.proxy.origin, browser) as events:
            await events.next()
            assert (await setup.ada.patch("/principals/prn_ben", json={"status": "disabled"})).status_code == 200
            while (event := await events.next())[0] == "change":
                pass
            assert event == ("over", {})
        answer = await browser.client.get(f"{setup.proxy.origin}/static/live", headers=PAGE)
        assert answer.status_code == 401


async def test_streams_are_bounded_for_each_principal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_STREAMS_OF_ONE", 2)
    async with api_setup(tmp_path) as setup, signed_in(setup, "ben") as ben, signed_in(setup, "eve") as eve:
        url = f"{setup.proxy.origin}/static/live"
        async with streaming(setup.proxy.origin, ben) as one, streaming(setup.proxy.origin, ben) as two:
            await one.next()
            await two.next()
            refused = await ben.client.get(url, headers=PAGE)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
            async with streaming(setup.proxy.origin, eve) as other:
                assert (await other.next())[0] == "change"
        # Those that were left are counted no more.
        for _ in range(200):
            async with ben.client.stream("GET", url, headers=PAGE) as again:
                if again.status_code == 200:
                    break
            await asyncio.sleep(0.02)
        assert again.status_code == 200


async def test_the_stream_is_for_our_own_page(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}) as proxy, Browser() as browser:
        for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}):
            assert (await browser.client.get(f"{proxy.origin}/static/live", headers=headers)).status_code == 403
        async with streaming(proxy.origin, browser) as events:
            assert (await events.next())[0] == "change"
            proxy.application.router.draining = True
            while (await events.next())[0]:
                pass


async def test_without_callers_only_this_machine_reads_it_without_a_session(tmp_path: Path) -> None:
    inbound = {"allow_anonymous": True, "allowed_hosts": ["127.0.0.1"]}
    async with (
        running_proxy(
            tmp_path, {"notes": "http://127.0.0.1:9/mcp"}, listen=Address("0.0.0.0", 0), inbound=inbound
        ) as proxy,
        Browser() as browser,
    ):
        origin = proxy.origin.replace("0.0.0.0", "127.0.0.1")
        page = await browser.open(f"{origin}/")
        assert (page.status_code, page.headers["location"]) == (303, "/sign-in")
        assert "mcp-auth-proxy dashboard" in (await browser.open(f"{origin}/sign-in")).text
        assert (await browser.client.get(f"{origin}/static/live", headers=PAGE)).status_code == 401
        api = proxy.application.site.api
        assert api is not None
        secret = await new_link(Sessions(api.context.database), now=api.context.clock())
        assert (await browser.open(f"{origin}/sign-in?link={secret}")).status_code == 303
        assert states((await browser.open(f"{origin}/")).text) == {"notes": "needs-consent"}


async def test_files_are_kept_by_browsers_until_they_change(tmp_path: Path) -> None:
    async with running_proxy(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}) as proxy, Browser() as browser:
        page = (await browser.open(f"{proxy.origin}/")).text
        paths = re.findall(r'(?:href|src)="(/static/[^"]+)"', page)
        assert len(paths) == 3
        for path in paths:
            kept = await browser.open(f"{proxy.origin}{path}")
            assert (kept.status_code, "immutable" in kept.headers["cache-control"]) == (200, True)
            other = await browser.open(f"{proxy.origin}{path.partition('?')[0]}?v=old")
            assert (other.status_code, other.headers["cache-control"]) == (200, "no-cache")
        for path in ("/static/", "/static/none.js", "/static/..%2fpages.py", "/static/base.css/x"):
            assert (await browser.open(f"{proxy.origin}{path}")).status_code in (400, 404)


@pytest.mark.parametrize("keys", [False, True])
def test_clients_can_read_what_they_are_told(keys: bool) -> None:
    base, url = "http://127.0.0.1:8787", "http://127.0.0.1:8787/linear@work/mcp"
    setups = {setup.client: setup.text for setup in client_setups("linear@work", base, keys=keys)}
    assert list(setups) == ["Claude Code", "Claude Desktop", "Cursor", "VS Code", "Codex", "Gemini CLI"]
    assert setups["Claude Code"].startswith(f"claude mcp add --transport http linear-work {url}")
    desktop = json.loads(setups["Claude Desktop"])["mcpServers"]["linear-work"]
    assert (desktop["command"], desktop["args"][:4]) == ("mcp-auth-proxy", ["stdio", "linear@work", "--url", url])
    assert json.loads(setups["Cursor"])["mcpServers"]["linear-work"]["url"] == url
    code = json.loads(setups["VS Code"])["servers"]["linear-work"]
    assert (code["type"], code["url"]) == ("http", url)
    assert tomllib.loads(setups["Codex"])["mcp_servers"]["linear-work"]["url"] == url
    assert json.loads(setups["Gemini CLI"])["mcpServers"]["linear-work"]["httpUrl"] == url
    assert all((KEY_VARIABLE in text) is keys for text in setups.values())


async def test_the_tools_are_counted_when_they_are_listed(servers: Servers, tmp_path: Path) -> None:
    async with proxy_setup(servers, tmp_path) as setup, Browser() as browser:
        await setup.connect()
        api = setup.proxy.application.site.api
        assert api is not None
        tools = await api.context.list_tools(setup.proxy.application.servers["notes"], Account(LOCAL, "notes"))
        assert f"Tools</dt><dd>{len(tools)}</dd>" in (await browser.open(f"{setup.proxy.origin}/")).text
