"""Logs: no secret in them whatever wrote it, one line for an event, and still of use to a reader."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.observability import logs

CANARY = "cAnArY-0123456789.abc_DEF~x"
PARAMETERS = [
    "access_token",
    "refresh_token",
    "id_token",
    "id_token_hint",
    "subject_token",
    "actor_token",
    "token",
    "code",
    "user_code",
    "device_code",
    "code_verifier",
    "client_secret",
    "client_assertion",
    "assertion",
    "state",
    "password",
    "registration_access_token",
]

SHAPES = [
    "GET https://as.example/token?{name}={canary} 200",
    "https://as.example/cb?a=1&{name}={canary}&iss=x",
    "https://as.example/cb#{name}={canary}",
    "next=https%3A%2F%2Fas.example%2Fcb%3F{name}%3D{canary}%26a%3D1",
    "grant_type=refresh_token&{name}={canary}",
    '{{"{name}":"{canary}","a":1}}',
    '{{"{name}" : "{canary}"}}',
    '{{\n  "{name}": "{canary}"\n}}',
    '"{{\\"{name}\\":\\"{canary}\\"}}"',
    "{{'{name}': '{canary}', 'a': 1}}",
    "[('{name}', '{canary}')]",
    "[(b'{name}', b'{canary}')]",
    "Form(grant='x', {name}='{canary}')",
    '{name}="{canary}"',
    '{name}="two words {canary}"',
    "{NAME}={canary}",
    '{{"{name}":"with \\" and {canary}"}}',
]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_of_a_secret_parameter_is_masked(shape: str, name: str) -> None:  # T45
    line = shape.format(name=name, NAME=name.upper(), canary=CANARY)
    shown = logs.redact(line)
    assert CANARY not in shown
    assert "cAnArY" not in shown
    assert name in shown.lower()


@pytest.mark.parametrize(
    "line",
    [
        f"Authorization: Bearer {CANARY}",
        f"authorization: Basic {CANARY}==",
        f"authorization: DPoP {CANARY}",
        f"authorization: {CANARY}",
        f"Proxy-Authorization: Basic {CANARY}",
        f"(b'authorization', b'Bearer {CANARY}')",
        f"[('authorization', 'Custom {CANARY}')]",
        f"{{'Authorization': 'Bearer {CANARY}'}}",
        f"bearer {CANARY} was refused",
        f"Cookie: mcp_auth_flow_1a={CANARY}; other={CANARY}",
        f"set-cookie: mcp_auth_flow_1a={CANARY}; Path=/; HttpOnly",
        f"[(b'cookie', b'a={CANARY}; b=1'), (b'accept', b'*/*')]",
        f"DPoP: {CANARY}",
        f"X-Api-Key: {CANARY}",
        f"client_secret: {CANARY}",
        f"password: {CANARY}",
        f"refresh_token is {CANARY[:0]}access_token: {CANARY}",
        f"https://user:{CANARY}@as.example/token",
        f"postgresql://proxy:{CANARY}@db/proxy",
        "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJjQW5BclkifQ.c2lnbmF0dXJlLWNBbkFyWQ was refused",
    ],
)
def test_a_credential_in_another_place_is_masked(line: str) -> None:  # T45
    shown = logs.redact(line)
    assert "cAnArY" not in shown
    assert "eyJzdWI" not in shown
    assert "****" in shown


@pytest.mark.parametrize(
    "line",
    [
        "GET https://as.example/token 200",
        "the token endpoint answered status code: 200",
        "the token endpoint answered with code 200, not JSON",
        "server linear answered HTTP 401",
        '{"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"no"}}',
        "the state of the flow is pending",
        "state: pending, token: dead, code: unknown",
        "invalid_grant: the refresh token has expired",
        "token_type=Bearer expires_in=3600",
        "tokens=5 barcode=7 stateful=yes max_tokens=9",
        "Bearer tokens are refused there",
        "Basic authentication failed",
        'WWW-Authenticate: Bearer resource_metadata="https://mcp.example/.well-known/oauth-protected-resource"',
        'WWW-Authenticate: Bearer realm="x", error="insufficient_scope", scope="read write"',
        "server linear needs your authorization, open this link: http://127.0.0.1:8787/connect/linear?flow=Ab3-_9",
        "servers.linear.oauth.client_secret must be a text",
        "it can't be authorized: the authorization server said no",
        "https://as.example:8443/path@2?x=y",
        "the password grant is not offered",
    ],
)
def test_what_holds_no_secret_can_be_read(line: str) -> None:
    assert logs.redact(line) == line


@given(
    st.text(alphabet="abc&=\"'\\:,;{}[]() \n%3D", max_size=20),
    st.sampled_from(PARAMETERS),
    st.sampled_from(["=", '":"', '": "', "': '", "%3D"]),
)
def test_a_canary_is_masked_in_any_surroundings(before: str, name: str, separator: str) -> None:  # T45
    quote = separator[-1] if separator[-1] in "\"'" else ""
    opening = separator[0] if quote else ""
    line = f"{before} {opening}{name}{separator}{CANARY}{quote} end"
    assert CANARY not in logs.redact(line)


@pytest.mark.parametrize(
    "text",
    [
        "token=" * 20_000,
        "a_" * 50_000,
        '"token":"' * 20_000,
        "://a:" * 20_000,
        "\\" * 100_000,
        'token="' + "\\" * 100_000,
        "Bearer " * 20_000,
        "eyJ" * 30_000,
        "cookie:" * 20_000,
        " " * 100_000,
        "token" + " " * 100_000,
        "-" * 100_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_lines_are_masked_in_time_that_grows_with_their_length(text: str) -> None:
    begun = time.process_time()
    logs.redact(text)
    assert time.process_time() - begun < 1


# Lines


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    names = ("", "mcp_auth_proxy", "uvicorn.error", "httpx2", "aiosqlite")
    before = {name: (logging.getLogger(name).level, list(logging.getLogger(name).filters)) for name in names}
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers
    for name, (level, filters) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).filters[:] = filters


OURS = logging.getLogger("mcp_auth_proxy.test")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
    ],
)
def test_a_level_shows_itself_and_what_is_graver(
    level: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(level, "text")
    for name in ("debug", "info", "warning", "error"):
        getattr(OURS, name)("a %s line", name)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(" a ")[1].split()[0] for line in err.splitlines()] == shown


def test_every_level_of_the_command_line_is_known() -> None:
    assert [*logs.LEVELS] == ["debug", "info", "warning"]


@pytest.mark.parametrize("level", ["debug", "info", "warning"])
@pytest.mark.parametrize("library", ["httpx2", "httpcore2", "uvicorn.error", "aiosqlite", "asyncio"])
def test_libraries_say_no_more_than_warnings(  # T45
    library: str, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(level, "text")
    logging.getLogger(library).info("GET https://as.example/?code=%s", CANARY)
    assert capsys.readouterr().err == ""
    logging.getLogger(library).warning("GET https://as.example/?code=%s", CANARY)
    err = capsys.readouterr().err
    assert "code=****" in err
    assert CANARY not in err


def fail() -> None:
    raise ValueError(f"no such code: https://as.example/?code={CANARY}\nsecond line")


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_is_shown_with_its_traceback_and_without_secrets(  # T45
    format: logs.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", format)
    try:
        fail()
    except ValueError:
        OURS.exception("it failed")
    err = capsys.readouterr().err
    assert "ValueError" in err
    assert "in fail" in err
    assert CANARY not in err


@pytest.mark.parametrize(
    "evil", ["a\n12:00:00 warning forged", "a\r\nb", "a\x1b[2Jb", "a\x00b", "a\x85b", "a\u2028b", "a\x7fb"]
)
def test_a_message_is_one_line_and_can_not_steer_a_terminal(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    OURS.warning("the server said: %s", evil)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.removesuffix("\n").isprintable()
    assert "said: a" in err


def test_text_of_other_scripts_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    OURS.warning("naïve 日本語 🙂")
    assert "naïve 日本語 🙂" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message", ["plain", 'quo"te', "new\nline", "naïve 🙂", "\x1b[2J", "\ud800", "\u2028", f"?code={CANARY}"]
)
def test_every_json_line_is_valid_json(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    OURS.info("%s", message)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.isascii(), "whatever the encoding of stderr, it is valid"
    entry = json.loads(err)
    assert entry["message"] == (message if CANARY not in message else "?code=****")
    assert (entry["level"], entry["logger"]) == ("info", "mcp_auth_proxy.test")
    assert time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S")
    assert entry["time"].endswith("Z")


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_message_that_does_not_fit_its_arguments_shows_no_secret(  # T45
    format: logs.Format, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", format)
    OURS.warning("code=%s and %d", CANARY, "x")
    err = capsys.readouterr().err
    assert CANARY not in err
    assert "and %d" in err
    if format == "json":
        json.loads(err)


def test_an_answer_cut_short_on_purpose_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logging.getLogger("uvicorn.error").error("ASGI callable returned without completing response.")
    assert capsys.readouterr().err == ""
    logging.getLogger("uvicorn.error").error("Exception in ASGI application")
    assert "Exception" in capsys.readouterr().err


def test_configured_twice_a_line_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logs.configure("debug", "json")
    OURS.debug("once")
    assert json.loads(capsys.readouterr().err)["message"] == "once"
    assert len(logging.getLogger("uvicorn.error").filters) == 1


def test_warnings_of_python_go_through_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """They show a line of source, and ResourceWarning a repr."""
    logs.configure("info", "text")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)
            warnings.warn(f"odd: code={CANARY}", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    assert CANARY not in capsys.readouterr().err


def test_stderr_is_the_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    (handler,) = logging.root.handlers
    assert isinstance(handler, logging.StreamHandler)
    assert handler.stream is sys.stderr
