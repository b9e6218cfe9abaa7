"""The share of the code that the tests run is measured on all of it."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COVERAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]


def test_branches_are_measured_in_every_process() -> None:
    run = COVERAGE["run"]
    assert run["source_pkgs"] == ["mcp_auth_proxy"]
    assert (run["branch"], run["parallel"]) == (True, True)
    assert "subprocess" in run["patch"]


def test_no_line_is_excluded_to_reach_the_gate() -> None:
    report = COVERAGE["report"]
    assert report["fail_under"] > 0
    assert report["exclude_lines"] == []
    assert not {"omit", "include", "exclude_also", "partial_also"} & {*COVERAGE["run"], *report}
