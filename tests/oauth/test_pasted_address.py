"""The address that a user pastes: what it says, and why it can't be used."""

from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import AddressRefused
from mcp_auth_proxy.oauth import pasted_address
from mcp_auth_proxy.oauth.pasted_address import MAX_LENGTH, TERMINAL_LINE, read

URI = "http://127.0.0.1:8787/oauth/callback"
words = st.text(min_size=1, max_size=20)


@given(state=words, code=words, more=st.dictionaries(words, words, max_size=4))
def test_what_an_authorization_server_sends_is_read_as_it_is(state: str, code: str, more: dict[str, str]) -> None:
    sent = {**more, "state": state, "code": code}
    params = read(f"{URI}?{urlencode(sent)}", URI)
    assert {name: list(values) for name, values in params.items()} == {name: [sent[name]] for name in sent}


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for pasted in (text, f"{URI}?{text}"):
        try:
            params = read(pasted, URI)
        except AddressRefused as refused:
            assert str(refused).isprintable()
        else:
            assert len(params["state"]) == 1


@pytest.mark.parametrize("around", ["{}", " {}\r", "<{}>", '"{}"', "{}#_=_", "{}#"])
@pytest.mark.parametrize("start", [URI, "127.0.0.1:8787/oauth/callback"])
def test_what_browsers_and_people_add_or_leave_out_does_not_matter(around: str, start: str) -> None:
    assert read(around.format(f"{start}?code=c&state=s"), URI)["code"] == ["c"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("yes", "That is no address. It has to begin with"),
        ("the code is abc/def", "That is no address."),
        ("x" * (MAX_LENGTH + 1), "That is no address: it has more than"),
        ("https://as.example/authorize?state=s&code=c", "That address is not ours: it has to begin with"),
        ("http://127.0.0.1:8788/oauth/callback?state=s&code=c", "That address is not ours: it has to begin with"),
        ("https://127.0.0.1:8787/oauth/callback?state=s&code=c", "That address is not ours: it has to begin with"),
        (URI, "is no complete answer: it needs state, and code or error; copy all of it"),
        (f"{URI}?state=s", "is no complete answer"),
        (f"{URI}?code=c", "is no complete answer"),
        (f"{URI}?code=c&state=", "is no complete answer"),
        (f"{URI}?x={'x' * TERMINAL_LINE}", "terminals cut long lines"),
        (f"{URI}?code=c&state=s&state=t", "it has state more than once"),
        (f"{URI}?code=c&code=d&state=s", "it has code more than once"),
        (f"{URI}?code=c&state=s&iss=a&iss=b", "it has iss more than once"),
        (f"{URI}?code=c&state=%ff", "it has parameters that no authorization server sends"),
        (f"{URI}?code=c&state=s&{'&'.join(f'p{number}=1' for number in range(60))}", "parameters that no"),
    ],
)
def test_each_reason_is_named(text: str, reason: str) -> None:
    with pytest.raises(AddressRefused) as refused:
        read(text, URI)
    assert reason in str(refused.value)


def test_an_address_of_the_longest_code_fits() -> None:
    code = "c" * 4096
    assert read(f"{URI}?code={code}&state=s", URI)["code"] == [code]
    assert pasted_address.MAX_LENGTH > 4096 * 3
