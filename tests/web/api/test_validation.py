"""Bodies and queries become models, or every fault of them is named."""

from typing import Annotated, Any
from urllib.parse import urlencode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.web.api.models import Body, Check, Name
from mcp_auth_proxy.web.api.pages import PageQuery
from mcp_auth_proxy.web.api.problems import Problem
from mcp_auth_proxy.web.api.validation import MAX_FAULTS, read_body, read_query


def _even(number: int) -> None:
    if number % 2:
        raise ValueError("must be even")


class Inner(Body):
    number: Annotated[int, Check(_even)]
    words: list[Name] = []  # noqa: RUF012 - msgspec copies it


class Outer(Body):
    name: Name
    inner: Inner | None = None
    more: list[Inner] = []  # noqa: RUF012
    named: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}  # noqa: RUF012


def faults(raw: bytes, model: type[msgspec.Struct] = Outer) -> set[tuple[str, str]]:
    """Return place and type of each fault; empty if there is none."""
    try:
        read_body(raw, model)
    except Problem as problem:
        assert problem.status == 422
        assert problem.errors
        return {(".".join(map(str, fault.loc)), fault.type) for fault in problem.errors}
    return set()


def test_a_valid_body_is_read() -> None:
    raw = b'{"name": "n", "inner": {"number": 2}, "more": [{"number": 4, "words": ["w"]}], "named": {"a": 1}}'
    found = read_body(raw, Outer)
    assert found == Outer(name="n", inner=Inner(number=2), more=[Inner(number=4, words=["w"])], named={"a": 1})


def test_every_fault_is_named_with_its_place() -> None:
    raw = (
        b'{"inner": {"number": 3, "x": 1}, "more": [{"number": "4", "words": ["", 5]}, 7], "named": {"a": -1, "b": 0},'
        b' "else": null}'
    )
    assert faults(raw) == {
        ("body.name", "missing"),
        ("body.inner.number", "value_error"),
        ("body.inner.x", "extra_forbidden"),
        ("body.more.0.number", "type_error"),
        ("body.more.0.words.0", "value_error"),
        ("body.more.0.words.1", "type_error"),
        ("body.more.1", "type_error"),
        ("body.named.a", "value_error"),
        ("body.else", "extra_forbidden"),
    }


def test_the_number_of_named_faults_is_bounded() -> None:
    raw = msgspec.json.encode({"name": "n", "more": [{}] * 10_000})
    with pytest.raises(Problem) as refused:
        read_body(raw, Outer)
    assert len(refused.value.errors) == MAX_FAULTS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=3) | JSON,
        "inner": st.fixed_dictionaries({}, optional={"number": st.integers() | JSON, "words": JSON, "z": JSON}) | JSON,
        "more": st.lists(st.fixed_dictionaries({"number": st.integers()}) | JSON, max_size=3) | JSON,
        "named": st.dictionaries(st.text(max_size=3), st.integers() | JSON, max_size=3) | JSON,
        "other": JSON,
    },
)


@given(NEARLY | JSON)
def test_a_body_is_refused_exactly_if_msgspec_or_a_check_refuses_it(value: Any) -> None:
    raw = msgspec.json.encode(value)
    try:
        read = msgspec.json.decode(raw, type=Outer)
        numbers = [each.number for each in [*([read.inner] if read.inner else []), *read.more]]
        good = all(number % 2 == 0 for number in numbers)
    except msgspec.ValidationError:
        good = False
    assert bool(faults(raw)) is not good


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    faults(raw)


@given(st.dictionaries(st.sampled_from(["page_size", "page_token", "other"]), st.text(max_size=5)))
def test_any_query_is_read_or_refused(values: dict[str, str]) -> None:
    raw = urlencode(values, errors="surrogatepass").encode()
    try:
        query = read_query(raw, PageQuery)
    except Problem as problem:
        assert problem.status == 422
    else:
        assert 1 <= query.page_size <= 200
        assert query.page_token == values.get("page_token", "")


@pytest.mark.parametrize(
    "raw", [b"page_size=1&page_size=2", b"page_size=%ff", b"&" * 60 + b"a=1&" * 60, b"page_size=\xff"]
)
def test_what_is_ambiguous_or_no_query_is_refused(raw: bytes) -> None:
    with pytest.raises(Problem) as refused:
        read_query(raw, PageQuery)
    assert refused.value.status == 422
