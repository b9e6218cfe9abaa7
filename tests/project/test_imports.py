"""The layers import downwards only; the contract is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).with_name("lint-imports")


def lint(sources: Path) -> subprocess.CompletedProcess[str]:
    command = [str(COMMAND), "--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=False)


def test_every_layer_imports_only_from_the_layers_below_it() -> None:
    done = lint(ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("store/grants.py", "import mcp_auth_proxy.proxy"),
        ("store/grants.py", "import mcp_auth_proxy.oauth"),
        ("servers.py", "import mcp_auth_proxy.store"),
        ("proxy/routes.py", "import mcp.types"),
        ("oauth/fetch.py", "import starlette.requests"),
        ("helpers.py", ""),
    ],
)
def test_a_violation_of_the_contract_is_noticed(tmp_path: Path, module: str, line: str) -> None:
    package = tmp_path / "mcp_auth_proxy"
    for layer in (
        "cli",
        "client",
        "proxy",
        "web",
        "identity",
        "observability",
        "broker",
        "oauth",
        "store",
        "config",
        "net",
        "rpc",
    ):
        (package / layer).mkdir(parents=True)
        (package / layer / "__init__.py").touch()
    for name in ("__init__.py", "app.py", "router.py", "servers.py", "models.py", "errors.py", "secret_values.py"):
        (package / name).touch()
    assert lint(tmp_path).returncode == 0
    (package / module).write_text(line + "\n")
    assert lint(tmp_path).returncode == 1


@pytest.mark.parametrize("library", ["msgspec", "jwt", "mcp"])
def test_a_proxy_imports_libraries_only_when_they_are_used(library: str) -> None:
    """They take some megabytes."""
    done = subprocess.run(
        [sys.executable, "-c", f"import mcp_auth_proxy.app, sys; print('{library}' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert done.stdout.strip() == "False"
