"""The access log: one line for each request, without anything that could contain a secret."""

import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_auth_proxy.observability import logs
from mcp_auth_proxy.observability.access_log import AccessLog, Entry, method_token

TRACE = "0af7651916cd43dd8448eb211c80319c"
ENTRY = Entry(
    server="notes",
    account="local/default",
    method="POST",
    mcp_method="tools/call",
    status=200,
    size=1234,
    seconds=0.0123456,
    trace_id=TRACE,
)
BARE = Entry(
    server="notes",
    account="local/default",
    method="GET",
    mcp_method=None,
    status=499,
    size=0,
    seconds=60.0,
    trace_id=None,
)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    names = ("", "mcp_auth_proxy", "mcp_auth_proxy.access", "uvicorn.error")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def test_a_line_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text", access_log=True)
    AccessLog().write(ENTRY)
    AccessLog().write(BARE)
    first, second = capsys.readouterr().err.splitlines()
    assert first[20:] == (
        "info    request server=notes account=local/default method=POST mcp_method=tools/call status=200 bytes=1234 "
        f"duration_ms=12.346 trace_id={TRACE}"
    )
    assert second[20:] == (
        "info    request server=notes account=local/default method=GET status=499 bytes=0 duration_ms=60000.0"
    )


def test_a_line_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json", access_log=True)
    AccessLog().write(ENTRY)
    entry = json.loads(capsys.readouterr().err)
    del entry["time"]
    assert entry == {
        "level": "info",
        "logger": "mcp_auth_proxy.access",
        "message": "request",
        "server": "notes",
        "account": "local/default",
        "method": "POST",
        "mcp_method": "tools/call",
        "status": 200,
        "bytes": 1234,
        "duration_ms": 12.346,
        "trace_id": TRACE,
    }


@pytest.mark.parametrize(
    ("level", "asked", "enabled"),
    [
        ("debug", False, True),
        ("debug", True, True),
        ("info", False, False),
        ("info", True, True),
        ("warning", False, False),
        ("warning", True, True),
    ],
)
def test_it_is_on_if_enabled_and_always_at_debug(
    level: str, asked: bool, enabled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(level, "text", access_log=asked)
    log = AccessLog()
    assert log.enabled is enabled
    if enabled:
        log.write(ENTRY)
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "method",
    [
        "initialize",
        "ping",
        "tools/call",
        "tools/list",
        "server/discover",
        "subscriptions/listen",
        "logging/setLevel",
        "notifications/initialized",
        "notifications/resources/list_changed",
        "sampling/createMessage",
    ],
)
def test_the_methods_of_mcp_are_shown(method: str) -> None:
    assert method_token(method) == method


@pytest.mark.parametrize(
    "value",
    [
        "",
        "/",
        "tools/",
        "tools call",
        "tools/call\n12:00:00 warning forged",
        "tools/call?x=1",
        "eyJhbGciOiJFUzI1NiJ9",
        "0af7651916cd43dd",
        "a" * 33,
        "a/b/c/d/e",
        "método",
        "Bearer",
    ],
)
def test_any_other_method_is_not_shown(value: str) -> None:
    assert method_token(value) is None


@given(st.text())
def test_a_shown_method_is_short_and_consists_of_letters(value: str) -> None:
    shown = method_token(value)
    assert shown is None or (len(shown) <= 131 and shown.isascii() and not any(c.isdigit() for c in shown))
