"""Another user of this machine, for tests of what belongs to somebody else. Only root can act for one."""

import os

import pytest

NOBODY = 65534
"""The user and the group of that number: they exist everywhere, and own nothing."""

as_root = pytest.mark.skipif(
    os.geteuid() != 0 and os.environ.get("MCP_AUTH_PROXY_REQUIRE_ALL") != "1",
    reason="only root can give a file to another user",
)
