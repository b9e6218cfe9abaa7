"""The link to the authorization server, and what comes back."""

import contextlib
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, CallbackRefused
from mcp_auth_proxy.models import Account, ClientAuth, Endpoints, Flow, GrantKey, Registration, RegistrationKind
from mcp_auth_proxy.oauth import authorization_code as code_grant

ISSUER = "https://as.example.com"
CALLBACK = "http://127.0.0.1:8787/oauth/callback"


def flow(*, endpoint: str = f"{ISSUER}/authorize", resource: str = "https://h/mcp", **members: Any) -> Flow:
    registration = Registration(
        server="s", issuer=ISSUER, client_id="client", client_auth=ClientAuth.NONE, kind=RegistrationKind.DYNAMIC
    )
    values: dict[str, Any] = {
        "id": "flow",
        "key": GrantKey(account=Account("local", "s"), resource=resource, issuer=ISSUER),
        "registration": registration,
        "endpoints": Endpoints(authorization=endpoint, token=f"{ISSUER}/token"),
        "scopes": ("a", "b"),
        "redirect_uri": CALLBACK,
        "iss_supported": False,
        "created_at": 0.0,
        "expires_at": 600.0,
    }
    return Flow(**{**values, **members})


def query(given: Flow) -> list[tuple[str, str]]:
    url = code_grant.authorization_url(given, state="st", code_verifier="v" * 43)
    return parse_qsl(urlsplit(url).query, keep_blank_values=True)


def test_the_challenge_is_that_of_the_rfc() -> None:
    # RFC 7636 appendix B
    challenge = code_grant.challenge_s256("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")

    assert challenge == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"


def test_verifiers_and_states_are_fresh() -> None:
    values = {make() for make in (code_grant.new_verifier, code_grant.new_state) for _ in range(50)}

    assert len(values) == 100 and {len(value) for value in values} == {43}


def test_the_link_has_every_required_parameter() -> None:
    assert query(flow()) == [
        ("response_type", "code"),
        ("client_id", "client"),
        ("redirect_uri", CALLBACK),
        ("scope", "a b"),
        ("state", "st"),
        ("code_challenge", code_grant.challenge_s256("v" * 43)),
        ("code_challenge_method", "S256"),
        ("resource", "https://h/mcp"),
    ]


def test_scope_and_resource_are_left_out_if_empty() -> None:
    assert {name for name, _ in query(flow(scopes=(), resource=""))}.isdisjoint({"scope", "resource", "prompt"})


def test_offline_access_asks_for_consent() -> None:
    found = dict(query(flow(scopes=("a", "offline_access"))))
    replaced = dict(query(flow(scopes=("a", "offline_access"), extra_params=(("prompt", "login"),))))

    assert (found["prompt"], replaced["prompt"]) == ("consent", "login")


def test_configured_parameters_replace_ours_but_not_the_protected_ones() -> None:
    extra = tuple((name, "evil") for name in sorted(code_grant.PROTECTED))
    params = query(flow(extra_params=(*extra, ("access_type", "offline"), ("scope", "x"), ("resource", ""))))

    assert len(dict(params)) == len(params) and "evil" not in dict(params).values()
    assert (dict(params)["scope"], dict(params)["access_type"]) == ("x", "offline")
    assert "resource" not in dict(params)


def test_the_endpoints_own_query_is_kept_and_repeats_nothing() -> None:
    endpoint = f"{ISSUER}/authorize?tenant=a%20b&state=evil&client%5Fid=evil&policy"
    url = code_grant.authorization_url(flow(endpoint=endpoint), state="st", code_verifier="v" * 43)

    assert url.startswith(f"{ISSUER}/authorize?tenant=a%20b&policy&response_type=code&client_id=client&")
    assert "evil" not in url


def test_a_server_without_authorization_endpoint_is_an_error() -> None:
    with pytest.raises(AuthorizationError, match="authorization_endpoint"):
        query(flow(endpoint=""))


def test_a_code_is_returned() -> None:
    assert code_grant.check_response({"code": ["c"], "state": ["st"]}, flow=flow()) == "c"
    assert code_grant.check_response({"code": ["c"], "iss": [ISSUER]}, flow=flow(iss_supported=True)) == "c"
    assert code_grant.check_response({"code": ["c"], "iss": [ISSUER], "x": ["1", "2"]}, flow=flow()) == "c"


@pytest.mark.parametrize("error", [{}, {"error": ["access_denied"], "error_description": ["canary"]}])
@pytest.mark.parametrize(
    ("iss", "supported"),
    [
        (None, True),
        ("https://evil.example", False),
        (f"{ISSUER}/", False),
        (f"{ISSUER}:443", True),
        ("https://AS.example.com", True),
        ("", False),
    ],
)
def test_a_wrong_or_missing_iss_is_refused_before_anything_is_shown(
    error: dict[str, list[str]], iss: str | None, supported: bool
) -> None:  # T9
    params = {"code": ["c"], **({"iss": [iss]} if iss is not None else {}), **error}

    with pytest.raises(CallbackRefused, match="RFC 9207") as refused:
        code_grant.check_response(params, flow=flow(iss_supported=supported))
    assert "canary" not in str(refused.value) and "evil" not in str(refused.value)


def test_an_error_response_is_shown_as_plain_text() -> None:  # T15
    params = {"error": ["access_denied"], "error_description": ["no\r\nway " + "x " * 1000], "iss": [ISSUER]}

    with pytest.raises(AuthorizationDenied) as denied:
        code_grant.check_response(params, flow=flow(iss_supported=True))
    assert denied.value.error == "access_denied"
    assert "access_denied (no way x" in str(denied.value) and len(str(denied.value)) < 500


@pytest.mark.parametrize("name", ["code", "state", "iss", "error", "error_description"])
def test_a_parameter_given_twice_is_refused(name: str) -> None:
    params = {"code": ["c"], "iss": [ISSUER], name: [ISSUER, ISSUER]}

    with pytest.raises(CallbackRefused, match=f"{name} more than once"):
        code_grant.check_response(params, flow=flow())


@pytest.mark.parametrize("code", [[], [""], ["a\r\nb"], ["é"], ["x" * 5000]])
def test_an_unusable_code_is_refused(code: list[str]) -> None:
    with pytest.raises(CallbackRefused):
        code_grant.check_response({"code": code}, flow=flow())


@given(st.dictionaries(st.sampled_from(["code", "iss", "error", "error_description"]), st.lists(st.text(), max_size=2)))
def test_arbitrary_responses_end_in_a_code_or_a_refusal(params: dict[str, list[str]]) -> None:
    with contextlib.suppress(CallbackRefused, AuthorizationDenied):
        assert code_grant.check_response(params, flow=flow())
