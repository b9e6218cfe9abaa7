"""JSON without Python's extensions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.rpc.encoding import decode, encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"NaN", b"[Infinity]", b'{"a":-Infinity}', b"'a'", b"\xff\xfe\xfd", b'{"a":1,}', b"01"]
)
def test_what_rfc_8259_does_not_know_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|Expecting|decode|delimiter|property|Extra"):
        decode(text)


def test_nesting_without_end_is_an_error_and_not_a_crash() -> None:
    with pytest.raises(RecursionError):
        decode(b"[" * 200_000)
    nested: list[object] = []
    for _ in range(200_000):
        nested = [nested]
    with pytest.raises(RecursionError):
        encode(nested)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_what_json_can_not_express_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(value)


def test_a_number_too_large_for_a_float_is_read_as_infinity_and_not_written_again() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode(decode(b"1e999"))


def test_half_a_surrogate_pair_comes_back_as_it_was() -> None:
    assert encode(decode(b'"\\ud83d"')) == b'"\\ud83d"'


@given(VALUES)
def test_what_is_written_is_ascii_on_one_line_and_reads_back(value: object) -> None:
    text = encode(value)
    assert text.isascii()
    assert b"\n" not in text
    assert decode(text) == json.loads(json.dumps(value)) == value
