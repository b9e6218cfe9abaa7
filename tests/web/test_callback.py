"""The redirect URI: every outcome has its page and its status."""

import logging
from html import escape

import pytest

from mcp_auth_proxy.broker import cookie_name
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    AuthorizationError,
    AuthorizationServerUnavailable,
    CallbackRefused,
    McpAuthProxyError,
    StoreUnavailable,
    TokenRefused,
)
from mcp_auth_proxy.web.callback import RETRY_HINT
from web.site_setup import site_setup

CALLBACK = "/oauth/callback?code=C&state=S"


async def test_a_user_who_has_consented_is_led_to_an_address_without_the_code_and_loses_the_cookie() -> None:
    async with site_setup() as setup:
        page = await setup.client.get(f"{CALLBACK}&iss=a&iss=b&empty=", headers={"cookie": 'one=1; two ="2";=3; four'})
        assert (page.status_code, page.headers["location"]) == (303, "/oauth/connected/notes")
        assert "notes is connected" in page.text
        for secret in ("state", "code=", "iss="):
            assert secret not in page.text
        assert page.headers["set-cookie"].startswith(f'{cookie_name("S")}=""; expires=')
        assert "Path=/oauth/callback" in page.headers["set-cookie"]
        # Repeated parameters are for the broker to refuse (RFC 6749 §3.1).
        ((params, cookies),) = setup.broker.callbacks
        assert params == {"code": ["C"], "state": ["S"], "iss": ["a", "b"], "empty": [""]}
        assert cookies == {"one": "1", "two": '"2"', "": "3"}


@pytest.mark.parametrize(
    ("error", "status", "title", "logged"),
    [
        (CallbackRefused("It was <used>."), 400, "was not accepted", ""),
        (CallbackRefused("It is not known.", 404), 404, "was not accepted", ""),
        (AuthorizationDenied("You said no.", "access_denied"), 400, "Not authorized", ""),
        (AuthorizationError("It was removed."), 502, "authorization failed", "WARNING"),
        (TokenRefused("invalid_grant", "It refused."), 502, "authorization failed", "WARNING"),
        (AuthorizationServerUnavailable("It is down."), 502, "authorization failed", "WARNING"),
        (StoreUnavailable("It is locked."), 503, "could not be stored", "ERROR"),
    ],
)
async def test_every_other_outcome_has_a_page_that_says_what_to_do(
    error: McpAuthProxyError, status: int, title: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with site_setup() as setup:
        setup.broker.outcome = error
        page = await setup.client.get(CALLBACK)
        assert (page.status_code, title in page.text) == (status, True)
        assert escape(str(error)) in page.text
        assert (RETRY_HINT in page.text) is not isinstance(error, CallbackRefused)
        assert "set-cookie" not in page.headers
    ours = [record.levelname for record in caplog.records if record.name.startswith("mcp_auth_proxy")]
    assert ours == ([logged] if logged else [])
