"""When a browser is opened, and that no shell ever runs a part of a link; with real commands as browsers."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from mcp_auth_proxy.web.browser import should_open

DESKTOP = {"DISPLAY": ":0"}


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    ("choice", "loopback", "environ", "opens"),
    [
        ("always", False, {"SSH_CONNECTION": "x", "CI": "1"}, True),
        ("never", True, {**DESKTOP, "BROWSER": "firefox"}, False),
        ("auto", True, DESKTOP, True),
        ("auto", True, {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("auto", True, {}, False),
        ("auto", True, {"BROWSER": "firefox"}, True),
        ("auto", True, {"BROWSER": ""}, False),
        ("auto", False, {**DESKTOP, "BROWSER": "firefox"}, False),
        ("auto", True, {**DESKTOP, "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, False),
        ("auto", True, {**DESKTOP, "CI": "true"}, False),
        ("auto", True, {"BROWSER": "firefox", "CI": "true"}, True),
    ],
)
def test_a_browser_is_opened_if_there_is_a_desktop(
    choice: Literal["auto", "always", "never"], loopback: bool, environ: Mapping[str, str], opens: bool
) -> None:
    assert should_open(choice, loopback=loopback, environ=environ) is opens


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_desktops_without_x_need_no_display(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert should_open("auto", loopback=True, environ={})
    assert not should_open("auto", loopback=True, environ={"CI": "1"})


# In a process of its own: webbrowser reads $BROWSER once.

PROGRAM = """
import logging, sys, threading
logging.basicConfig(format="%(levelname)s %(message)s", level="INFO")
from mcp_auth_proxy.web.browser import open_link
open_link(sys.argv[1])
if sys.argv[2] == "wait":
    [thread.join() for thread in threading.enumerate() if thread is not threading.main_thread()]
else:
    import time
    for _ in range(500):
        try:
            open(sys.argv[2]).close()
            break
        except FileNotFoundError:
            time.sleep(0.01)
"""


def open_in_process(browser: str, link: str, until: str = "wait") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, link, until],
        env={**os.environ, "BROWSER": browser},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def command(folder: Path, text: str) -> Path:
    path = folder / "browser"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "link",
    [
        "http://127.0.0.1:8787/connect/linear?flow=abc",
        "http://127.0.0.1:8787/connect/linear?flow=$(touch canary)&x=`touch canary`"
        ";touch canary|touch canary\ntouch canary",
        "http://127.0.0.1:8787/connect/linear?flow='\"%s%20 x",
    ],
)
def test_the_browser_gets_the_link_as_one_argument_and_no_shell_sees_it(tmp_path: Path, link: str) -> None:  # T6
    told = tmp_path / "told"
    browser = command(tmp_path, f'cd {tmp_path}; printf "%s|" "$#" "$@" > {told}')
    done = open_in_process(str(browser), link)
    assert done.returncode == 0, done.stderr
    assert told.read_text() == f"1|{link}|"
    assert not (tmp_path / "canary").exists()
    assert done.stderr == ""


def test_a_browser_that_stays_in_the_foreground_does_not_delay_the_end(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    browser = command(tmp_path, f"echo $$ > {pid}.part; mv {pid}.part {pid}; exec sleep 30 >/dev/null 2>&1")
    begun = time.monotonic()
    done = open_in_process(str(browser), "http://127.0.0.1/connect/x?flow=y", until=str(pid))
    os.kill(int(pid.read_text()), 9)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("fault", ["exit 1", None], ids=["fails", "is not there"])
def test_a_browser_that_can_not_be_opened_is_logged_once(tmp_path: Path, fault: str | None) -> None:
    browser = tmp_path / "nowhere" if fault is None else command(tmp_path, fault)
    done = open_in_process(f"{browser} %s", "http://127.0.0.1/connect/x?flow=y")
    assert done.returncode == 0
    assert done.stderr.count("WARNING") == 1
    assert "by hand" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_desktop_without_a_browser_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = tmp_path / "xdg-open"
    opener.write_text('#!/bin/sh\necho "$@" >"$0.told"\nexit 3\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    link = "http://127.0.0.1/connect/x?flow=y"
    done = open_in_process("", link)
    assert "no browser could be opened" in done.stderr
    assert Path(f"{opener}.told").read_text() == f"{link}\n"
    opener.write_text("#!/bin/sh\nexit 0\n")
    assert open_in_process("", link).stderr == ""
