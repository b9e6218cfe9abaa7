"""The programs in docs/library.md run as they stand, for users who have never seen the project."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from fakes.fixtures import RealMcpServer

PAGE = (Path(__file__).parents[2] / "docs/library.md").read_text()
PROGRAMS = [
    block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if "asyncio" in block
]

BROWSER = """
import asyncio, sys
from fakes.headless import consent
asyncio.run(consent(sys.argv[1]))
"""


def test_there_are_programs() -> None:
    assert len(PROGRAMS) == 3


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
async def test_a_program_runs(number: int, tmp_path: Path, real_mcp_server: RealMcpServer) -> None:
    program, browser = tmp_path / "program.py", tmp_path / "browser.py"
    program.write_text(PROGRAMS[number].replace("https://mcp.example.com/mcp", real_mcp_server.url))
    browser.write_text(BROWSER)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    env = {
        **os.environ,
        "BROWSER": f"{sys.executable} {browser} %s",
        "PYTHONPATH": paths,
        "XDG_DATA_HOME": str(tmp_path),
    }
    for _ in range(2):  # the first time with the user, then without
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(program), env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err.decode()
        assert out.decode().strip() in ("400", "200", "add, count, echo, large, whoami, write_note"), out
        env.pop("BROWSER", None)
        env["CI"] = "true"
    assert "open this link" not in err.decode()
