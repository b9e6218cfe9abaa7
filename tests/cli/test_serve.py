"""What ``serve`` does to its own process."""

import resource
from pathlib import Path

import pytest

from fakes.proxy import proxy_process, write_config


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc")
async def test_serve_may_open_as_many_files_as_the_system_grants(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        async with proxy_process(config) as proxy:
            assert resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
