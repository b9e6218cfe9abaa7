"""Page tokens: only what was sealed for this caller and list is opened (T67)."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.store.cipher import Cipher, Key
from mcp_auth_proxy.web.api.pages import _open, _seal
from mcp_auth_proxy.web.api.problems import Problem

CIPHER = Cipher([Key(id="00" * 4, secret=bytes(32))])
PURPOSE = ("prn_1", "/keys []")


@given(st.text(max_size=100))
def test_a_token_is_opened_for_what_it_was_made_for(position: str) -> None:
    token = _seal(CIPHER, position, PURPOSE)
    assert token.isascii()
    assert _open(CIPHER, token, PURPOSE) == position


@given(st.tuples(st.text(max_size=5), st.text(max_size=5)), st.tuples(st.text(max_size=5), st.text(max_size=5)))
def test_a_token_of_another_purpose_is_400(one: tuple[str, str], other: tuple[str, str]) -> None:
    token = _seal(CIPHER, "7", one)
    if one != other:
        refused(token, other)


@given(st.data())
def test_an_edited_token_is_400(data: st.DataObject) -> None:
    token = _seal(CIPHER, "7", PURPOSE)
    place = data.draw(st.integers(0, len(token) - 1))
    part = data.draw(st.text(max_size=3))
    edited = token[:place] + part + token[place + data.draw(st.integers(0, 2)) :]
    if edited != token:
        refused(edited)


@given(st.text(max_size=50) | st.binary(max_size=90).map(lambda raw: base64.urlsafe_b64encode(raw).decode()))
def test_any_text_is_400(text: str) -> None:
    refused(text)


def test_padding_and_long_tokens_are_400() -> None:
    token = _seal(CIPHER, "7", PURPOSE)
    refused(token + "=" * (-len(token) % 4 or 4))
    refused(_seal(CIPHER, "7" * 1000, PURPOSE))


def refused(token: str, purpose: tuple[str, str] = PURPOSE) -> None:
    with pytest.raises(Problem) as error:
        _open(CIPHER, token, purpose)
    assert error.value.status == 400
