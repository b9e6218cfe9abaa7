"""Signing in at an identity provider: who comes back, and which answers are believed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.openid_provider import SECRET, OpenIdProvider
from fakes.team import Team, post, team
from mcp_auth_proxy.identity import openid
from mcp_auth_proxy.models import Principal, PrincipalStatus, Role

CALLBACK = "/sign-in/callback"


@asynccontextmanager
async def openid_team(
    servers: Servers, folder: Path, *names: str, **inbound: Any
) -> AsyncIterator[tuple[Team, OpenIdProvider]]:
    """A team whose browsers sign in at an identity provider, and that provider."""
    async with OpenIdProvider.running() as provider:
        section = {"mode": "api_key", "sign_in": provider.settings(), **inbound}
        for issuer in section.get("jwt", ()):
            issuer["issuer"] = provider.issuer
        async with team(servers, folder, *names, inbound=section) as setup:
            yield setup, provider


async def to_provider(setup: Team, browser: Browser, onward: str = "/") -> httpx2.Response:
    """Press the button that leads to the provider."""
    return await post(browser, f"{setup.proxy.origin}/sign-in", provider="1", next=onward)


async def sign_in(setup: Team, browser: Browser, onward: str = "/") -> httpx2.Response:
    """Sign in at the provider; return the answer to the way back."""
    started = await to_provider(setup, browser, onward)
    callback = await browser.stop_before(started.headers["location"], CALLBACK)
    return await browser.open(callback)


def principals(setup: Team) -> list[Principal]:
    return setup.proxy.application.callers.directory.principals()


async def test_a_user_signs_in_at_the_provider_and_goes_on(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        form = await browser.open(f"{setup.proxy.origin}/sign-in?next=/notes/mcp")
        assert f"Sign in at {provider.issuer}" in form.text
        signed_in = await sign_in(setup, browser, "/notes/mcp")
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/notes/mcp")
        assert "anna" in (await browser.open(f"{setup.proxy.origin}/")).text
        (asked,) = provider.requests
        assert (asked["response_type"], asked["code_challenge_method"]) == ("code", "S256")
        assert asked["scope"] == "openid profile"
        assert asked["redirect_uri"] == f"{setup.proxy.origin}{CALLBACK}"
        assert len(asked["nonce"]) == len(asked["state"]) == 43
        (redeemed,) = provider.redeemed
        assert "client_secret" not in redeemed
        # Only the cookie of the session is left.
        assert [name.startswith("mcp_auth_session") for name in browser.client.cookies] == [True]


async def test_an_id_token_and_a_jwt_of_one_issuer_are_one_principal(servers: Servers, tmp_path: Path) -> None:
    issuer = {"audience": "mcp", "roles": {"claim": "groups", "admin": ["admins"]}}
    async with openid_team(servers, tmp_path, mode="jwt", jwt=[issuer]) as (setup, provider), Browser() as browser:
        provider.claims = {"groups": ["admins"]}
        await sign_in(setup, browser)
        assert provider.requests[0]["scope"] == "openid profile groups"
        token = provider.token("mcp")
        async with setup.proxy.client("notes", headers={"authorization": f"Bearer {token}"}) as client:
            link = (await client.call("echo", text="x")).text
        (anna,) = [each for each in principals(setup) if each.name.startswith("anna")]
        assert anna.role is Role.ADMIN
        found = link[link.index(setup.proxy.origin) :].split()[0].rstrip(".")
        assert (await browser.follow(found)).status_code == 200


async def test_the_same_subject_of_a_provider_is_not_the_principal_of_that_name(
    servers: Servers, tmp_path: Path
) -> None:
    async with openid_team(servers, tmp_path, "anna") as (setup, _), Browser() as browser:
        link = await setup.link("anna")
        await sign_in(setup, browser)
        assert (await browser.open(link)).status_code == 403
        assert len([each for each in principals(setup) if each.name.startswith("anna")]) == 2


WRONG: dict[str, dict[str, Any]] = {
    "another nonce": {"claims": {"nonce": "x"}},
    "no nonce": {"claims": {"nonce": None}},
    "another audience": {"claims": {"aud": "other"}},
    "another party": {"claims": {"azp": "other"}},
    "several audiences and no party": {"claims": {"aud": ["proxy", "other"]}},
    "another issuer": {"claims": {"iss": "https://evil.example"}},
    "a normalized issuer": {"claims": {"iss": None}},
    "an end in the past": {"claims": {"exp": 1}},
    "no end": {"claims": {"exp": None}},
    "another key": {"signing_key": ec.generate_private_key(ec.SECP256R1())},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
async def test_an_id_token_that_is_not_for_this_sign_in_is_refused(
    servers: Servers, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        for name, value in wrong.items():
            setattr(provider, name, value)
        page = await sign_in(setup, browser)
        assert page.status_code == 502
        assert "ID token" in page.text
        assert not any(name.startswith("mcp_auth_session") for name in browser.client.cookies)
        assert principals(setup) == []


@pytest.mark.parametrize(
    "response", [{"iss": "https://evil.example"}, {"iss": ""}, {"state": "x" * 43}, {"state": ""}, {"code": ""}]
)
async def test_a_response_that_is_not_the_providers_redeems_nothing(
    servers: Servers, tmp_path: Path, response: dict[str, str]
) -> None:
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        provider.response = response
        page = await sign_in(setup, browser)
        assert page.status_code in (400, 403)
        assert provider.redeemed == []


async def test_a_sign_in_that_another_browser_began_is_refused(servers: Servers, tmp_path: Path) -> None:  # T54
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as evils, Browser() as annas:
        started = await to_provider(setup, evils)
        callback = await evils.stop_before(started.headers["location"], CALLBACK)
        page = await annas.open(callback)
        assert page.status_code == 403
        assert dict(annas.client.cookies) == {}
        # Nor beside a sign-in of its own.
        await to_provider(setup, annas)
        assert (await annas.open(callback)).status_code == 403
        assert provider.redeemed == []


async def test_a_response_is_good_once(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path) as (setup, _), Browser() as browser:
        started = await to_provider(setup, browser)
        callback = await browser.stop_before(started.headers["location"], CALLBACK)
        assert (await browser.open(callback)).status_code == 303
        assert (await browser.open(callback)).status_code == 403


async def test_a_foreign_page_does_not_begin_a_sign_in(servers: Servers, tmp_path: Path) -> None:  # T54
    async with openid_team(servers, tmp_path) as (setup, _), Browser() as browser:
        page = await post(browser, f"{setup.proxy.origin}/sign-in", origin="https://evil.example", provider="1")
        assert page.status_code == 403
        assert "set-cookie" not in page.headers


async def test_a_refusal_of_the_provider_is_told(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        provider.response = {"error": "access_denied", "error_description": "Not <you>."}
        page = await sign_in(setup, browser)
        assert page.status_code == 502
        assert "Not &lt;you&gt;." in page.text


async def test_a_disabled_principal_can_not_sign_in(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path) as (setup, _), Browser() as browser:
        await sign_in(setup, browser)
        (anna,) = principals(setup)
        await setup.proxy.application.callers.directory.change(anna.id, status=PrincipalStatus.DISABLED)
        assert (await browser.open(f"{setup.proxy.origin}/")).status_code == 303
        assert (await sign_in(setup, browser)).status_code == 403


async def test_with_provision_listed_only_those_who_are_listed_sign_in(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path, provision="listed") as (setup, provider), Browser() as browser:
        page = await sign_in(setup, browser)
        assert page.status_code == 403
        assert f"jwt:{provider.issuer}=anna" in page.text
        assert principals(setup) == []


async def test_a_provider_that_is_down_is_told_with_the_time_to_wait(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openid, "RETRY_INTERVAL", 0.0)
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        provider.status = 503
        page = await to_provider(setup, browser)
        assert page.status_code == 503
        assert int(page.headers["retry-after"]) > 0
        provider.status = 200
        started = await to_provider(setup, browser)
        callback = await browser.stop_before(started.headers["location"], CALLBACK)
        provider.status = 503
        page = await browser.open(callback)
        assert page.status_code == 503


async def test_a_provider_that_is_down_is_not_asked_by_each_request(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path) as (setup, provider):
        provider.status = 503
        browsers = [Browser() for _ in range(10)]
        pages = await asyncio.gather(*(to_provider(setup, browser) for browser in browsers))
        assert [page.status_code for page in pages] == [503] * 10
        assert provider.documents == 1
        for browser in browsers:
            await browser.client.aclose()


async def test_no_secret_of_a_sign_in_is_in_a_log_or_in_the_store(
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        await sign_in(setup, browser)
        provider.claims = {"nonce": "x"}
        await sign_in(setup, browser)
        (cookie,) = [value for name, value in browser.client.cookies.items() if name.startswith("mcp_auth_session")]
        secrets = {SECRET, cookie, *(form["code"] for form in provider.redeemed)}
        secrets |= {form["code_verifier"] for form in provider.redeemed} | {each["state"] for each in provider.requests}
    ours = "".join(record.getMessage() for record in caplog.records if record.name.startswith("mcp_auth_proxy"))
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))  # T76
    for secret in secrets:
        assert secret not in ours
        assert secret.encode() not in stored


async def test_the_address_of_the_provider_has_no_parameter_of_ours_but_those(servers: Servers, tmp_path: Path) -> None:
    async with openid_team(servers, tmp_path) as (setup, provider), Browser() as browser:
        started = await to_provider(setup, browser, "/notes/mcp")
        parts = urlsplit(started.headers["location"])
        assert f"{parts.scheme}://{parts.netloc}" == provider.issuer
        assert "notes" not in parse_qs(parts.query).values().__repr__()
        (cookie,) = started.headers.get_list("set-cookie")
        assert {"httponly", "samesite=lax", "path=/sign-in/callback"} <= {
            field.strip().lower() for field in cookie.split(";")
        }
