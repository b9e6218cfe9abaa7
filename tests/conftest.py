"""Skips tests that need a program which is not installed, such as chromium.

With ``MCP_AUTH_PROXY_REQUIRE_ALL=1``, as in CI, those tests fail instead.
"""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import uvloop

from fakes.postgresql import BIN

pytest_plugins = ["fakes.fixtures"]

hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
"""No deadline per example, because it fails on a busy machine; pytest's timeout bounds the whole test."""

PARTS = {
    "axe": ("node",),
    "buildah": ("buildah",),
    "caddy": ("caddy",),
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "clients": ("node",),
    "debootstrap": ("debootstrap",),
    "envoy": ("envoy",),
    "helm": ("helm",),
    "idp": ("node",),
    "iproute2": ("ip",),
    "nginx": ("nginx",),
    "postgresql": ("initdb",),
    "systemd": ("systemd-analyze",),
    "wrk": ("wrk",),
}
"""Marker → commands, one of which must be installed."""

FROM_CHART = {"envoy", "helm"}
"""The parts that ``make chart`` installs."""

FROM_IDP = {"idp"}
"""The parts that ``make idp`` installs."""

FROM_AXE = {"axe"}
"""The parts that ``make axe`` installs."""

FROM_CLIENTS = {"clients"}
"""The parts that ``make clients`` installs."""

ROOT = Path(__file__).resolve().parents[1]
MADE = (str(ROOT / ".venv-deploy/bin"), str(ROOT / ".venv-conformance/node/bin"))
"""Where they install them."""

CLIENTS = ROOT / "tests/clients"
CLIENTS_PYTHON = ROOT / ".venv-clients/bin/python"
IDENTITY_PROVIDER = ROOT / "tests/deploy/identity_provider"
AXE = ROOT / "tests/e2e/axe"
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", *MADE, *map(str, BIN)])
REQUIRE_ALL = os.environ.get("MCP_AUTH_PROXY_REQUIRE_ALL") == "1"
MISSING = {part for part, commands in PARTS.items() if not any(shutil.which(name, path=SEARCH) for name in commands)}
MISSING |= set() if (IDENTITY_PROVIDER / "node_modules/oidc-provider").is_dir() else FROM_IDP
MISSING |= set() if (AXE / "node_modules/axe-core").is_dir() else FROM_AXE
MISSING |= set() if (CLIENTS / "node_modules").is_dir() and CLIENTS_PYTHON.exists() else FROM_CLIENTS


def pytest_report_header() -> str:
    found = ", ".join(f"{part} {'missing' if part in MISSING else 'found'}" for part in PARTS)
    return f"system parts: {found}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        ways = {
            "apt install {} (Debian)": MISSING - FROM_CHART - FROM_CLIENTS - FROM_IDP - FROM_AXE,
            "make chart, for {}": MISSING & FROM_CHART,
            "make clients, for {}": MISSING & FROM_CLIENTS,
            "make idp, for {}": MISSING & FROM_IDP,
            "make axe, for {}": MISSING & FROM_AXE,
        }
        remedies = [way.format(" ".join(sorted(parts))) for way, parts in ways.items() if parts]
        terminalreporter.write_line(f"Some tests were skipped, since parts are missing here: {'; '.join(remedies)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = sorted(MISSING.intersection(mark.name for mark in item.iter_markers()))
    if missing and REQUIRE_ALL:
        pytest.fail(f"needs {', '.join(missing)}, and MCP_AUTH_PROXY_REQUIRE_ALL=1 leaves nothing out", pytrace=False)
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed on this machine")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the loop that ``serve`` runs on: what passes on asyncio's own may fail there."""
    return {"uvloop": uvloop.new_event_loop}
