"""docs/security.md and the tests agree: each threat and fault has the tests that the page names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ([TF]\d+) \|(.*)\|([^|]*)\|$", re.MULTILINE)


def rows() -> dict[str, tuple[str, list[str]]]:
    found = ROW.findall((ROOT / "docs/security.md").read_text())
    return {number: (text, re.findall(r"`(\S+\.py)`", files)) for number, text, files in found}


def test_the_page_lists_every_threat_and_fault() -> None:
    assert list(rows()) == [*(f"T{n}" for n in range(1, 51)), *(f"F{n}" for n in range(1, 15))]


@pytest.mark.parametrize("number", list(rows()))
def test_each_row_has_its_tests(number: str) -> None:
    text, files = rows()[number]
    assert files or "not built yet" in text
    for file in files:
        assert re.search(rf"\b{number}\b", (ROOT / "tests" / file).read_text()), f"no {number} in tests/{file}"
