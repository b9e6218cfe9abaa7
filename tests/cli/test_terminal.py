"""Colors and the spinner: on a terminal only, and not against the user's will."""

import asyncio
import fcntl
import os
import pty
import struct
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from fakes.proxy import Environment, start_command, until, write_config

ESCAPE = b"\x1b["
RUN = "import os, sys; from mcp_auth_proxy.cli.main import main; sys.argv[0] = 'mcp-auth-proxy'; main()"
SPIN = """
import time
from mcp_auth_proxy.cli.terminal import complain, waiting
with waiting("Waiting for your consent"):
    time.sleep(0.15)
complain("done")
"""


async def on_terminal(code: str, *arguments: str, env: Environment, columns: int = 60) -> bytes:
    """What a Python program shows on a terminal of its own."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    given = {"NO_COLOR": None, "FORCE_COLOR": None, "COLUMNS": None, "TERM": "xterm", **env}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *arguments),
        env={name: value for name, value in {**os.environ, **given}.items() if value is not None},
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    os.set_blocking(outside, False)
    shown = bytearray()

    def ended() -> bool:
        with suppress(BlockingIOError, OSError):
            shown.extend(os.read(outside, 65536))
        return process.returncode is not None

    try:
        waits = asyncio.create_task(process.wait())
        await until(ended, "the command has ended")
        ended()
        await waits
    finally:
        os.close(outside)
    return bytes(shown)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, {"notes": "https://notes.example/mcp", "a": "https://a.example/mcp"})


@pytest.mark.parametrize(
    ("env", "colored"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
    ids=str,
)
async def test_status_has_colors_on_a_terminal_unless_they_are_not_wanted(
    config: Path, env: Environment, colored: bool
) -> None:
    shown = await on_terminal(RUN, "status", "--config", str(config), env=env)
    assert (ESCAPE in shown) is colored
    assert b"needs consent" in shown
    lines = shown.replace(b"\x1b[1m", b"").replace(b"\x1b[36m", b"").replace(b"\x1b[0m", b"").decode().splitlines()
    table = lines[next(at for at, line in enumerate(lines) if line.startswith("SERVER")) :]
    assert table[0].split() == ["SERVER", "STATE", "DETAILS"]
    assert {len(line) <= 60 for line in table} == {True}
    assert {line[22:24].strip() != "" for line in table[1:] if line} == {True}


@pytest.mark.parametrize(("env", "colored"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "0"}, False)])
async def test_status_is_plain_in_a_pipe_unless_colors_are_forced(
    config: Path, env: dict[str, str], colored: bool
) -> None:
    variables: Environment = {"NO_COLOR": None, "FORCE_COLOR": None, **env}
    process = await start_command("status", "--config", str(config), env=variables)
    out, _ = await asyncio.wait_for(process.communicate(), 50)
    assert (ESCAPE in out) is colored
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize(("env", "spins"), [({}, True), ({"TERM": "dumb"}, False)], ids=str)
async def test_a_spinner_turns_while_something_is_waited_for_and_leaves_nothing(env: Environment, spins: bool) -> None:
    shown = (await on_terminal(SPIN, env={"PYTHONUTF8": "1", **env})).decode()
    assert ("Waiting for your consent" in shown) is spins
    assert shown.endswith("\r\x1b[Kdone\r\n" if spins else "done\r\n")
    assert (shown.count("\u280b") >= 1) is spins


async def test_nothing_spins_in_a_pipe() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SPIN), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert await asyncio.wait_for(process.communicate(), 50) == (b"", b"done\n")
