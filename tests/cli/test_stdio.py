"""What a bridge imports: clients wait for it, and there may be many."""

import subprocess
import sys


def test_a_bridge_does_without_the_server_and_the_sdk() -> None:
    modules = "mcp", "uvicorn", "starlette", "httpx2", "jinja2", "jwt", "msgspec"
    program = (
        "import sys, mcp_auth_proxy.cli.main, mcp_auth_proxy.config.load, mcp_auth_proxy.cli.stdio\n"
        "import mcp_auth_proxy.cli.stdio_bridge.bridge, mcp_auth_proxy.net.dial\n"
        f"print([name for name in {modules!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "[]"
