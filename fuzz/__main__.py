"""``python -m fuzz``: the parsers of what comes from outside, under a coverage-guided fuzzer.

Without options each target runs 10,000 times, as in CI, and always with the same seed. What is new to it is kept in
``fuzz/found``, where the next run continues; an input that breaks a promise is written to ``fuzz/findings``, and the
exit code is 1.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fuzz.targets import CORPUS, HERE, TARGETS

FOUND = HERE / "found"
FINDINGS = HERE / "findings"
DICTIONARIES = HERE / "dictionaries"
RESULTS = HERE / "RESULTS.md"

RUNS = 10_000
MAX_INPUT = 64 * 1024
"""Bytes."""

MAX_TIME = 10
"""Seconds for one input. The machine may be busy: inputs that take quadratic time take longer."""

MAX_MEMORY = 1024
"""MiB."""

_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")
_CHATTER = ("INFO", "WARNING", "Dictionary", "#", "0x", "stat::")
"""How the lines of libFuzzer and atheris begin that do not say why a run failed."""

_EXECUTIONS = re.compile(r"stat::number_of_executed_units: (\d+)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one target. ``finding`` is the input that broke a promise, None if none did."""

    target: str
    seconds: float
    executions: int
    edges: int
    features: int
    inputs: int
    failed: bool
    finding: Path | None
    log: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    names = options.target or list(TARGETS)
    if options.input is not None:
        if len(names) != 1:
            parser().error("--input needs one --target")
        TARGETS[names[0]](options.input.read_bytes())
        print(f"{names[0]} keeps its promises with {options.input}")
        return 0
    if options.minimize:
        return max(map(minimize, names))
    # The same inputs in each run of CI: a change is not held up by what only another one could have caused.
    bound = (
        [f"-max_total_time={options.seconds // len(names)}"]
        if options.seconds
        else [f"-runs={options.runs}", "-seed=1"]
    )
    with ThreadPoolExecutor(options.jobs) as threads:
        outcomes = list(threads.map(partial(fuzz, bound=bound), names))
    if options.record:
        record(outcomes)
    return any(outcome.failed for outcome in outcomes)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    options.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    options.add_argument("--runs", type=int, default=RUNS, help=f"of each target ({RUNS})")
    options.add_argument("--seconds", type=int, default=0, help="for all targets together, instead of --runs")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets at a time (one for each core)")
    options.add_argument("--input", type=Path, metavar="PATH", help="only this input, without the fuzzer")
    options.add_argument("--minimize", action="store_true", help="move to fuzz/corpus what adds coverage to it")
    options.add_argument("--record", action="store_true", help="write the table to fuzz/RESULTS.md")
    return options


def fuzz(target: str, *, bound: Sequence[str]) -> Outcome:
    """Run one target and print what came of it."""
    for folder in (FOUND / target, FINDINGS):
        folder.mkdir(parents=True, exist_ok=True)
    dictionary = DICTIONARIES / f"{target}.dict"
    begun, before = time.monotonic(), set(FINDINGS.iterdir())
    done = engine(
        target,
        *bound,
        *([f"-dict={dictionary}"] if dictionary.exists() else []),
        f"-timeout={MAX_TIME}",
        f"-rss_limit_mb={MAX_MEMORY}",
        f"-artifact_prefix={FINDINGS}/{target}-",
        "-print_final_stats=1",
        str(FOUND / target),
        str(CORPUS / target),
    )
    new = [path for path in FINDINGS.iterdir() if path not in before and path.name.startswith(f"{target}-")]
    log = done.stdout.decode(errors="replace")
    edges, features, inputs = map(int, (_PROGRESS.findall(log) or [(0, 0, 0)])[-1])
    outcome = Outcome(
        target=target,
        seconds=time.monotonic() - begun,
        executions=int((_EXECUTIONS.findall(log) or [0])[-1]),
        edges=edges,
        features=features,
        inputs=inputs,
        failed=done.returncode != 0,
        finding=new[0] if new else None,
        log=log,
    )
    print(report(outcome), flush=True)
    return outcome


def engine(target: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    """Run libFuzzer on a target."""
    command = [sys.executable, "-m", "fuzz.engine", target, f"-max_len={MAX_INPUT}", *options]
    return subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def report(outcome: Outcome) -> str:
    """Return a line about a target, and if it failed, why and how to repeat it."""
    line = (
        f"{outcome.target:<10} {outcome.executions:>9,} runs in {outcome.seconds:5.0f} s, "
        f"{outcome.edges} edges, {outcome.features} features, {outcome.inputs} inputs"
    )
    if not outcome.failed:
        return line
    why = "\n".join(text for text in outcome.log.splitlines() if not text.startswith(_CHATTER))
    again = f'\nAgain: make fuzz ARGS="--target {outcome.target} --input {outcome.finding}"' if outcome.finding else ""
    return f"{line}\n{why}\n{outcome.target} FAILED{again}"


def record(outcomes: Sequence[Outcome]) -> None:
    """Append the table of a run to RESULTS.md."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, check=True).stdout
    seconds = sum(outcome.seconds for outcome in outcomes)
    rows = [
        f"| {o.target} | {o.seconds:.0f} | {o.executions:,} | {o.edges} | {o.features} | {o.inputs} "
        f"| {o.finding.name if o.finding else 'failed' if o.failed else 'none'} |"
        for o in outcomes
    ]
    text = "\n".join(
        [
            f"\n## {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, commit {commit.decode().strip()}\n",
            f"{seconds:,.0f} s in all, Python {sys.version.split()[0]}, atheris {version('atheris')}, "
            f"h11 {version('h11')}, httptools {version('httptools')}, PyYAML {version('PyYAML')}.\n",
            "| target | seconds | executions | edges | features | inputs | finding |",
            "| --- | --: | --: | --: | --: | --: | --- |",
            *rows,
            "",
        ]
    )
    with RESULTS.open("a") as file:
        file.write(text)


def minimize(target: str) -> int:
    """Add to the corpus the inputs in ``fuzz/found`` that reach what it does not."""
    return engine(target, "-merge=1", str(CORPUS / target), str(FOUND / target)).returncode


if __name__ == "__main__":
    sys.exit(main())
