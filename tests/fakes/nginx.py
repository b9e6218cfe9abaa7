"""nginx with a server block of the documentation, which may be one that its readers would get wrong."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.processes import Child
from conftest import SEARCH

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def command(folder: Path, server: str) -> list[str]:
    """Write the configuration with this ``server`` block; return what runs it in the foreground."""
    file = folder / "nginx.conf"
    own = ["access_log off;", *(f"{kind}_temp_path {folder}/{kind};" for kind in _TEMPORARY)]
    # Its workers read the file of passwords, which other users can't reach in a test's folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    main = f"{user}daemon off;\npid {folder}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
    file.write_text("\n".join([main, "http {", *own, server, "}", ""]))
    return ["nginx", "-p", str(folder), "-c", str(file), "-e", "stderr"]


@asynccontextmanager
async def running_nginx(folder: Path, server: str, port: int) -> AsyncIterator[None]:
    """Run nginx until the block ends."""
    folder.mkdir(exist_ok=True)
    environment = {"HOME": str(folder), "PATH": SEARCH}
    child = Child(command(folder, server), log=folder / "nginx.log", environment=environment)
    try:
        await asyncio.to_thread(child.wait_for, port)
        yield
    finally:
        child.stop()
