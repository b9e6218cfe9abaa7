"""The real mcp-remote, which ``make clients`` installs: its user signs in, and it leaves its files behind."""

import asyncio
import os
import re
import shutil
from pathlib import Path

from conftest import CLIENTS, MADE, SEARCH
from fakes.headless import consent

PACKAGES = {"0.1": "mcp-remote-0.1", "0.15": "mcp-remote"}


async def sign_in(version: str, url: str, folder: Path) -> None:
    """Let mcp-remote sign in at a server, and end it once it is connected."""
    node = shutil.which("node", path=os.pathsep.join([*MADE, SEARCH]))
    assert node is not None
    process = await asyncio.create_subprocess_exec(
        node,
        str(CLIENTS / "node_modules" / PACKAGES[version] / "dist/proxy.js"),
        url,
        env={**os.environ, "MCP_REMOTE_CONFIG_DIR": str(folder), "PATH": os.defpath},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    said, opened = "", False
    try:
        assert process.stderr is not None
        assert process.stdin is not None
        async with asyncio.timeout(100):
            async for line in process.stderr:
                said += line.decode()
                link = re.search(r"http://\S+/authorize\?\S+", said)
                if link and not opened:
                    opened = True
                    assert (await consent(link[0])).status_code == 200
                if "Proxy established" in said:
                    break
            # As its client does: by closing its input.
            process.stdin.close()
            await process.stderr.read()
            await process.wait()
        assert "Proxy established" in said, said
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
