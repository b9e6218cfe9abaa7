"""Reading YAML without guessing types."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.config.document import parse
from mcp_auth_proxy.errors import ConfigError, ConfigurationError


def test_scalars_stay_as_written() -> None:
    document = parse(b"a: off\nb: 0123\nc: 2026-01-01\nd: 1_0\ne: 12:30\nf: 'null'\ng: ''\nh: 1e3\n")
    assert document.content == {
        "a": "off", "b": "0123", "c": "2026-01-01", "d": "1_0", "e": "12:30", "f": "null", "g": "", "h": "1e3",
    }  # fmt: skip


def test_nothing_and_null_are_none() -> None:
    assert parse(b"a:\nb: ~\nc: null\n").content == {"a": None, "b": None, "c": None}


def test_a_duplicate_key_is_an_error_with_both_lines() -> None:
    document = parse(b"a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    assert document.errors == (ConfigError("b.c", "duplicate key, first on line 3", 5),)


def test_anchors_and_merges_are_not_duplicates() -> None:
    document = parse(b"x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: *x\n")
    assert document.errors == ()
    assert document.content == {"x": {"a": "1", "b": "2"}, "y": {"a": "1", "b": "3"}, "z": {"a": "1", "b": "2"}}


def test_a_path_without_a_line_has_that_of_its_parent() -> None:
    document = parse(b"a: 1\nb:\n  c: [x,\n    y]\n")
    assert [document.line(path) for path in ("a", "b.c", "b.c[1]", "b.zzz", "b.c[1].q", "", "q")] == [
        1,
        3,
        4,
        2,
        4,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"a: [1,\n  b: {", "line 3, column 1"),
        (b"a: 1\nb: !!int x", "line 2, column 4"),
        (b"a: 1\n\tb: 2\n", "line 2, column 1"),
        (b"a: 1\nb: \x00\n", "line 2"),
        (b"a: 1\n\xff\xfe", "line 2"),
        (b"a: *nope", "line 1, column 4"),
        (b"a: !!python/object:os.system x", "line 1, column 4"),
        (b"? [a]\n: b", "line 1"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
    ],
)
def test_invalid_yaml_is_refused_with_its_position(data: bytes, where: str) -> None:
    with pytest.raises(ConfigurationError, match=where):
        parse(data)


@pytest.mark.parametrize("value", ["*{}", "!{} x", "!<{}> x", "!!{} x", "!{}", "&{} a\n  other: &{} b", "!a!{} x"])
def test_a_secret_that_yaml_takes_for_an_alias_an_anchor_or_a_tag_is_not_repeated(value: str) -> None:  # T45
    secret = "canary-'secret'" if value.startswith("!") and "<" not in value else "canary"
    text = f"client:\n  client_secret: {value.replace('{}', secret)}\n"
    try:
        parse(text.encode())
    except ConfigurationError as error:
        assert "canary" not in str(error)
        assert "line " in str(error)
    else:
        assert value.startswith("&")


@pytest.mark.parametrize("data", [b"[" * 300_000, b"{a: " * 100_000, b"- " * 100_000, b"[" * 5000 + b"]" * 5000])
def test_deep_nesting_is_refused_without_a_crash(data: bytes) -> None:
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        parse(data)


@pytest.mark.parametrize("data", [b"&a [*a]", b"a: &a {<<: *a, b: 1}", b"a: &a {b: *a}"])
def test_a_document_that_contains_itself_does_not_hang(data: bytes) -> None:
    try:
        parse(data)
    except ConfigurationError as error:
        assert error.errors


def test_merges_that_multiply_are_refused_at_once() -> None:
    """Each line merges the one before ten times, so the last would have 10^10 keys."""
    lines = [b"k0: &k0 {a: 1}"]
    lines += [b"k%d: &k%d {<<: [%s]}" % (n, n, b", ".join([b"*k%d" % (n - 1)] * 10)) for n in range(1, 11)]
    begun = time.process_time()
    with pytest.raises(ConfigurationError, match=r"line 6, column 5: not valid YAML: .* merged keys"):
        parse(b"\n".join(lines))
    assert time.process_time() - begun < 5


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_a_configuration_error(data: bytes) -> None:
    try:
        parse(data)
    except ConfigurationError as error:
        assert error.errors


@given(
    st.lists(
        st.sampled_from(
            [
                b"a: ",
                b"&x ",
                b"*x",
                b"<<: ",
                b"{",
                b"}",
                b"[",
                b"]",
                b"\n",
                b"  ",
                b"- ",
                b"!!int ",
                b"z",
                b",",
                b"!!set ",
                b"!!binary ",
            ]
        ),
        max_size=14,
    )
)
def test_any_yaml_like_text_is_a_document_or_a_configuration_error(parts: list[bytes]) -> None:
    try:
        parse(b"".join(parts))
    except ConfigurationError as error:
        assert error.errors
