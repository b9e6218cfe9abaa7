"""The trace id of a request: taken from a valid ``traceparent``, and from nothing else (W3C Trace Context)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.observability import trace

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
VALID = f"00-{TRACE}-{PARENT}-01".encode()

HEX = st.text(alphabet="0123456789abcdef", min_size=1)


@pytest.mark.parametrize(
    "value",
    [
        VALID,
        f"00-{TRACE}-{PARENT}-00".encode(),
        f"01-{TRACE}-{PARENT}-01".encode(),
        f"cc-{TRACE}-{PARENT}-01-what-the-future-brings".encode(),
        f"fe-{TRACE}-{PARENT}-ff-".encode(),
    ],
)
def test_the_trace_id_of_a_valid_value(value: bytes) -> None:
    assert trace.parse_trace_id(value) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        b"",
        TRACE.encode(),
        VALID[:-1],
        VALID[:-3],
        VALID + b"0",
        VALID + b"-future",  # version 00 has four fields
        VALID + b"\n",
        b" " + VALID,
        VALID.upper(),
        VALID.replace(b"-", b"_"),
        b"ff" + VALID[2:],
        b"0" + VALID,
        f"cc-{TRACE}-{PARENT}-01.future".encode(),
        f"00-{'0' * 32}-{PARENT}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"00-{TRACE[:-1]}g-{PARENT}-01".encode(),
        f"00-{TRACE}-{PARENT}-0x".encode(),
        f"00-{TRACE[:-1]}-{PARENT}-01".encode(),
        VALID + b"," + VALID,
    ],
)
def test_an_invalid_value_has_no_trace_id(value: bytes) -> None:
    assert trace.parse_trace_id(value) is None


@given(st.binary(max_size=80) | st.text(alphabet="0123456789abcdef-f", max_size=70).map(str.encode))
def test_what_is_returned_is_always_a_trace_id(value: bytes) -> None:
    found = trace.parse_trace_id(value)
    if found is not None:
        assert len(found) == 32
        assert set(found) <= set("0123456789abcdef")
        assert set(found) != {"0"}
        assert value[3:35].decode() == found


@given(
    st.integers(0, 254),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.integers(0, 255),
)
def test_every_valid_value_is_understood(version: int, trace_id: int, parent: int, flags: int) -> None:
    value = f"{version:02x}-{trace_id:032x}-{parent:016x}-{flags:02x}".encode()
    assert trace.parse_trace_id(value) == f"{trace_id:032x}"


def test_two_traceparents_have_no_trace_id() -> None:
    field = (b"traceparent", VALID)
    assert trace.trace_id_of([(b"accept", b"*/*"), field]) == TRACE
    assert trace.trace_id_of([field, field]) is None
    assert trace.trace_id_of([(b"tracestate", VALID)]) is None


def test_a_log_line_has_it_as_a_field() -> None:
    assert trace.log_extra(TRACE) == {"fields": {"trace_id": TRACE}}
    assert trace.log_extra(None) == trace.log_extra("") == {}
