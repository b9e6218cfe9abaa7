"""``python -m conformance.run``: every client scenario of the official suite, in both versions, through the proxy.

Prints a table, and for what was not expected why. Exit code 1 where a result is not the one that
``expected-failures.yaml`` names, 2 where the suite is not installed.
"""

import argparse
import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SUITES = ("conformance-0.1", "conformance-0.2")
"""Names under which package.json installs the versions."""

MODERN = "2026-07-28"
TIMEOUT = 30.0
"""Seconds that the suite gives to the command under test."""

GRACE = 30.0
"""Seconds more until a run that does not end is killed."""

Outcome = Literal["pass", "FAIL", "expected failure", "UNEXPECTED PASS"]


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario of one version. ``wire``: the protocol revision to ask for; None: the scenario's own."""

    suite: str
    scenario: str
    wire: str | None = None

    @property
    def folder(self) -> Path:
        return RESULTS / self.suite / (self.wire or "default") / self.scenario.replace("/", "-")


@dataclass(frozen=True, slots=True)
class Result:
    run: Run
    passed: bool
    why: str
    """What failed, in lines; empty where nothing did."""


@dataclass(frozen=True, slots=True)
class Expectations:
    """Reasons by scenario name, in which a * stands for anything."""

    failing: Mapping[str, str]
    left_out: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Expectations":
        document = yaml.safe_load(path.read_text())
        return cls(failing=document["failing"] or {}, left_out=document["left_out"] or {})

    def outcome(self, result: Result) -> Outcome:
        if match(result.run.scenario, self.failing):
            return "UNEXPECTED PASS" if result.passed else "expected failure"
        return "pass" if result.passed else "FAIL"

    def stale(self, scenarios: Iterable[str]) -> list[str]:
        """Entries that fit none of the scenarios."""
        known = list(scenarios)
        return [name for name in (*self.failing, *self.left_out) if not any(fnmatchcase(it, name) for it in known)]


def match(scenario: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(scenario, name) for name in names)


# What there is to run


def scenarios(listing: str) -> dict[str, tuple[str, ...]]:
    """Return name → protocol revisions from what the suite's ``list`` prints, client scenarios only."""
    found: dict[str, tuple[str, ...]] = {}
    reading = False
    for line in listing.splitlines():
        if line.endswith(":"):
            reading = line.startswith("Client scenarios")
        elif reading and line.startswith("  - "):
            name, _, revisions = line.removeprefix("  - ").partition(" [")
            found[name] = tuple(revisions.removesuffix("]").split(","))
    return found


def runs(suite: str, found: Mapping[str, tuple[str, ...]]) -> list[Run]:
    """Each scenario as the suite runs it by default, and where it has an older one, at the newest revision too."""
    planned = []
    for name, revisions in found.items():
        planned.append(Run(suite, name))
        if MODERN in revisions and len(revisions) > 1:
            planned.append(Run(suite, name, MODERN))
    return planned


# Running


@dataclass(frozen=True, slots=True)
class Runner:
    node: str
    options: tuple[str, ...]
    """Of the command under test."""

    def list_scenarios(self, suite: str) -> dict[str, tuple[str, ...]]:
        command = [self.node, str(entry(suite)), "list"]
        return scenarios(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    async def run(self, run: Run) -> Result:
        """Run one scenario. Its checks, and what the client and the proxy printed, stay in its folder."""
        run.folder.mkdir(parents=True)
        client = [sys.executable, "-m", "conformance.client", *self.options]
        command = [
            *(self.node, str(entry(run.suite)), "client", "--scenario", run.scenario),
            *("--command", f"exec {shlex.join(client)}", "--timeout", f"{TIMEOUT * 1000:.0f}"),
            *("--output-dir", str(run.folder)),
            *(["--spec-version", run.wire] if run.wire else []),
        ]
        output = run.folder / "output.txt"
        with output.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=run.folder,
                env={**os.environ, "PYTHONPATH": str(HERE.parent), "NO_COLOR": "1"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = await asyncio.wait_for(process.wait(), TIMEOUT + GRACE)
            except TimeoutError:
                return Result(run, False, f"did not end within {TIMEOUT + GRACE:.0f} s")
            finally:
                end(process)
        return judge(run, code)


def end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of a run: the suite's time-out ends a shell, not what the shell has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def judge(run: Run, code: int) -> Result:
    """The suite's own verdict, but a scenario that has checked nothing has not passed."""
    found = [
        check for path in run.folder.rglob("checks.json") for check in json.loads(path.read_text(encoding="utf-8"))
    ]
    bad = [check for check in found if check["status"] in ("FAILURE", "WARNING")]
    why = [f"{check['status']} {check['id']}: {check.get('errorMessage') or check['description']}" for check in bad]
    if code == 0 and not bad and not any(check["status"] == "SUCCESS" for check in found):
        why.append("nothing was checked")
    if code != 0 and not bad:
        why.append(f"the client failed; see {run.folder.relative_to(HERE.parent)}")
    return Result(run, not why, "\n".join(why))


async def run_all(runner: Runner, planned: Sequence[Run], workers: int) -> list[Result]:
    gate = asyncio.Semaphore(workers)

    async def one(run: Run) -> Result:
        async with gate:
            return await runner.run(run)

    return await asyncio.gather(*(one(run) for run in planned))


# Telling


def entry(suite: str) -> Path:
    return HERE / "node_modules" / suite / "dist" / "index.js"


def version(suite: str) -> str:
    document = json.loads((HERE / "node_modules" / suite / "package.json").read_text())
    return str(document["version"])


def table(results: Sequence[Result], expectations: Expectations) -> Table:
    """Scenario by version; the later of two columns of one version is the run at the newest revision."""
    columns = list(dict.fromkeys((result.run.suite, result.run.wire) for result in results))
    columns.sort(key=lambda column: (column[0], column[1] or ""))
    shown = Table(title="MCP conformance, client scenarios, through the proxy")
    shown.add_column("scenario")
    for suite, wire in columns:
        shown.add_column(version(suite) + (f"\nat {wire}" if wire else ""))
    cells = {(r.run.scenario, r.run.suite, r.run.wire): expectations.outcome(r) for r in results}
    for scenario in dict.fromkeys(result.run.scenario for result in results):
        shown.add_row(scenario, *(cells.get((scenario, suite, wire), "–") for suite, wire in columns))
    return shown


def report(results: Sequence[Result], expectations: Expectations, stale: Sequence[str], seconds: float) -> bool:
    """Print table, reasons and sum. Returns whether everything was as expected."""
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    console.print(table(results, expectations))
    outcomes = [expectations.outcome(result) for result in results]
    for title, reasons in (("Failing as expected", expectations.failing), ("Left out", expectations.left_out)):
        if reasons:
            console.print(f"\n{title}:", *(f"{name}: {reason}" for name, reason in reasons.items()), sep="\n  ")
    for result, outcome in zip(results, outcomes, strict=True):
        if outcome in ("FAIL", "UNEXPECTED PASS"):
            wire = f" at {result.run.wire}" if result.run.wire else ""
            why = result.why or "take it out of expected-failures.yaml"
            console.print(f"\n{outcome}: {result.run.scenario} ({version(result.run.suite)}{wire})\n{why}")
    for name in stale:
        console.print(f"\nexpected-failures.yaml: {name} fits no scenario")
    passed, unexpected = outcomes.count("pass"), outcomes.count("FAIL") + outcomes.count("UNEXPECTED PASS")
    console.print(
        f"\n{len(results)} runs in {seconds:.0f} s: {passed} passed, "
        f"{outcomes.count('expected failure')} failed as expected, {unexpected} unexpected"
    )
    return not unexpected and not stale


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.run", description=__doc__)
    parser.add_argument("--only", default="*", metavar="NAME", help="scenarios to run; * stands for anything")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--direct", action="store_true", help="without the proxy: what the plain client does alone")
    way.add_argument("--unheld", action="store_true", help="requests are answered with the link at once (wait: 0s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--node", default="node", help="Node.js 22 or newer")
    arguments = parser.parse_args()
    node = shutil.which(arguments.node)
    if node is None or not all(entry(suite).exists() for suite in SUITES):
        sys.stderr.write("The suite is not installed: run make conformance.\n")
        return 2
    expectations = Expectations.read(HERE / "expected-failures.yaml")
    options = tuple(f"--{way}" for way in ("direct", "unheld") if getattr(arguments, way))
    runner = Runner(str(Path(node).resolve()), options)
    found = {suite: runner.list_scenarios(suite) for suite in SUITES}
    planned = [
        run
        for suite in SUITES
        for run in runs(suite, found[suite])
        if fnmatchcase(run.scenario, arguments.only) and not match(run.scenario, expectations.left_out)
    ]
    shutil.rmtree(RESULTS, ignore_errors=True)
    begun = time.monotonic()
    results = asyncio.run(run_all(runner, planned, arguments.workers))
    stale = expectations.stale(name for names in found.values() for name in names)
    return 0 if report(results, expectations, stale, time.monotonic() - begun) else 1


if __name__ == "__main__":
    sys.exit(main())
