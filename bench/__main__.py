"""``python -m bench``: one run, one table. ``--smoke`` proves in seconds that all of it runs."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import measures, nginx, report
from bench.contenders import ROOT, Backend, Contender, available, direct, ours
from bench.processes import Child, free_port, raise_file_limit

CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how much; seconds and bytes."""

    rounds: int = 5
    seconds: float = 3.0
    streams: tuple[int, ...] = (1000, 2000)
    blob: int = 200 * 2**20
    starts: int = 3
    servers: int = 10_000


SMOKE = Plan(rounds=1, seconds=1.0, streams=(20, 40), blob=5 * 2**20, starts=1, servers=50)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="everything, very briefly; the numbers mean nothing")
    parser.add_argument("--write", action="store_true", help="keep the results in bench/RESULTS.md")
    parser.add_argument("--only", default="", metavar="A,B", help=f"of {', '.join(available())}")
    arguments = parser.parse_args()
    chosen = [name for name in available() if not arguments.only or name in arguments.only.split(",")]
    plan = SMOKE if arguments.smoke else Plan()
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = run(Path(folder), plan, chosen)
    text = report.render(results, CONNECTIONS, list(plan.streams))
    print(text)
    if arguments.write:
        report.write(ROOT / "bench" / "RESULTS.md", text)
    return 0


def run(folder: Path, plan: Plan, chosen: list[str]) -> report.Results:
    """All measures, one after the other; nothing else of ours runs beside them."""
    results = report.Results(absent=[f"Not here: {name}." for name in missing()])
    with backend(folder, plan.blob) as behind:
        throughput(results, folder, behind, plan, chosen)
        for name in chosen:
            if name in ("nginx", "ours"):
                say(f"streams and a large body: {name}")
                with started(available()[name](folder, behind)) as contender:
                    streams_and_body(results, name, contender, plan)
        with started(direct(folder, behind)) as contender:
            results.downloads["direct"] = measures.download_rate(contender, "/blob", plan.blob)
        for name in chosen:
            if name != "direct" and name != "nginx":
                say(f"start-up: {name}")
                seconds, memory = measures.start_up(available()[name], folder, behind, times=plan.starts)
                results.ready[name], results.idle[name] = seconds, memory
        if "ours" in chosen:
            say(f"{plan.servers:,} configured servers")
            with (
                started(ours(folder, behind)) as one,
                started(partial(ours, servers=plan.servers)(folder, behind)) as many,
            ):
                few_p50, many_p50 = measures.many_servers(one, many, rounds=plan.rounds, seconds=plan.seconds / 2)
            results.servers = {1: few_p50, plan.servers: many_p50}
    return results


def throughput(results: report.Results, folder: Path, behind: Backend, plan: Plan, chosen: list[str]) -> None:
    """All contenders stand; each is asked in turn, round after round, so that the machine's moods hit all alike."""
    contenders = {name: available()[name](folder, behind) for name in chosen}
    try:
        seen: dict[tuple[str, int], list[measures.Speed]] = {}
        for name, contender in contenders.items():
            measures.verify(contender)
            results.names[name] = contender.name
        for number in range(plan.rounds):
            for name, contender in contenders.items():
                say(f"round {number + 1} of {plan.rounds}: {contender.name}")
                for connections in (1, CONNECTIONS):
                    one = measures.speed(contender, connections=connections, seconds=plan.seconds)
                    seen.setdefault((name, connections), []).append(one)
        results.speeds = {key: measures.middle(rounds) for key, rounds in seen.items()}
    finally:
        for contender in contenders.values():
            contender.stop()


def streams_and_body(results: report.Results, name: str, contender: Contender, plan: Plan) -> None:
    measures.fetch_grants(contender)
    rates = [measures.download_rate(contender, "/blob/mcp", plan.blob) for _ in range(plan.rounds)]
    results.downloads[name] = max(rates)
    held = measures.stream_memory(contender, "/stream/mcp", list(plan.streams))
    results.streams.update({(name, count): value for count, value in zip(plan.streams, held, strict=True)})


@contextmanager
def backend(folder: Path, blob_bytes: int) -> Iterator[Backend]:
    """The origin, and before it nginx as the constant upstream where it is installed."""
    origin_port = free_port()
    command = [sys.executable, str(ROOT / "bench" / "origin.py"), str(origin_port), str(blob_bytes)]
    children = [Child(command, log=folder / "origin.log")]
    try:
        children[0].wait_for(origin_port)
        port = origin_port
        if nginx.BINARY:
            blob = folder / "blob"
            with blob.open("wb") as file:
                file.truncate(blob_bytes)
            port = free_port()
            children.append(nginx.start_upstream(folder, port, issuer=f"http://127.0.0.1:{origin_port}", blob=blob))
        yield Backend(upstream=port, origin=origin_port)
    finally:
        for child in reversed(children):
            child.stop()


@contextmanager
def started(contender: Contender) -> Iterator[Contender]:
    try:
        yield contender
    finally:
        contender.stop()


def missing() -> list[str]:
    return sorted({"nginx", "fastmcp"} - set(available()))


def say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, measures.Wrong, subprocess.SubprocessError) as error:
        sys.exit(f"bench: {error}")
