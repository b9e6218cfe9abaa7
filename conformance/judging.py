"""What a run has come to, and whether that was expected."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml

from conformance.doctor import Said

OUTPUT = "output.txt"
"""Where all goes that the suite and the command under test print."""

DEMANDS_SUCCESS = "CLIENT EXITED WITH ERROR"
"""What the suite prints of a command that has failed, except where a correct client must refuse."""

Outcome = Literal["pass", "FAIL", "expected failure", "UNEXPECTED PASS"]


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario of one version. ``wire``: the protocol revision to ask for; None: the scenario's own."""

    suite: str
    scenario: str
    wire: str | None = None

    @property
    def folder(self) -> Path:
        """Where its results are, in those of the part."""
        return Path(self.suite) / (self.wire or "default") / self.scenario.replace("/", "-")


@dataclass(frozen=True, slots=True)
class Result:
    """``why``: what failed, in lines; empty where nothing did."""

    run: Run
    passed: bool
    why: str
    excusable: bool = True
    """Whether it may be named among the expected failures."""


@dataclass(frozen=True, slots=True)
class Expectations:
    """Reasons by scenario name, in which a * stands for anything."""

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
        """Entries that fit none of the scenarios."""
        known = list(scenarios)
        return [name for name in (*self.failing, *self.left_out) if not any(fnmatchcase(it, name) for it in known)]


def match(scenario: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(scenario, name) for name in names)


Judge = Callable[[Run, Path, int], Result]
"""Of a run, its folder and the suite's exit code."""


def judge_proxy(run: Run, folder: Path, code: int) -> Result:
    """The suite's own verdict, but a scenario that has checked nothing has not passed."""
    found = [check for path in folder.rglob("checks.json") for check in json.loads(path.read_text(encoding="utf-8"))]
    bad = [check for check in found if check["status"] in ("FAILURE", "WARNING")]
    why = [f"{check['status']} {check['id']}: {check.get('errorMessage') or check['description']}" for check in bad]
    if code == 0 and not bad and not any(check["status"] == "SUCCESS" for check in found):
        why.append("nothing was checked")
    if code != 0 and not bad:
        why.append(f"the client failed; see {folder}")
    return Result(run, not why, "\n".join(why))


def judge_doctor(run: Run, folder: Path, code: int) -> Result:
    """Whether doctor foretold what the suite demands of a client. The checks do not count: no client has run.

    What may be expected is only that it does not see a fault.
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
