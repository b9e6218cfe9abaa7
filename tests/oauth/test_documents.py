"""Strict JSON, and errors as text."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.errors import DocumentRefused
from mcp_auth_proxy.oauth import oauth_error
from mcp_auth_proxy.oauth.documents import Document, parse_object


def read(body: bytes) -> Document:
    return Document.parse(body, name="paper", url="https://h/x", clause="RFC 1 §2")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"x"',
        b"null",
        b"<html>",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused_with_document_url_and_clause(body: bytes) -> None:
    with pytest.raises(DocumentRefused) as refused:
        read(body)

    assert all(part in str(refused.value) for part in ("paper", "https://h/x", "RFC 1 §2"))


def test_a_key_given_twice_is_refused_when_it_is_read() -> None:
    document = read(b'{"a": "x", "b": "y", "b": "z"}')

    assert document.string("a") == "x"
    with pytest.raises(DocumentRefused, match="b more than once"):
        document.string("b")


def test_many_repeated_keys_are_read_at_once() -> None:
    begun = time.process_time()
    parse_object(b"{" + b",".join(b'"%d":1' % (number % 4500) for number in range(9000)) + b"}")
    assert time.process_time() - begun < 1


def test_null_counts_as_absent() -> None:
    document = read(b'\xef\xbb\xbf{"a": null}')

    assert (document.string("a"), document.strings("a"), document.boolean("a")) == (None, None, False)
    with pytest.raises(DocumentRefused, match="it has no a"):
        document.required_string("a")


@pytest.mark.parametrize("value", [b"1", b"{}", b'"a\\nb"', b'"\\ud800"', b'"a\\u0000"', b'"' + b"x" * 5000 + b'"'])
def test_a_string_that_can_not_be_used_is_refused(value: bytes) -> None:
    document = read(b'{"a": %b, "l": ["x", %b]}' % (value, value))

    with pytest.raises(DocumentRefused):
        document.string("a")
    with pytest.raises(DocumentRefused):
        document.strings("l")
    with pytest.raises(DocumentRefused):
        document.boolean("a")


def test_very_long_integers_do_not_crash() -> None:
    assert parse_object(b'{"a": %b}' % (b"9" * 200_000))["a"] == float("inf")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_value_errors(body: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_object(body)


def test_an_error_is_shown_without_controls_secrets_and_at_bounded_length() -> None:  # T15, T45
    secret = "Zm9vYmFy1234567890Zm9vYmFy1234567890"
    text = oauth_error.format_error(
        "invalid_grant", f"a\r\nb\x00\u202ec {secret} s3cret 0f8fad5b-d9cb-469f-a165-70867728950e", secrets=("s3cret",)
    )

    assert text == "invalid_grant (a b c **** **** 0f8fad5b-d9cb-469f-a165-70867728950e)"
    assert len(oauth_error.format_error("e", "word " * 10_000)) < 400
    assert oauth_error.format_error("e", ["x"]) == "e"


def test_an_error_code_that_breaks_its_grammar_is_replaced() -> None:
    assert oauth_error.code("invalid_grant") == "invalid_grant"
    assert {oauth_error.code(value) for value in ("", 'a"b', "a\nb", "é", "x" * 100, None, 3)} == {"unknown_error"}
