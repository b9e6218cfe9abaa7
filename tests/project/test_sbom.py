"""The bill of materials: every locked package with its version and hashes, and nothing that does not hold."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mcp_auth_proxy import __version__

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / ".venv-sbom/bin/python"
LOCK = (ROOT / "requirements/run.txt").read_text()

pytestmark = pytest.mark.skipif(
    not TOOL.exists() and os.environ.get("MCP_AUTH_PROXY_REQUIRE_ALL") != "1",
    reason="`make sbom` makes the environment that this needs",
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("sbom") / "new" / "sbom.cdx.json"
    options = ["--environment", sys.prefix, "--output", str(output)]
    subprocess.run([TOOL, ROOT / "deploy/sbom.py", *options], check=True, capture_output=True, timeout=50)
    return json.loads(output.read_text())


def test_every_locked_package_is_in_it_with_its_hashes(document: Any) -> None:
    found = {
        (part["name"], part["version"]): {entry["content"] for entry in part["externalReferences"][0]["hashes"]}
        for part in document["components"]
    }
    locked = {
        tuple(entry.split(" ")[0].split("==")): set(re.findall(r"sha256:(\w+)", entry))
        for entry in re.split(r"\n(?=\S)", LOCK)
        if not entry.startswith("#")
    }
    assert found == locked


def test_what_is_installed_has_its_license(document: Any) -> None:
    parts = {part["name"]: part for part in document["components"]}
    assert parts["starlette"]["licenses"][0]["license"]["id"] == "BSD-3-Clause"
    elsewhere = {"httpx2-jsfetch", "pywin32", "tzdata"}
    assert {part["name"] for part in document["components"] if "licenses" not in part} <= elsewhere


def test_it_describes_this_version_and_what_depends_on_what(document: Any) -> None:
    root = document["metadata"]["component"]
    assert (document["specVersion"], root["name"], root["version"]) == ("1.6", "mcp-auth-proxy", __version__)
    needs = {entry["ref"].partition("@")[0]: entry["dependsOn"] for entry in document["dependencies"]}
    assert any(ref.startswith("pkg:pypi/starlette@") for ref in needs[root["bom-ref"]])
    assert any(ref.startswith("pkg:pypi/anyio@") for ref in needs["pkg:pypi/starlette"])
