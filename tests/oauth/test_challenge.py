"""WWW-Authenticate: the grammar, and what hostile fields do to it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.oauth.challenge import (
    MAX_BYTES,
    MAX_PARTS,
    BearerChallenge,
    Challenge,
    bearer,
    other_schemes,
    parse,
    wants_nonce,
)


def one(value: str) -> Challenge:
    (challenge,) = parse([value.encode("latin-1")])
    return challenge


def test_parameters_of_a_bearer_challenge_are_read() -> None:
    challenge = one('Bearer error="insufficient_scope", scope="a b", resource_metadata="https://h/.well-known/x"')

    assert challenge.scheme == "bearer"
    assert challenge.params == {
        "error": "insufficient_scope",
        "scope": "a b",
        "resource_metadata": "https://h/.well-known/x",
    }


@pytest.mark.parametrize(
    ("value", "params"),
    [
        ("Bearer", {}),
        ("bearer   realm=x", {"realm": "x"}),
        ('BEARER Realm = "x" ,\tscope\t=\t"y"', {"realm": "x", "scope": "y"}),
        (r'Bearer realm="a \"quoted\", comma=1 \\ end"', {"realm": 'a "quoted", comma=1 \\ end'}),
        ('Bearer realm=""', {"realm": ""}),
        ("Bearer ,, realm=x,, ,scope=y,", {"realm": "x", "scope": "y"}),
        ('Bearer realm="é"', {"realm": "é"}),
        (
            "Bearer resource_metadata=https://h/.well-known/x?a=b, error=e",
            {"resource_metadata": "https://h/.well-known/x?a=b", "error": "e"},
        ),
        ("Bearer bW9yZQ==", {}),
    ],
)
def test_the_forms_that_the_grammar_allows_are_read(value: str, params: dict[str, str]) -> None:
    assert one(value) == Challenge("bearer", params)


def test_several_challenges_in_one_field_are_distinguished() -> None:  # T20
    value = b'Negotiate abc==, Basic realm="a, Bearer scope=evil", Bearer scope="good", error=x, Digest'

    assert parse([value]) == (
        Challenge("negotiate"),
        Challenge("basic", {"realm": "a, Bearer scope=evil"}),
        Challenge("bearer", {"scope": "good", "error": "x"}),
        Challenge("digest"),
    )


def test_several_fields_are_read_in_order() -> None:  # T20
    assert [challenge.scheme for challenge in parse([b"Basic realm=x", b"", b"Bearer realm=y"])] == ["basic", "bearer"]


@pytest.mark.parametrize(
    "value",
    [
        'Bearer error_description="x scope=evil resource_metadata=https://evil/"',
        r'Bearer realm="x\", scope=evil resource_metadata=https://evil/"',
        'Bearer realm="x, scope=evil, resource_metadata=https://evil/',  # unterminated
        'Bearer realm="x" resource_metadata="https://evil/"',  # no comma
        'Bearer realm="x\x00", scope=evil',
        "Bearer realm=, scope=evil",
        'Bearer @ scope="evil"',
        "Bearer abc==, scope=evil",
        "Bearer Bearer scope=evil",
        'Bearer realm=a"b, scope=evil',
        "Bearer realm='a scope=evil'",
    ],
)
def test_nothing_is_read_from_inside_quotes_or_out_of_garbage(value: str) -> None:  # T20
    assert bearer([value.encode("latin-1")]) == BearerChallenge()


def test_a_broken_challenge_does_not_affect_an_earlier_one() -> None:
    assert bearer([b'Bearer scope="a", Basic realm="unterminated']) == BearerChallenge(scopes=("a",))


def test_a_parameter_given_twice_is_ignored() -> None:  # T20
    assert one('Bearer scope="a", SCOPE="b", error=e').params == {"error": "e"}


def test_bearer_challenges_that_differ_leave_the_parameter_out() -> None:  # T20
    found = bearer(
        [b'Bearer scope="a", error=x', b'Bearer scope="b", error=x', b'Bearer resource_metadata="https://h/"']
    )

    assert found == BearerChallenge(error="x", scopes=None, resource_metadata="https://h/")


def test_no_bearer_challenge_is_none() -> None:
    assert bearer([b'Basic realm="x"']) is None
    assert bearer([]) is None


def test_scopes_that_break_their_grammar_are_dropped() -> None:
    assert bearer([b'Bearer scope=" a  b\\\\c a \xe9 d"']) == BearerChallenge(scopes=("a", "d"))
    assert bearer([b'Bearer scope=""']) == BearerChallenge(scopes=None)


def test_fields_beyond_64_kb_are_ignored() -> None:  # T20
    long = b'Bearer realm="' + b"x" * MAX_BYTES + b'"'

    assert parse([long]) == ()
    assert parse([b"Bearer realm=x", long, b"Basic realm=y"]) == (Challenge("bearer", {"realm": "x"}),)


@pytest.mark.parametrize(
    "unit",
    [b"a ", b"a,", b"a=", b'a="', b"\\", b'"\\', b"a b, ", b"a=b, ", b" ", b"\t,", b"a  =", b"==", b'Bearer a="\\"'],
)
def test_64_kb_of_anything_is_parsed_at_once(unit: bytes) -> None:  # T20
    field = b"Bearer " + unit * ((MAX_BYTES - 10) // len(unit))
    begun = time.process_time()
    parse([field])
    # Quadratic work on this much would take minutes; a busy machine must not fail it.
    assert time.process_time() - begun < 5


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_arbitrary_bytes_never_raise(values: list[bytes]) -> None:
    parse(values)
    bearer(values)


@given(st.lists(st.text('Bearr =,"\\ \t\x00é@scope', max_size=60), max_size=3))
def test_arbitrary_syntax_never_raises(values: list[str]) -> None:
    parse([value.encode("latin-1") for value in values])


TOKENS = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=8)
TEXTS = st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]) | st.just("\t"), max_size=20)


def _written(challenge: tuple[str, dict[str, str]]) -> str:
    scheme, params = challenge
    quoted = (f'{name} = "{_escaped(value)}"' for name, value in params.items())
    return f"{scheme} " + " ,\t".join(quoted)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


@given(
    st.lists(
        st.tuples(TOKENS, st.dictionaries(TOKENS.map(str.lower), TEXTS, min_size=1, max_size=4)), min_size=1, max_size=4
    )
)
def test_a_valid_challenge_is_read_back(challenges: list[tuple[str, dict[str, str]]]) -> None:
    expected = [(scheme.lower(), params) for scheme, params in challenges]

    together = parse([", ".join(map(_written, challenges)).encode("latin-1")])
    apart = parse([_written(challenge).encode("latin-1") for challenge in challenges])

    assert [(challenge.scheme, dict(challenge.params)) for challenge in together] == expected
    assert apart == together


def test_a_dpop_challenge_is_read_as_a_bearer_one_and_remembered() -> None:
    found = bearer([b'Bearer resource_metadata="https://h/", DPoP algs="ES256", error="invalid_token", scope="a b"'])
    assert found == BearerChallenge(error="invalid_token", scopes=("a", "b"), resource_metadata="https://h/", dpop=True)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (b'DPoP error="use_dpop_nonce"', True),
        (b'Bearer, DPoP error="invalid_dpop_proof"', True),
        (b'DPoP error="invalid_token"', False),
        (b'Bearer error="use_dpop_nonce"', False),
        (b'Bearer realm="DPoP error=use_dpop_nonce"', False),
    ],
)
def test_only_a_dpop_challenge_asks_for_a_nonce(field: bytes, expected: bool) -> None:  # T20
    assert wants_nonce([field]) is expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ([], ()),
        ([b"Bearer", b"DPoP algs=x"], ()),
        ([b'bearer scope=a, BASIC realm="x"', b"basic", b"Digest nonce=x"], ("Basic", "Digest")),
        ([b"a, b, c, d"], ("A", "B", "C")),
        ([b"a" * 21], ()),
    ],
)
def test_other_schemes_are_listed_once_and_at_most_three(fields: list[bytes], expected: tuple[str, ...]) -> None:
    assert other_schemes(fields) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("https://a/x", True), ("javascript:x", True), ("/x", False), ("//a/x", False), ("x", False), ("1a:b", False)],
)
def test_only_an_absolute_url_names_metadata(value: str, expected: bool) -> None:
    assert BearerChallenge(resource_metadata=value).names_metadata is expected


@pytest.mark.parametrize(
    "part", ["a,", "a=b,", 'a="",', "a b=c,", "Bearer a=b, ", 'x="\\\\",', "k{}=1,"], ids=lambda part: part.strip()
)
def test_64_kib_are_read_in_a_few_milliseconds(part: str) -> None:  # T82
    value = "Bearer " + "".join(part.format(number) for number in range(64_000 // len(part)))
    begun = time.process_time()
    parse([value.encode()])
    assert time.process_time() - begun < 0.04


def test_a_quoted_string_of_escapes_is_read_in_a_few_milliseconds() -> None:  # T82
    value = b'Bearer error="' + b"\\a" * 32_000 + b'"'
    begun = time.process_time()
    assert one(value.decode()).params == {"error": "a" * 32_000}
    assert time.process_time() - begun < 0.04


def test_what_follows_too_many_parts_is_ignored() -> None:  # T82
    many = ", ".join(f"k{number}=1" for number in range(MAX_PARTS - 2))
    (first, second) = parse([f"Bearer {many}, Basic realm=x, DPoP".encode()])
    assert (len(first.params), second.scheme, second.params) == (MAX_PARTS - 2, "basic", {})
    assert [found.scheme for found in parse([b"a," * 1000])] == ["a"] * MAX_PARTS


@given(st.text(alphabet='a\\"', max_size=20))
def test_escapes_mean_what_they_escape(text: str) -> None:
    quoted = text.replace("\\", r"\\").replace('"', r"\"")
    assert one(f'Bearer error="{quoted}"').params == {"error": text}
