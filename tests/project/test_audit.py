"""The audit fails if it could not look, not only if it finds something."""

from typing import Any

import pytest

from deploy.audit import verdict

CLEAN: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "not found on PyPI"}
VULNERABLE = {"name": "c", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3", "4"], "aliases": []}]}


@pytest.mark.parametrize(
    ("packages", "code", "text"),
    [
        ([CLEAN], 0, "1 packages, no known vulnerabilities"),
        ([CLEAN, VULNERABLE, SKIPPED], 1, "c 2: PYSEC-1, fixed in 3, 4"),
        ([CLEAN, SKIPPED], 2, "Some packages could not be looked up:\nb: not found on PyPI"),
        ([SKIPPED], 2, "can't be reached from here"),
        ([], 2, "Nothing was audited"),
    ],
)
def test_only_packages_that_were_looked_up_pass(packages: list[dict[str, Any]], code: int, text: str) -> None:
    found, said = verdict(packages)
    assert found == code
    assert text in said
