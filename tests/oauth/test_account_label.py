"""Labels of grants: whose account it is, from whatever an authorization server says."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.oauth.account_label import MAX_PART, of_person, of_response


def id_token(**claims: object) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'RS256'})}.{part(claims)}.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ({}, ""),
        ({"id_token": id_token(sub="1", email="me@work.example", name="Me")}, "me@work.example"),
        ({"id_token": id_token(sub="1", preferred_username="me")}, "me"),
        ({"id_token": id_token(sub="only an opaque number")}, ""),
        (
            {"id_token": id_token(email="me@work.example"), "workspace": {"name": "Acme"}},
            "me@work.example, workspace Acme",
        ),
        (
            {"workspace_name": "Acme", "owner": {"user": {"name": "Me", "person": {"email": "me@a.example"}}}},
            "me@a.example, workspace Acme",
        ),
        ({"team": {"id": "T1", "name": "Acme"}}, "team Acme"),
        ({"organization": "Acme"}, "organization Acme"),
        ({"organization_name": "Acme", "user": {"login": "me"}}, "me, organization Acme"),
        ({"id_token": "not a token", "user": "a text", "team": 7, "workspace": None}, ""),
        ({"id_token": "a.b.c"}, ""),
        ({"id_token": "a.W10.c"}, ""),
        ({"user": {"name": "two\r\n lines\x1b[31m"}}, "two lines[31m"),
    ],
)
def test_labels(answer: dict[str, object], label: str) -> None:
    assert of_response(answer) == label


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.dictionaries(st.sampled_from(["name", "user", "email", "person"]) | st.text(), inner),
)


@given(
    st.dictionaries(st.sampled_from(["id_token", "user", "owner", "workspace", "team", "team_name", "account"]), VALUES)
)
def test_no_answer_breaks_it(answer: dict[str, object]) -> None:
    label = of_response(answer)
    assert label == "" or label.isprintable()
    assert len(label) <= 2 * (MAX_PART + len("…, organization "))


@given(st.text(max_size=40))
def test_no_id_token_breaks_it(text: str) -> None:
    encoded = base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()
    assert of_response({"id_token": f"e30.{encoded}.c"}) == of_response({"id_token": text}) == ""


def test_the_userinfo_endpoint_names_the_user() -> None:
    assert of_person({"sub": "1", "email": "me@work.example"}) == "me@work.example"
    assert of_person({"email": {"a": 1}, "name": "Me"}) == "Me"
