"""Log lines: one for each event, as text or JSON, with secrets masked and still readable."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator

import pytest

from mcp_auth_proxy.observability import logs


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    names = ("", "mcp_auth_proxy", "mcp_auth_proxy.access", "uvicorn.error", "httpx2", "aiosqlite")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


CANARY = "cAnArY-0123456789.abc_DEF~x"
OURS = logging.getLogger("mcp_auth_proxy.test")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
    ],
)
def test_a_level_shows_itself_and_higher_levels(
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
def test_libraries_log_only_warnings(  # T45
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
def test_a_message_is_one_line_and_can_not_control_a_terminal(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_configured_twice_each_line_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logs.configure("debug", "json")
    OURS.debug("once")
    assert json.loads(capsys.readouterr().err)["message"] == "once"
    assert len(logging.root.handlers) == 1


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


def test_all_logs_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    (handler,) = logging.root.handlers
    assert isinstance(handler, logging.StreamHandler)
    assert handler.stream is sys.stderr


# Fields

FIELDS = {"server": "notes", "status": 200, "duration_ms": 1.5}


def test_fields_follow_the_message_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    OURS.info("a line", extra={"fields": {**FIELDS, "account": 'two words, a "quote" and\na line'}})
    line = capsys.readouterr().err.rstrip("\n")
    assert line.endswith(
        r' a line server=notes status=200 duration_ms=1.5 account="two words, a \"quote\" and\na line"'
    )


def test_fields_are_members_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    OURS.info("a line", extra={"fields": FIELDS})
    entry = json.loads(capsys.readouterr().err)
    assert entry["message"] == "a line"
    assert {name: entry[name] for name in FIELDS} == FIELDS


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_secret_in_a_field_is_masked(format: logs.Format, capsys: pytest.CaptureFixture[str]) -> None:  # T45
    logs.configure("info", format)
    OURS.info("a line", extra={"fields": {"account": f"https://as.example/?code={CANARY}"}})
    err = capsys.readouterr().err
    assert CANARY not in err
    assert "code=****" in err
