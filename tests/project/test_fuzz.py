"""The inputs of the fuzzer's corpus, without the fuzzer; and each target notices a parser that breaks a promise."""

import importlib.util
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.__main__ import Outcome, main, report
from fuzz.targets import CORPUS, HERE, TARGETS, corpus
from mcp_auth_proxy.broker import cookie_name
from mcp_auth_proxy.cli.install import undo
from mcp_auth_proxy.config.settings import Secret
from mcp_auth_proxy.net import http_connection, request_parser
from mcp_auth_proxy.oauth import authorization_code, challenge, documents, pasted_address, token_endpoint
from mcp_auth_proxy.proxy import decoding
from mcp_auth_proxy.rpc import answers, event_parser, messages
from mcp_auth_proxy.store import exports

WORDS = [
    b"\r\n",
    b"\n",
    b"\0",
    b'"',
    b"\\",
    b",",
    b"=",
    b"; ",
    b"{",
    b"]",
    b"\xff",
    b"\\ud800",
    b"1e999",
    b"%0d%0a",
    b" \t",
]
INPUTS = [pytest.param(name, path, id=f"{name}-{path.name}") for name in TARGETS for path in corpus(name)]


@pytest.mark.parametrize(("target", "path"), INPUTS)
def test_every_input_of_the_corpus_keeps_the_promises(target: str, path: Path) -> None:
    TARGETS[target](path.read_bytes())


damages = st.lists(
    st.tuples(
        st.integers(0, 4000), st.integers(0, 8), st.binary(max_size=8) | st.sampled_from(WORDS), st.integers(1, 3)
    ),
    max_size=4,
)


@pytest.mark.parametrize("target", TARGETS)
@given(st.data())
def test_damaged_inputs_of_the_corpus_keep_the_promises_too(target: str, data: st.DataObject) -> None:
    content = data.draw(st.sampled_from(corpus(target))).read_bytes()
    for place, removed, added, times in data.draw(damages):
        start = place % (len(content) + 1)
        content = content[:start] + added * times + content[start + removed :]
    TARGETS[target](content)


def test_every_target_has_a_small_corpus_and_every_corpus_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == TARGETS.keys()
    files = [path for name in TARGETS for path in corpus(name)]
    assert sum(path.stat().st_size for path in files) < 2**20
    assert all(re.fullmatch(r"[a-z0-9.-]{1,48}", path.name) for path in files)
    assert {path.stem for path in (HERE / "dictionaries").iterdir()} <= TARGETS.keys()


ANYTHING = re.compile(r".*", re.DOTALL)
ANYTHING_BYTES = re.compile(rb".*", re.DOTALL)
SERVER = b'{"issuer":"https://as.example","token_endpoint":"https://as.example/","scopes_supported":["a\\n"]}'
FIELDS = b"".join(b"X-%d: y\r\n" % number for number in range(201))
CALLBACK = b"state=the-state&iss=https://as.example&code=a&error=b\n%s=the-cookie" % cookie_name("the-state").encode()
OURS = '{"mcpServers": {"a@b": {"url": "http://127.0.0.1:8787/a@b/mcp"}}}'

BREAKS: list[tuple[str, object, str, object, bytes]] = [
    ("challenge", challenge, "_QUOTED", re.compile(r'"([^"]*)"'), b'Bearer scope="a\x01"'),
    ("metadata", documents, "_is_text", lambda value: isinstance(value, str), SERVER),
    ("token", token_endpoint, "_TOKEN", ANYTHING, b'200\n{"access_token":"a\\r","token_type":"bearer"}'),
    (
        "callback",
        authorization_code,
        "_ONCE",
        ("code", "iss"),
        CALLBACK,
    ),
    ("pasted", pasted_address, "_ONCE", (), b"http://127.0.0.1:8787/oauth/callback?state=s&code=a&code=b"),
    (
        "config",
        Secret,
        "__repr__",
        lambda secret: secret.value,
        b"servers: {a: {url: 'https://h/mcp', oauth: {client_id: c, client_secret: 'env:SECRET'}}}",
    ),
    ("clients", undo, "applied", lambda text, insertions: OURS, b'{"a":1}'),
    ("request", request_parser, "MAX_FIELDS", 1000, b"GET / HTTP/1.1\r\nHost: a\r\n%s\r\n" % FIELDS),
    ("response", http_connection, "FIELD_LIMIT", 1000, b"HTTP/1.1 204 \r\n%s\r\n" % FIELDS),
    ("messages", answers, "MAX_REASON", 10_000, b'{"id":1,"method":"x"}'),
    ("messages", messages, "_first_members", lambda start: {"id": 2, "method": "x"}, b'{"id":1,"method":"x"}'),
    ("decoding", decoding, "PIECE", 2**20, b"deflate\n" + zlib.compress(bytes(2**17))),
    ("stdio", event_parser, "_ID", ANYTHING_BYTES, b"id: a\x01\ndata: 1\n\n"),
    ("exports", exports, "decode", lambda content, name: exports.Export(made_at=1.0), b"{}"),
]
"""Target, what is broken in its parser and how, and an input that shows it."""


@pytest.mark.parametrize(("target", "place", "name", "broken", "data"), BREAKS, ids=[broken[0] for broken in BREAKS])
def test_a_target_notices_a_parser_that_breaks_its_promise(
    monkeypatch: pytest.MonkeyPatch, target: str, place: object, name: str, broken: object, data: bytes
) -> None:
    TARGETS[target](data)
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(AssertionError):
        TARGETS[target](data)


def test_every_target_can_fail() -> None:
    assert list(dict.fromkeys(broken[0] for broken in BREAKS)) == list(TARGETS)


def test_an_input_can_be_repeated_without_the_fuzzer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"Bearer")
    assert main(["--target", "challenge", "--input", str(path)]) == 0
    assert "keeps its promises" in capsys.readouterr().out


def test_a_run_that_fails_says_why_and_how_to_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Here the fuzzer itself is missing: it is in an environment of its own."""
    assert importlib.util.find_spec("atheris") is None
    assert main(["--target", "challenge", "--runs", "1"]) == 1
    assert "No module named 'atheris'" in capsys.readouterr().out
    failed = Outcome(
        "token", 1.0, 9, 2, 3, 4, failed=True, finding=Path("fuzz/findings/token-crash-1"), log="INFO: a\nWhy"
    )
    assert report(failed).splitlines()[1:] == [
        "Why",
        "token FAILED",
        'Again: make fuzz ARGS="--target token --input fuzz/findings/token-crash-1"',
    ]
