"""A browser on its way to an identity provider and back, and where it goes on to."""

import pytest
from starlette.responses import Response

from mcp_auth_proxy.web.attempt import SignInAttempt
from mcp_auth_proxy.web.paths import local_path, sign_in_path, split_name


def cookies_of(attempt: SignInAttempt) -> dict[str, str]:
    response = Response()
    attempt.bind(response, secure=True)
    cookie = response.headers["set-cookie"]
    assert {"HttpOnly", "Path=/sign-in/callback", "SameSite=lax", "Secure"} <= set(cookie.split("; "))
    name, _, value = cookie.partition(";")[0].partition("=")
    return {name: value}


def test_an_attempt_is_found_by_its_state_in_its_browser_alone() -> None:  # T54
    attempt = SignInAttempt.new("/connect/notes?flow=1")
    found = SignInAttempt.of(cookies_of(attempt), attempt.state)
    assert found == attempt
    assert len({attempt.secret, attempt.state, attempt.nonce, attempt.code_verifier}) == 4
    assert SignInAttempt.of({}, attempt.state) is None
    other = SignInAttempt.new("/")
    assert SignInAttempt.of(cookies_of(other), attempt.state) is None
    (value,) = cookies_of(other).values()
    assert SignInAttempt.of({attempt.cookie_name: value}, attempt.state) is None


@pytest.mark.parametrize("value", ["", ".", "x", "\u00e4.\u00e4", "\udcff", "x.!!"])
def test_a_forged_cookie_is_no_attempt(value: str) -> None:
    attempt = SignInAttempt.new("/")
    assert SignInAttempt.of({attempt.cookie_name: value}, attempt.state) is None


def test_a_cookie_can_not_lead_elsewhere() -> None:
    attempt = SignInAttempt("s" * 43, "https://evil.example/")
    found = SignInAttempt.of(cookies_of(attempt), attempt.state)
    assert found is not None
    assert found.onward == "/"


@pytest.mark.parametrize(
    "text",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "\\/evil.example",
        "/a\\b",
        "/\t/evil.example",
        "/a\r\nset-cookie: a=b",
        "/ a",
        "/ä",
        "javascript:alert(1)",
        "",
        "a",
        "/" + "x" * 1000,
        "/oauth/%73tart?a=b",
        "/x/../oauth/start?a=b",
        "/./oauth/start?a=b",
        "/%2e/oauth/start?a=b",
        "/oauth//start?a=b",
        "/oauth/start?a=b#c",
        "/oauth/start#?a=b",
    ],
)
def test_a_sign_in_leads_on_to_paths_of_this_proxy_only(text: str) -> None:  # T18
    assert local_path(text) == "/"
    assert sign_in_path(text) == "/sign-in"


@pytest.mark.parametrize(
    "text", ["/connect/notes?flow=a_b-c&x=%20", "/oauth/connected/notes@work", "/notes%40work/mcp", "/mcp"]
)
def test_paths_of_this_proxy_are_kept(text: str) -> None:
    assert local_path(text) == text
    assert sign_in_path(text).startswith("/sign-in?next=%2F")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("notes", ("notes", "default")),
        ("notes@work", ("notes", "work")),
        ("notes@", ("", "")),
        ("notes@Work", ("", "")),
        ("@work", ("", "")),
        ("notes@a@b", ("", "")),
        ("n" * 64, ("", "")),
    ],
)
def test_a_name_may_have_an_account(text: str, found: tuple[str, str]) -> None:
    assert split_name(text) == found
