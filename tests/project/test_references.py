"""Everything that the repository refers to is in the repository."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".ci", "bench", "conformance", "deploy", "docs", "fuzz", "requirements", "src", "tests")
GENERATED = {"node_modules", "results", "__pycache__", "package-lock.json", "corpus", "found", "findings"}

MENTION = re.compile(r"(?<![\w/.:-])[\w./-]+\.md\b")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
PRIVATE = re.compile(r"\b(?:design|house|charter|brief|style guide)(?:\.md)?,? §|\.\./shared\b", re.IGNORECASE)
"""A document that only its authors have."""

RANGE = re.compile(r"\b([TF])(\d+)(?:–[TF](\d+))?")
MARK = re.compile(r"#.*?\b[TF]\d+\b.*")


def files() -> list[Path]:
    """Return the text files of the repository but this one, which has examples of what is wrong."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    found += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(
        path
        for path in found
        if not GENERATED.intersection(path.relative_to(ROOT).parts) and path != Path(__file__).resolve()
    )


def text_of(path: Path) -> str:
    return path.read_text(errors="replace")


def exists(reference: str, origin: Path) -> bool:
    """Return whether a path, as it is written in ``origin``, leads to something inside the repository."""
    places = [ROOT / reference.removeprefix("/"), origin.parent / reference.removeprefix("/")]
    if "/" not in reference:
        places += ROOT.glob(f"*/{reference}")
    return any(place.exists() and place.resolve().is_relative_to(ROOT) for place in places)


def broken(pattern: re.Pattern[str], suffix: str = "") -> list[str]:
    """Return the references, as ``file: reference``, that lead nowhere."""
    return [
        f"{path.relative_to(ROOT)}: {reference}"
        for path in files()
        if path.name.endswith(suffix)
        for reference in pattern.findall(text_of(path))
        if not exists(reference, path)
    ]


def numbers(text: str) -> set[str]:
    """Return every number of a threat or fault in a text: ``T1–T3`` stands for three."""
    return {
        f"{kind}{number}"
        for kind, first, last in RANGE.findall(text)
        for number in range(int(first), int(last or first) + 1)
    }


def test_no_file_refers_to_a_document_outside_the_repository() -> None:
    assert [str(path.relative_to(ROOT)) for path in files() if PRIVATE.search(text_of(path))] == []


def test_every_document_that_is_mentioned_exists() -> None:
    assert broken(MENTION) == []


def test_every_link_of_a_document_leads_to_a_file_of_the_repository() -> None:
    assert broken(LINK, suffix=".md") == []


def test_every_row_of_threats_and_faults_has_a_test_and_no_test_names_an_unknown_one() -> None:
    document = text_of(ROOT / "docs/security.md")
    rows = [line.split("|")[1] for line in document.splitlines() if line.startswith("|")]
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__).resolve()]
    tested = numbers("\n".join(mark for path in tests for mark in MARK.findall(text_of(path))))
    assert numbers("\n".join(rows)) - tested == set()
    assert tested - numbers(document) == set()
