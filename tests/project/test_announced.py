"""What the documentation announces does not exist yet."""

from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "docs/configuration.md"


def announced() -> str:
    return REFERENCE.read_text().partition("## Announced, not in this version")[2]


@pytest.mark.parametrize("what", ["PostgreSQL"])
def test_the_list_is_complete(what: str) -> None:
    assert what in announced()
