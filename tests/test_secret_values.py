"""Secrets that a text from outside repeats are masked by their value, in any surroundings and spelling."""  # T89

import base64
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import McpAuthProxyError, excerpt
from mcp_auth_proxy.models import TokenSet
from mcp_auth_proxy.secret_values import SecretValues

TOKEN = "Ab9/xK+2qLm_pR~7.tUvWx-4yZ0=|cDeFgH"


def known(*values: str) -> SecretValues:
    found = SecretValues()
    found.remember(*values)
    return found


@pytest.mark.parametrize(
    "echo",
    [
        "the token {} is invalid",
        "{}",
        "x{}y",
        "xAb9/xK+{}",
        "{0} and {0}",
        "https://as.example/?t={}&x=1",
        "token%3D{}%20",
        '\\"{}\\"',
    ],
)
def test_a_value_is_masked_wherever_it_stands(echo: str) -> None:  # T89
    shown = known(TOKEN).masked(echo.format(TOKEN))
    assert shown == echo.format("****")


@pytest.mark.parametrize(
    "spelling",
    [
        quote(TOKEN, safe=""),
        quote(TOKEN, safe="").lower(),
        quote(TOKEN),
        TOKEN.replace("/", r"\/"),
        TOKEN.encode().hex(),
        TOKEN.encode().hex().upper(),
        quote(quote(TOKEN, safe=""), safe=""),
        "".join(f"%{ord(it):02x}" for it in TOKEN),
        "".join(f"%{ord(it):02X}" for it in TOKEN),
        "".join(rf"\u{ord(it):04x}" for it in TOKEN),
        "".join(rf"\u{ord(it):04X}" for it in TOKEN),
        "".join(f"&#{ord(it)};" for it in TOKEN),
        base64.b64encode(TOKEN.encode()).decode(),
        base64.urlsafe_b64encode(TOKEN.encode()).decode(),
        base64.b64encode(b"Bearer " + TOKEN.encode()).decode(),
        base64.b64encode(b"a" + TOKEN.encode() + b"bc").decode(),
        base64.b64encode(b"ab" + TOKEN.encode() + b"c").decode(),
    ],
)
def test_a_value_is_masked_in_another_spelling(spelling: str) -> None:  # T89
    shown = known(TOKEN).masked(f"refused: {spelling} (expired)")
    assert shown.startswith("refused: ")
    assert shown.endswith(" (expired)")
    assert "****" in shown
    # What is left is the padding, or characters of what stood around the value.
    assert len(shown) < len("refused: **** (expired)") + 16


@pytest.mark.parametrize("left", range(12, len(TOKEN)))
def test_a_value_that_was_cut_off_is_masked(left: int) -> None:  # T89
    assert known(TOKEN).masked(f"no such token: {TOKEN[:left]}…") == "no such token: ****…"


def test_a_long_value_is_masked_to_its_end() -> None:  # T89
    values = known("eyJhbGciOiJSUzI1NiJ9." + "p" * 3000 + ".sig")
    assert values.masked("<eyJhbGciOiJSUzI1NiJ9." + "p" * 3000 + ".sig> refused") == "<****> refused"
    assert values.masked("<eyJhbGciOiJSUzI1NiJ9." + "p" * 100 + " refused") == "<**** refused"


def test_each_of_many_values_with_the_same_beginning_is_masked() -> None:  # T89
    tokens = [f"same-beginning-{number:03d}-{'x' * number}" for number in range(200)]
    values = known(*tokens)
    for token in tokens:
        assert values.masked(f"[{token}]") == "[****]"


@pytest.mark.parametrize("value", ["", "short", "https://mcp.example/mcp", None])
def test_words_and_urls_are_no_values(value: str | None) -> None:
    values = SecretValues()
    values.remember(value)
    text = "a short sentence about https://mcp.example/mcp"
    assert values.masked(text) == text


def test_text_without_a_value_stays_as_it_is() -> None:
    values = known(TOKEN, "authorization-code-1")
    for text in ("authorization is needed", "Ab9/xK+2 is a beginning", "", "no", TOKEN[1:]):
        assert values.masked(text) == text


@given(st.text(max_size=60), st.text(max_size=60))
def test_a_value_is_masked_in_any_surroundings(before: str, after: str) -> None:  # T89
    assert TOKEN not in known(TOKEN).masked(before + TOKEN + after)


def test_the_oldest_values_are_dropped_first() -> None:
    values = SecretValues(most=100)
    tokens = [f"{number:04d}-{'x' * 20}-{number:04d}" for number in range(200)]
    values.remember(*tokens)
    assert values.masked(tokens[-1]) == "****"
    assert values.masked(tokens[0]) == tokens[0]


def test_many_values_do_not_make_the_search_slow() -> None:
    few, many = known(TOKEN), SecretValues(most=20_000)
    many.remember(*(f"eyJhbGciOiJub25lIn0.{number:06d}-{TOKEN}" for number in range(5000)))
    text = "eyJhbGci" * 500
    for values in (few, many):
        begun = time.process_time()
        values.masked(text)
        assert time.process_time() - begun < 0.1


def test_an_excerpt_is_masked_before_it_is_cut() -> None:  # T89
    token = "canary-of-an-excerpt-0123456789-abcdefghijklmnop"
    TokenSet(access_token=token, obtained_at=0.0)
    for before in range(140, 215):
        shown = excerpt("." * before + token + "." * 100)
        assert token[:12] not in shown
        assert len(shown) <= 201


def test_an_error_never_has_a_value_of_ours() -> None:  # T89
    token = "canary-of-an-error-0123456789-abcdefghijklmnop"
    TokenSet(access_token="x" * 20, refresh_token=token, obtained_at=0.0)
    assert str(McpAuthProxyError(f"It said: {token}.")) == "It said: ****."
    assert "canary-of" not in str(McpAuthProxyError(f"It said: {quote(token)!r}"))
