"""docs/security.md lists every threat and fault, and the test files that it names have the number of their row."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/security.md").read_text()
FOUND = [
    (number, re.findall(r"`(\S+\.py)`", files))
    for number, files in re.findall(r"^\| ([TF]\d+) \|.*\|([^|]*)\|$", PAGE, re.MULTILINE)
]
ROWS = list(dict.fromkeys(number for number, _ in FOUND))
THREATS = [*range(1, 55), *range(59, 73), *range(74, 92)]
NUMBERS = [*(f"T{number}" for number in THREATS), *(f"F{number}" for number in range(1, 15))]


def test_each_threat_and_fault_has_a_row_or_is_not_built_yet() -> None:
    not_built = set(re.findall(r"\b[TF]\d+\b", " ".join(re.findall(r"Not built yet:[^|#]*", PAGE))))
    assert [number for number in NUMBERS if number not in not_built] == ROWS


@pytest.mark.parametrize(("number", "files"), FOUND)
def test_the_tests_of_a_row_name_it(number: str, files: list[str]) -> None:
    assert files
    for file in files:
        assert re.search(rf"\b{number}\b", (ROOT / "tests" / file).read_text()), f"no {number} in tests/{file}"
