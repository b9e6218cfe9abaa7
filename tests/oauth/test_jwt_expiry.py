"""The ``exp`` of an access token is a hint: whatever is in it, nothing is raised, and only plausible times are used."""

import base64
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.oauth import jwt_expiry

NOW = 1_800_000_000.0


def jwt(claims: object, *, signature: str = "c2ln") -> str:
    body = json.dumps(claims).encode() if not isinstance(claims, bytes) else claims
    return f"eyJhbGciOiJub25lIn0.{base64.urlsafe_b64encode(body).decode().rstrip('=')}.{signature}"


def test_the_exp_of_a_jwt_is_read_and_its_signature_is_not_checked() -> None:
    assert jwt_expiry.read(jwt({"exp": NOW + 300}), obtained_at=NOW) == NOW + 300
    assert jwt_expiry.read(jwt({"exp": int(NOW) + 300}, signature=""), obtained_at=NOW) == NOW + 300


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"exp": NOW},
        {"exp": NOW - 10},
        {"exp": 0},
        {"exp": -1},
        {"exp": 1e300},
        {"exp": 10**400},
        {"exp": NOW * 1000},
        {"exp": True},
        {"exp": str(NOW + 300)},
        {"exp": None},
        {"exp": [NOW + 300]},
        [],
        "exp",
        b'{"exp": NaN}',
        b'{"exp": Infinity}',
        b'{"exp": 1e999}',
        b"{",
        b"\xff\xfe",
        b"[" * 10_000,
        b"",
    ],
    ids=repr,
)
def test_what_is_no_plausible_end_is_ignored(claims: object) -> None:  # T91
    assert jwt_expiry.read(jwt(claims), obtained_at=NOW) is None


@pytest.mark.parametrize("token", ["", "opaque", "a.b", "a.b.c.d", "..", "a.!.c", "a.====.c", "a.\u00e9.c"])
def test_a_token_that_is_no_jwt_is_left_alone(token: str) -> None:
    assert jwt_expiry.read(token, obtained_at=NOW) is None


@given(st.text(max_size=200) | st.binary(max_size=200).map(jwt), st.floats(0, 4e9))
def test_no_token_raises_anything(token: str, obtained_at: float) -> None:
    found = jwt_expiry.read(token, obtained_at=obtained_at)
    assert found is None or obtained_at < found < math.inf


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(values)
def test_a_hint_is_later_than_the_token_and_not_absurd(exp: object) -> None:
    found = jwt_expiry.read(jwt({"exp": exp}), obtained_at=NOW)
    assert found is None or NOW + 1 <= found <= NOW + jwt_expiry.MAX_LIFETIME
