"""The numbers of one run, as the table that is printed and kept."""

import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from bench.load import GENERATOR
from bench.measures import Speed

DASH = "–"


@dataclass(slots=True)
class Results:
    """What a run has found so far; absent where it could not be measured."""

    speeds: dict[tuple[str, int], Speed] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    streams: dict[tuple[str, int], float] = field(default_factory=dict)
    downloads: dict[str, float] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    servers: dict[int, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that must hold: what was found, and the bound it is held against."""

    what: str
    found: float | None
    bound: float
    at_least: bool
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def row(self) -> list[str]:
        verdict = {True: "pass", False: "MISS", None: "not measured"}[self.met]
        sign = "≥" if self.at_least else "≤"
        found = (
            DASH
            if self.found is None
            else f"{self.found:,.3g}{self.unit}"
            if self.found < 100
            else f"{self.found:,.0f}{self.unit}"
        )
        return [self.what, found, f"{sign} {self.bound:g}{self.unit}", verdict]


def targets(results: Results, connections: int, streams: int) -> list[Target]:
    """The ratios of one run, with what they have to be."""
    ours = results.speeds.get(("ours", connections))

    def ratio(other: str) -> float | None:
        theirs = results.speeds.get((other, connections))
        return ours.rate / theirs.rate if ours and theirs else None

    alone, bare = results.speeds.get(("ours", 1)), results.speeds.get(("direct", 1))
    stream = results.streams.get(("ours", streams))
    own, theirs = results.downloads.get("ours"), results.downloads.get("nginx")
    idle = results.idle.get("ours")
    few, many = (
        (results.servers[min(results.servers)], results.servers[max(results.servers)]) if results.servers else (0, 0)
    )
    added = (alone.p50 - bare.p50) * 1e3 if alone and bare else None
    return [
        Target(f"requests/s over FastMCP's proxy, {connections} connections", ratio("fastmcp"), 300, True, " ×"),
        Target(f"requests/s over nginx, {connections} connections", ratio("nginx"), 0.20, True, " ×"),
        Target("p50 added over direct, 1 connection", added, 0.12, False, " ms"),
        Target(
            f"memory per held stream, {streams:,} streams", None if stream is None else stream / 1024, 20, False, " KB"
        ),
        Target("streamed body, rate over nginx", own / theirs if own and theirs else None, 0.3, True, " ×"),
        Target("resident when idle", None if idle is None else idle / 2**20, 60, False, " MB"),
        Target("ready after start", results.ready.get("ours"), 1.0, False, " s"),
        Target(
            f"p50 with {max(results.servers, default=10_000):,} servers over 1",
            many / few if few else None,
            1.1,
            False,
            " ×",
        ),
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def render(results: Results, connections: int, stream_counts: list[int]) -> str:
    """Everything that a run found, as Markdown."""
    names = results.names
    blocks = [speed_table(results, connections), other_table(results, stream_counts)]
    wanted = targets(results, connections, stream_counts[-1])
    blocks.append(table(["Target", "found", "wanted", ""], [target.row() for target in wanted]))
    notes = [
        f"Load: {GENERATOR}; a stateless `tools/call` (MCP 2026-07-28), the same for all.",
        "Medians of interleaved rounds, p50 of the quietest; CPU is that of the proxy's processes alone.",
    ]
    if "fastmcp" in names:
        notes.append(
            "FastMCP's proxy has a Python upstream that speaks MCP (it could answer forty thousand requests a second);"
            " the others have a constant one."
        )
    if results.servers:
        each = ", ".join(f"{milliseconds(p50)} with {count:,}" for count, p50 in results.servers.items())
        notes.append(f"p50 at one connection by number of configured servers: {each}.")
    notes += results.absent
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in notes)])


def speed_table(results: Results, connections: int) -> str:
    rows = []
    for key, name in results.names.items():
        one, many = results.speeds.get((key, 1)), results.speeds.get((key, connections))
        if one and many:
            rows.append([name, *speed_cells(one), *speed_cells(many)])
    unit = ["req/s", "p50", "p99", "CPU/req"]
    head = ["", *[f"{label}, 1 conn" for label in unit], *[f"{label}, {connections} conn" for label in unit]]
    return table(head, rows)


def speed_cells(speed: Speed) -> list[str]:
    cpu = DASH if speed.cpu is None else f"{speed.cpu * 1e6:,.0f} µs"
    return [f"{speed.rate:,.0f}", milliseconds(speed.p50), milliseconds(speed.p99), cpu]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def other_table(results: Results, stream_counts: list[int]) -> str:
    rows = []
    for key, name in results.names.items():
        streams = [results.streams.get((key, count)) for count in stream_counts]
        rate, ready, idle = results.downloads.get(key), results.ready.get(key), results.idle.get(key)
        row = [
            name,
            *[DASH if value is None else f"{value / 1024:,.1f} KB" for value in streams],
            DASH if rate is None else f"{rate / 2**20:,.0f} MB/s",
            DASH if ready is None else f"{ready:.2f} s",
            DASH if idle is None else f"{idle / 2**20:,.0f} MB",
        ]
        if set(row[1:]) != {DASH}:
            rows.append(row)
    head = ["", *[f"per stream, {count:,}" for count in stream_counts], "streamed body", "ready", "idle"]
    return table(head, rows)


def machine() -> str:
    """The machine in words: processor, cores, memory, system, Python."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = os.cpu_count()
    return f"{cores} cores of {cpu}, {memory:.0f} GB, {platform.system()}, Python {platform.python_version()}"


def write(file: Path, text: str) -> None:
    """Puts the results into ``file``, below its heading and above what was written by hand after the mark."""
    mark = "<!-- written by hand below this line -->"
    kept = (
        file.read_text().partition(mark)[2] if file.exists() else "\n\n## What the profile shows\n\nNothing kept yet.\n"
    )
    day = datetime.now(UTC).date().isoformat()
    head = (
        f"# Results\n\nOne run of `make bench ARGS=--write`, {day}, on {machine()}.\n"
        "Load generator, proxy and upstream share these cores.\n"
    )
    file.write_text(f"{head}\n{text}\n\n{mark}{kept}")
