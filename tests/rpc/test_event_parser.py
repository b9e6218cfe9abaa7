"""Server-sent events, however their bytes arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.checks import cuttings
from mcp_auth_proxy.rpc.event_parser import EventParser

PIECES = [
    b"data",
    b"data: a",
    b"data:b",
    b"event: message",
    b"event: other",
    b"id: 1",
    b"retry: 50",
    b": c",
    b"\xef\xbb\xbf",
]
ENDS = [b"\n", b"\r\n", b"\r", b"\n\n", b"\r\r", b"\n\r\n"]


def read(*parts: bytes) -> tuple[list[bytes], bytes, float | None]:
    parser = EventParser()
    found = [data for part in parts for data in parser.feed(part)]
    return found, parser.last_id, parser.retry


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata:a\r\rdata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b": ping\n\nevent: message\ndata: a\n\n", [b"a"]),
        (b"event: endpoint\ndata: a\n\ndata: b\n\n", [b"b"]),
        (b"data\n\ndata:\n\nunknown: a\n\n", []),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\n", []),
    ],
)
def test_a_stream_has_these_events(stream: bytes, events: list[bytes]) -> None:
    assert read(stream)[0] == events


def test_an_id_holds_until_another_one_comes_and_counts_with_its_event() -> None:
    assert read(b"id: 1\ndata:\n\ndata: a\n\nid: 2\n") == ([b"a"], b"1", None)
    parser = EventParser(last_id=b"1")
    assert parser.feed(b"data: a\n\n") == [b"a"]
    assert parser.last_id == b"1"


@pytest.mark.parametrize("value", [b"a\x00", b"\x01", b"\xff", b"1" * 1025, b""])
def test_an_id_that_no_header_field_can_carry_is_none(value: bytes) -> None:
    assert read(b"id: 1\n\nid: " + value + b"\ndata: a\n\n")[1] == b""


def test_the_time_to_wait_is_in_milliseconds() -> None:
    assert read(b"retry: 1500\n\n")[2] == 1.5
    assert read(b"retry: soon\n\n")[2] is None


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 200, b"data: x\n" * 60])
def test_an_event_without_an_end_is_refused(stream: bytes) -> None:
    parser = EventParser(limit=100)
    with pytest.raises(ValueError, match="longer than"):
        for part in cuttings(stream)[-1]:
            parser.feed(part)


@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=12), st.sampled_from(ENDS))
def test_the_events_do_not_depend_on_how_the_bytes_are_cut(pieces: list[bytes], end: bytes) -> None:
    whole, *others = [read(*parts) for parts in cuttings(end.join([*pieces, b"", b""]))]
    assert all(other == whole for other in others)
