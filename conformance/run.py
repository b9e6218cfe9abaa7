"""``python -m conformance.run``: every client scenario of the official suite, in both versions, through the proxy.

Then ``doctor`` against the server of each scenario about authorization: it must predict whether a client succeeds.
Prints a table of each, and the reasons for unexpected results. The exit code is 1 if a result differs from
``expected-failures.yaml``, 2 if the suite is not installed.
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

from rich.console import Console
from rich.table import Table

from conformance.judging import OUTPUT, Expectations, Judge, Result, Run, judge_doctor, judge_proxy, match

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SUITES = ("conformance-0.1", "conformance-0.2")
"""Names under which package.json installs the versions."""

MODERN = "2026-07-28"
TIMEOUT = 30.0
"""Seconds after which the suite ends the command under test."""

GRACE = 30.0
"""Seconds more until a run that does not end is killed."""

Found = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Protocol revisions by suite and scenario."""

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
    """Return a run for each scenario at its default revision and, if that is an older one, at the newest too."""
    planned = []
    for name, revisions in found.items():
        planned.append(Run(suite, name))
        if MODERN in revisions and len(revisions) > 1:
            planned.append(Run(suite, name, MODERN))
    return planned


def list_scenarios(node: str, suite: str) -> dict[str, tuple[str, ...]]:
    command = [node, str(entry(suite)), "list"]
    return scenarios(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# Running


@dataclass(frozen=True, slots=True)
class Runner:
    """Run scenarios. ``command`` is the module under test with its options; ``judge`` reads the results."""

    node: str
    command: tuple[str, ...]
    results: Path
    judge: Judge

    async def run(self, run: Run) -> Result:
        """Run one scenario. Its checks, and what the client and the proxy printed, stay in its folder."""
        folder = self.results / run.folder
        folder.mkdir(parents=True)
        tested = shlex.join([sys.executable, "-m", *self.command])
        command = [
            *(self.node, str(entry(run.suite)), "client", "--scenario", run.scenario),
            *(
                "--command",
                f"exec {tested}",
                "--timeout",
                f"{TIMEOUT * 1000:.0f}",
            ),
            *("--output-dir", str(folder)),
            *(["--spec-version", run.wire] if run.wire else []),
        ]
        with (folder / OUTPUT).open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(HERE.parent), "NO_COLOR": "1"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = await asyncio.wait_for(process.wait(), TIMEOUT + GRACE)
            except TimeoutError:
                return Result(run, False, f"did not end within {TIMEOUT + GRACE:.0f} s", excusable=False)
            finally:
                end(process)
        return self.judge(run, folder, code)


def end(process: asyncio.subprocess.Process) -> None:
    """Kill the remaining processes of a run: the suite's time-out ends only the shell, not its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


async def run_all(runner: Runner, planned: Sequence[Run], workers: int) -> list[Result]:
    gate = asyncio.Semaphore(workers)

    async def one(run: Run) -> Result:
        async with gate:
            return await runner.run(run)

    return await asyncio.gather(*(one(run) for run in planned))


# Reporting


def entry(suite: str) -> Path:
    return HERE / "node_modules" / suite / "dist" / "index.js"


def version(suite: str) -> str:
    document = json.loads((HERE / "node_modules" / suite / "package.json").read_text())
    return str(document["version"])


def table(title: str, results: Sequence[Result], expectations: Expectations) -> Table:
    """Return a table of scenarios by version; a second column of a version is the run at the newest revision."""
    columns = list(dict.fromkeys((result.run.suite, result.run.wire) for result in results))
    columns.sort(key=lambda column: (column[0], column[1] or ""))
    shown = Table(title=title)
    shown.add_column("scenario")
    for suite, wire in columns:
        shown.add_column(version(suite) + (f"\nat {wire}" if wire else ""))
    cells = {(r.run.scenario, r.run.suite, r.run.wire): expectations.outcome(r) for r in results}
    for scenario in dict.fromkeys(result.run.scenario for result in results):
        shown.add_row(scenario, *(cells.get((scenario, suite, wire), "–") for suite, wire in columns))
    return shown


def report(part: "Part", results: Sequence[Result], stale: Sequence[str], seconds: float) -> bool:
    """Print table, reasons and totals. Return whether everything was as expected."""
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    expectations = part.expectations
    console.print(table(part.title, results, expectations))
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
        console.print(f"\nexpected-failures.yaml: {name} matches no scenario")
    passed, unexpected = outcomes.count("pass"), outcomes.count("FAIL") + outcomes.count("UNEXPECTED PASS")
    console.print(
        f"\n{len(results)} runs in {seconds:.0f} s: {passed} passed, "
        f"{outcomes.count('expected failure')} failed as expected, {unexpected} unexpected"
    )
    return not unexpected and not stale


# What is run


@dataclass(frozen=True, slots=True)
class Part:
    title: str
    runner: Runner
    expectations: Expectations
    about: str
    """Pattern of its scenarios."""

    def known(self, found: Found) -> Iterable[tuple[str, dict[str, tuple[str, ...]]]]:
        """Its scenarios, by suite."""
        for suite, names in found.items():
            yield suite, {name: revisions for name, revisions in names.items() if fnmatchcase(name, self.about)}

    def planned(self, found: Found, only: str) -> list[Run]:
        return [
            run
            for suite, names in self.known(found)
            for run in runs(suite, names)
            if fnmatchcase(run.scenario, only) and not match(run.scenario, self.expectations.left_out)
        ]

    def run(self, found: Found, only: str, workers: int) -> bool:
        """Run its scenarios and report. Return whether everything was as expected."""
        begun = time.monotonic()
        results = asyncio.run(run_all(self.runner, self.planned(found, only), workers))
        stale = self.expectations.stale(name for _, names in self.known(found) for name in names)
        return report(self, results, stale, time.monotonic() - begun)


def parts(node: str, arguments: argparse.Namespace) -> list[Part]:
    expected = HERE / "expected-failures.yaml"
    options = [f"--{way}" for way in ("direct", "unheld") if getattr(arguments, way)]
    proxy = Part(
        "MCP conformance, client scenarios, through the proxy",
        Runner(node, ("conformance.client", *options), RESULTS / "proxy", judge_proxy),
        Expectations.read(expected, "proxy"),
        "*",
    )
    doctor = Part(
        "What doctor predicts, against what the suite requires",
        Runner(node, ("conformance.doctor",), RESULTS / "doctor", judge_doctor),
        Expectations.read(expected, "doctor"),
        "auth/*",
    )
    if arguments.doctor:
        return [doctor]
    return [proxy] if options else [proxy, doctor]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.run", description=__doc__)
    parser.add_argument("--only", default="*", metavar="NAME", help="scenarios to run; * matches anything")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--direct", action="store_true", help="without the proxy: what the plain client does alone")
    way.add_argument("--unheld", action="store_true", help="requests are answered with the link at once (wait: 0s)")
    way.add_argument("--doctor", action="store_true", help="only what doctor says of the scenarios about authorization")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--node", default="node", help="Node.js 22 or newer")
    arguments = parser.parse_args()
    node = shutil.which(arguments.node)
    if node is None or not all(entry(suite).exists() for suite in SUITES):
        sys.stderr.write("The suite is not installed: run make conformance.\n")
        return 2
    node = str(Path(node).resolve())
    found = {suite: list_scenarios(node, suite) for suite in SUITES}
    shutil.rmtree(RESULTS, ignore_errors=True)
    first, *others = parts(node, arguments)
    chosen = [first, *(part for part in others if part.planned(found, arguments.only))]
    good = [part.run(found, arguments.only, arguments.workers) for part in chosen]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
