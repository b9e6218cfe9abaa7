"""Judge the result of a run, and whether it was expected."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml

from conformance.doctor import Said

OUTPUT = "output.txt"
"""The file with all output of the suite and of the command under test."""

DEMANDS_SUCCESS = "CLIENT EXITED WITH ERROR"
"""What the suite prints if a command failed, unless a correct client must refuse."""

Outcome = Literal["pass", "FAIL", "expected failure", "UNEXPECTED PASS"]


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario of one version. ``wire``: the protocol revision to ask for; None: the scenario's own."""

    suite: str
    scenario: str
    wire: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of its results, below that of the part."""
        return Path(self.suite) / (self.wire or "default") / self.scenario.replace("/", "-")


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run. ``why``: what failed, in lines; empty if nothing did."""

    run: Run
    passed: bool
    why: str
    excusable: bool = True
    """Whether it may be named among the expected failures."""


@dataclass(frozen=True, slots=True)
class Expectations:
    """The expected failures: reasons by scenario name, in which a * matches anything."""

    failing: Mapping[str, str]
    left_out: Mapping[str, str]

    @classmethod
    def read(cls, path: Path, part: str) -> "Expectations":
        document = yaml.safe_load(path.read_text())[part]
        return cls(failing=document["failing"] or {}, left_out=document["left_out"] or {})

    def outcome(self, result: Result) -> Outcome:
        if result.excusable and match(result.run.scenario, self.failing):
            return "UNEXPECTED PASS" if result.passed else "expected failure"
        return "pass" if result.passed else "FAIL"

    def stale(self, scenarios: Iterable[str]) -> list[str]:
        """Return the entries that match none of the scenarios."""
        known = list(scenarios)
        return [name for name in (*self.failing, *self.left_out) if not any(fnmatchcase(it, name) for it in known)]


def match(scenario: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(scenario, name) for name in names)


Judge = Callable[[Run, Path, int], Result]
"""Called with a run, its folder and the suite's exit code."""


def judge_proxy(run: Run, folder: Path, code: int) -> Result:
    """Return the suite's own verdict; a scenario without a single check has not passed."""
    found = [check for path in folder.rglob("checks.json") for check in json.loads(path.read_text(encoding="utf-8"))]
    bad = [check for check in found if check["status"] in ("FAILURE", "WARNING")]
    why = [f"{check['status']} {check['id']}: {check.get('errorMessage') or check['description']}" for check in bad]
    if code == 0 and not bad and not any(check["status"] == "SUCCESS" for check in found):
        why.append("nothing was checked")
    if code != 0 and not bad:
        why.append(f"the client failed; see {folder}")
    return Result(run, not why, "\n".join(why))


def judge_doctor(run: Run, folder: Path, code: int) -> Result:
    """Judge whether doctor predicted what the suite requires of a client. The checks do not count: no client has run.

    The only failure that may be expected is that doctor does not notice a fault.
    """
    demanded = DEMANDS_SUCCESS in (folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    match said := Said.read(folder):
        case Said(code=0, verdict="ready"):
            why = "" if demanded else f"a client must refuse, but doctor says: {said.summary}"
            return Result(run, demanded, why)
        case Said(code=1, verdict="refused"):
            why = f"a client must succeed, but doctor says: {said.summary}" if demanded else ""
            return Result(run, not demanded, why, excusable=not demanded)
        case _:
            return Result(run, False, f"doctor came to no verdict: {said}; see {folder}", excusable=False)
