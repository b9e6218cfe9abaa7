"""Signing in with a key: which session a browser gets, and when it ends."""

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.team import add_member, post, team
from mcp_auth_proxy.config.changes import compare
from mcp_auth_proxy.config.settings import SignInSettings
from mcp_auth_proxy.models import PrincipalStatus, Scope


def fields_of(cookie: str) -> set[str]:
    return {field.strip().lower() for field in cookie.split(";")[1:]}


async def test_a_key_begins_a_session_whose_cookie_no_script_reads(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        assert (await browser.open(f"{setup.proxy.origin}/")).headers["location"] == "/sign-in"
        signed_in = await setup.sign_in(browser, "anna")
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/")
        (cookie,) = signed_in.headers.get_list("set-cookie")
        assert {"httponly", "samesite=lax", "path=/", "max-age=43200"} <= fields_of(cookie)
        assert setup.keys["anna"] not in cookie + signed_in.text
        page = await browser.open(f"{setup.proxy.origin}/")
        assert page.status_code == 200
        assert "You are signed in as anna" in page.text


async def test_on_https_the_cookie_is_secure_and_of_this_host_alone(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna", public_url="https://proxy.example") as setup, Browser() as browser:
        host = setup.proxy.application.listening
        url = f"http://{host}/sign-in"
        signed_in = await post(browser, url, key=setup.keys["anna"])
        (cookie,) = signed_in.headers.get_list("set-cookie")
        assert cookie.startswith("__Host-mcp_auth_session=")
        assert {"secure", "httponly", "samesite=lax", "path=/"} <= fields_of(cookie)
        assert "domain" not in cookie.lower()


@pytest.mark.parametrize("key", ["", "mapk_x", "mapk_000000000000_" + "A" * 43])
async def test_any_other_key_is_refused_without_saying_why(servers: Servers, tmp_path: Path, key: str) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        page = await post(browser, f"{setup.proxy.origin}/sign-in", key=key, next="/notes/mcp")
        assert page.status_code == 401
        assert "set-cookie" not in page.headers
        assert "does not hold" in page.text
        assert 'value="/notes/mcp"' in page.text
        assert not key or key not in page.text


async def test_an_address_has_five_bad_keys_a_second(servers: Servers, tmp_path: Path) -> None:  # T43
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        key, origin = f"mapk_000000000000_{'A' * 43}", setup.proxy.origin
        begun = time.monotonic()
        # The same count as for the API.
        posts = [post(browser, f"{origin}/sign-in", key=key) for _ in range(30)]
        calls = [browser.client.get(f"{origin}/api/v1/me", headers={"x-api-key": key}) for _ in range(30)]
        answers = await asyncio.gather(*posts, *calls)
        allowed = [answer for answer in answers if answer.status_code == 401]
        assert 5 <= len(allowed) <= 5 * (1 + time.monotonic() - begun)
        refused = [answer for answer in answers[:30] if answer.status_code == 429]
        assert len(refused) + len([answer for answer in answers[30:] if answer.status_code == 429]) == 60 - len(allowed)
        assert {page.headers["retry-after"] for page in refused} == {"1"}
        assert "Too many" in refused[0].text
        assert (await setup.sign_in(browser, "anna")).status_code == 303


async def test_a_form_of_another_site_signs_nobody_in(servers: Servers, tmp_path: Path) -> None:  # T54
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            page = await post(browser, f"{setup.proxy.origin}/sign-in", origin=origin, key=setup.keys["anna"])
            assert page.status_code == 403
            assert "set-cookie" not in page.headers
        await setup.sign_in(browser, "anna")
        out = await post(browser, f"{setup.proxy.origin}/sign-in/out", origin="https://evil.example")
        assert out.status_code == 403
        assert (await browser.open(f"{setup.proxy.origin}/")).status_code == 200


async def test_a_session_that_was_planted_is_not_taken_over(servers: Servers, tmp_path: Path) -> None:  # T54
    async with team(servers, tmp_path, "anna", "evil") as setup, Browser() as evils, Browser() as annas:
        await setup.sign_in(evils, "evil")
        for name, value in evils.client.cookies.items():
            annas.client.cookies.set(name, value, domain="127.0.0.1")
        before = dict(annas.client.cookies)
        await setup.sign_in(annas, "anna")
        assert dict(annas.client.cookies) != before
        assert "signed in as anna" in (await annas.open(f"{setup.proxy.origin}/")).text
        # What was planted is worth nothing any more.
        assert (await evils.open(f"{setup.proxy.origin}/")).status_code == 303


async def test_a_sign_out_ends_the_session_everywhere(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        await setup.sign_in(browser, "anna")
        copied = dict(browser.client.cookies)
        out = await setup.sign_out(browser)
        assert (out.status_code, out.headers["location"]) == (303, "/")
        assert dict(browser.client.cookies) == {}
        async with Browser(copied) as other:
            assert (await other.open(f"{setup.proxy.origin}/")).headers["location"] == "/sign-in"


@pytest.mark.parametrize(
    "onward", ["https://evil.example/", "//evil.example", "/\\evil.example", "/\r\nset-cookie: a=b", "javascript:x"]
)
async def test_a_sign_in_leads_nowhere_else(servers: Servers, tmp_path: Path, onward: str) -> None:  # T18
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        signed_in = await setup.sign_in(browser, "anna", onward)
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/")
        form = await browser.client.get(f"{setup.proxy.origin}/sign-in", params={"next": onward})
        assert "evil" not in form.text


async def test_all_sessions_of_a_disabled_principal_end_and_stay_ended(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as one, Browser() as other:
        directory = setup.proxy.application.callers.directory
        (anna,) = [each for each in directory.principals() if each.name == "anna"]
        for browser in (one, other):
            await setup.sign_in(browser, "anna")
        for status in (PrincipalStatus.DISABLED, PrincipalStatus.ACTIVE):
            await directory.change(anna.id, status=status)
        for browser in (one, other):
            assert (await browser.open(f"{setup.proxy.origin}/")).status_code == 303
        await directory.change(anna.id, status=PrincipalStatus.DISABLED)
        assert (await setup.sign_in(one, "anna")).status_code == 401


async def test_a_revoked_key_ends_the_sessions_that_it_began(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        await setup.sign_in(browser, "anna")
        key_id = setup.keys["anna"].split("_")[1]
        assert await setup.proxy.application.callers.directory.revoke_key(key_id)
        assert (await browser.open(f"{setup.proxy.origin}/")).status_code == 303


async def test_a_key_for_mcp_alone_signs_in_too_with_its_scopes(servers: Servers, tmp_path: Path) -> None:
    key = await add_member(tmp_path, "anna", scopes=frozenset({Scope.MCP}))
    async with team(servers, tmp_path) as setup, Browser() as browser:
        assert (await post(browser, f"{setup.proxy.origin}/sign-in", key=key)).status_code == 303
        (value,) = browser.client.cookies.values()
        caller = await setup.proxy.application.visitors.sessions.caller(value)
        assert caller is not None
        assert caller.scopes == {Scope.MCP}


async def test_no_request_to_a_server_has_the_cookie(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        await setup.sign_in(browser, "anna")
        await browser.follow(await setup.link("anna"))
        client = setup.client("anna")
        client.http.cookies = browser.client.cookies
        async with client:
            assert (await client.call("echo", text="x")).text == "x"
        assert all(b"cookie" not in dict(request.headers) for request in setup.upstream.requests)


async def test_without_callers_there_is_nobody_to_sign_in_as(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna", inbound={"mode": "none"}) as setup, Browser() as browser:
        assert (await browser.open(f"{setup.proxy.origin}/")).status_code == 200
        page = await browser.open(f"{setup.proxy.origin}/sign-in")
        assert "mcp-auth-proxy dashboard" in page.text
        assert (await setup.sign_in(browser, "anna")).status_code == 403
        assert dict(browser.client.cookies) == {}


async def test_another_name_of_this_machine_leads_to_the_one_that_callbacks_come_to(
    servers: Servers, tmp_path: Path
) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        await setup.sign_in(browser, "anna")
        for path in ("/", "/notes/mcp", "/sign-in?next=/notes/mcp"):
            elsewhere = setup.proxy.origin.replace("127.0.0.1", "localhost") + path
            page = await browser.open(elsewhere)
            assert page.status_code == 303
            onward = page.headers["location"]
            assert onward.startswith(setup.proxy.origin + path.partition("?")[0])
            assert (await browser.open(onward)).status_code == 200


async def test_a_reload_changes_how_users_sign_in(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        application = setup.proxy.application
        before = application.settings
        assert "Sign in at" not in (await browser.open(f"{setup.proxy.origin}/sign-in")).text
        sign_in = SignInSettings(issuer="https://idp.example", client_id="proxy")
        changed = replace(before, inbound=replace(before.inbound, sign_in=sign_in))
        application.apply(compare(before, changed))
        page = await browser.open(f"{setup.proxy.origin}/sign-in")
        assert "Sign in at https://idp.example" in page.text
        assert 'name="key"' in page.text
        application.apply(compare(changed, before))
        assert "Sign in at" not in (await browser.open(f"{setup.proxy.origin}/sign-in")).text


async def test_who_has_signed_in_and_which_key_did_not_hold_is_logged_without_the_key(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mcp_auth_proxy")
    wrong = "mapk_000000000000_" + "Q" * 43
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        await setup.sign_in(browser, "anna")
        for _ in range(3):
            await post(browser, f"{setup.proxy.origin}/sign-in", key=wrong)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "anna has signed in with key:" in line]) == 1
    assert len([line for line in lines if "does not hold" in line]) == 1
    assert not any(wrong in line or setup.keys["anna"] in line for line in lines)


def test_a_proxy_that_identifies_nobody_does_without_the_modules_of_the_sign_in() -> None:
    code = "import sys, mcp_auth_proxy.app, mcp_auth_proxy.cli.serve; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    loaded = done.stdout.split()
    assert "mcp_auth_proxy.web.session" in loaded
    for module in ("web.sign_in", "identity.openid", "identity.tokens"):
        assert f"mcp_auth_proxy.{module}" not in loaded
