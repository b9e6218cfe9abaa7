"""The device authorization request, its answer, and polls."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, DocumentRefused, TokenRefused
from mcp_auth_proxy.models import (
    Account,
    ClientAuth,
    DeviceAuthorization,
    Endpoints,
    Flow,
    GrantKey,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.oauth import device_authorization
from mcp_auth_proxy.oauth.device_authorization import DeviceGrantStart, Poll

URL = "https://as.example/device"
GOOD: dict[str, object] = {
    "device_code": "device-canary",
    "user_code": "WDJB-MJHT",
    "verification_uri": "https://as.example/d",
    "expires_in": 1800,
}
FLOW = Flow(
    id="f",
    key=GrantKey(account=Account("local", "linear"), resource="https://mcp.example/mcp", issuer="https://as.example"),
    registration=Registration(
        server="linear",
        issuer="https://as.example",
        client_id="c",
        client_auth=ClientAuth.NONE,
        kind=RegistrationKind.DYNAMIC,
    ),
    endpoints=Endpoints(token="https://as.example/token"),
    scopes=("read",),
    redirect_uri="",
    iss_supported=False,
    created_at=0,
    expires_at=600,
    device=DeviceAuthorization(device_code="device-canary", user_code="WDJB-MJHT", verification_uri="https://as/d"),
)


def read(status: int = 200, **changes: object) -> DeviceGrantStart:
    body = json.dumps({**GOOD, **changes}).encode()
    return device_authorization.read_response(status, {}, body, url=URL, http_loopback=False)


def poll(status: int, answer: object) -> TokenSet | Poll:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return device_authorization.read_poll(status, {}, body, flow=FLOW, now=100.0)


def test_the_request_carries_resource_and_scopes() -> None:
    form = device_authorization.request(resource="https://mcp", scopes=("a", "b"))
    assert form == [("scope", "a b"), ("resource", "https://mcp")]
    assert device_authorization.request(resource="", scopes=()) == []


def test_the_answer_is_read_and_an_absent_interval_is_five_seconds() -> None:
    begun = read()
    assert begun.device.interval == 5.0
    assert begun.lifetime == 1800.0
    assert (begun.device.user_code, begun.device.verification_uri_complete) == ("WDJB-MJHT", "")
    assert "device-canary" not in repr(begun)  # T45


def test_googles_name_for_the_verification_uri_is_accepted() -> None:
    assert read(verification_uri=None, verification_url="https://google.example/device").device.verification_uri


def test_a_complete_uri_that_leads_elsewhere_than_the_one_that_is_shown_is_ignored() -> None:  # T78
    complete = "https://as.example/d?user_code=WDJB-MJHT"
    assert read(verification_uri_complete=complete).device.verification_uri_complete == complete
    for other in ("https://honest.example/d?user_code=A", "https://as.example:8443/d"):
        assert read(verification_uri_complete=other).device.verification_uri_complete == ""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 5.0), (-1, 5.0), (True, 5.0), ("x", 5.0), (0.001, 5.0), (1, 1.0), (2, 2.0), ("7", 7.0), (10**30, 60.0)],
)
def test_an_interval_is_kept_within_bounds(value: object, seconds: float) -> None:
    assert read(interval=value).device.interval == seconds


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"device_code": None}, "device_code"),
        ({"device_code": "x" * 5000}, "device_code"),
        ({"user_code": 12}, "user_code"),
        ({"user_code": "a\nb"}, "user_code"),
        ({"verification_uri": None}, "no verification_uri"),
        ({"verification_uri": "javascript:alert(1)"}, "must be an http:// or https:// URL"),  # T5
        ({"verification_uri": "http://as.example/d"}, "must be https"),
        ({"verification_uri": "https://user:pw@as.example/d"}, "user name"),
        ({"verification_uri_complete": "data:text/html,x"}, "verification_uri_complete"),
    ],
)
def test_an_invalid_response_is_refused(changes: dict[str, object], rule: str) -> None:
    with pytest.raises(DocumentRefused, match=r"RFC 8628 §3\.2") as caught:
        read(200, **changes)
    assert rule in str(caught.value)


def test_an_error_names_the_endpoint() -> None:
    with pytest.raises(
        TokenRefused, match=r"device authorization endpoint https://as\.example/device refused: invalid_s"
    ):
        read(400, error="invalid_scope")


def test_a_poll_carries_code_and_resource() -> None:
    assert device_authorization.poll_request(FLOW) == [
        ("grant_type", "urn:ietf:params:oauth:grant-type:device_code"),
        ("device_code", "device-canary"),
        ("resource", "https://mcp.example/mcp"),
    ]


@pytest.mark.parametrize("status", [400, 428, 403, 200])
def test_a_poll_before_the_decision_says_to_ask_again(status: int) -> None:
    assert poll(status, {"error": "authorization_pending"}) is Poll.PENDING
    assert poll(status, {"error": "slow_down"}) is Poll.SLOW_DOWN


def test_a_poll_after_the_decision_brings_tokens() -> None:
    answer = poll(200, {"access_token": "a", "token_type": "bearer", "expires_in": 60, "refresh_token": "r"})
    assert isinstance(answer, TokenSet)
    assert (answer.expires_at, answer.scopes, answer.refresh_token) == (160.0, ("read",), "r")


@pytest.mark.parametrize("error", ["access_denied", "expired_token", "invalid_grant", "invalid_client"])
def test_other_errors_end_the_flow(error: str) -> None:
    with pytest.raises(TokenRefused) as caught:
        poll(400, {"error": error})
    assert caught.value.error == error


def test_a_server_that_fails_is_temporarily_unavailable() -> None:
    for status, body in ((503, b"{}"), (200, b"<html>"), (429, b'{"error": "slow_down"}')):
        if status == 429:
            assert poll(status, body) is Poll.SLOW_DOWN
            continue
        with pytest.raises(AuthorizationServerUnavailable):
            poll(status, body)


@given(st.binary(max_size=60), st.sampled_from([200, 400, 401, 500]))
def test_reading_a_poll_never_crashes(body: bytes, status: int) -> None:
    with pytest.raises((AuthorizationServerUnavailable, TokenRefused, DocumentRefused)):
        poll(status, body)
