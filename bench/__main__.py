"""``python -m bench``: one run, its tables and targets. ``--smoke`` proves briefly that all of it runs."""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import backend, measures, report
from bench.contenders import available
from bench.processes import raise_file_limit
from bench.results import BEFORE
from bench.run import CONNECTIONS, Plan, Run
from bench.workloads import WORKLOADS

FULL = Plan(WORKLOADS)
SMOKE = Plan(
    WORKLOADS,
    rounds=1,
    seconds=1.0,
    streams=(20, 40),
    blob=5 * 2**20,
    starts=1,
    servers=50,
    principals=20,
    grants=120,
    storm=60,
    refresh_rate=100.0,
)


def main() -> int:
    arguments = parser().parse_args()
    against = arguments.against and arguments.against.resolve()
    contenders = {name: start for name, start in available(against).items() if chosen(name, arguments.only)}
    plan = plan_for(arguments)
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, backend.running(Path(folder), plan.blob) as behind:
        run = Run(plan, Path(folder), behind, contenders)
        if arguments.stores:
            run.stores()
            print(report.render_stores(run.results))
            return 0
        results = run.measure()
    text = report.render(results, CONNECTIONS, list(plan.streams))
    print(text)
    if arguments.write:
        report.write(backend.ROOT / "bench" / "RESULTS.md", text)
    return 0


def parser() -> argparse.ArgumentParser:
    keys = ", ".join(workload.key for workload in WORKLOADS)
    options = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    options.add_argument("--smoke", action="store_true", help="everything, very briefly; the numbers mean nothing")
    options.add_argument("--write", action="store_true", help="keep the results in bench/RESULTS.md")
    options.add_argument("--against", type=Path, metavar="PATH", help="measure the proxy of another checkout in turns")
    options.add_argument("--only", default="", metavar="A,B", help=f"contenders: {', '.join([*available(), BEFORE])}")
    options.add_argument("--workloads", default="", metavar="A,B", help=f"of {keys}")
    options.add_argument("--rates", action="store_true", help="leave out memory, large bodies and start-up")
    options.add_argument("--stores", action="store_true", help="only many grants in the store, on each engine")
    options.add_argument("--rounds", type=int, default=0, metavar="N", help=f"instead of {FULL.rounds}")
    return options


def plan_for(arguments: argparse.Namespace) -> Plan:
    plan = SMOKE if arguments.smoke else FULL
    return replace(
        plan,
        workloads=tuple(workload for workload in WORKLOADS if chosen(workload.key, arguments.workloads)),
        rounds=arguments.rounds or plan.rounds,
        rates_only=arguments.rates,
    )


def chosen(name: str, names: str) -> bool:
    """Return whether ``name`` is in a comma-separated list; an empty list has all."""
    return not names or name in names.split(",")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, measures.UnexpectedResponse, subprocess.SubprocessError) as error:
        sys.exit(f"bench: {error}")
