"""The results of one run as the tables that are printed and kept."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from bench.callers import MODES, CallerResults
from bench.load import GENERATOR
from bench.measures import Speed
from bench.results import BEFORE, OURS, Results, Target, store_targets, targets
from bench.workloads import JSON, WORKLOADS

DASH = "–"
TARGET_HEAD = ["Target", "found", "wanted", ""]
VERDICTS = {True: "pass", False: "MISS", None: "not measured"}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns line up in a terminal."""
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
    """Return everything that a run has measured, as Markdown."""
    blocks = [
        speed_table(results, connections),
        workload_table(results, connections),
        *([other_table(results, stream_counts)] if results.ready or results.downloads else []),
        *([caller_table(results.callers), page_table(results.callers)] if results.callers else []),
        *store_tables(results),
        target_table(results, connections, stream_counts[-1]),
    ]
    lines = notes(results, connections)
    return "\n\n".join([*blocks, "\n".join(f"- {note}" for note in lines)])


def render_stores(results: Results) -> str:
    """Return what was measured of stores with many grants, as Markdown."""
    rows = [target_row(target) for target in store_targets(results)]
    return "\n\n".join([*store_tables(results), table(TARGET_HEAD, rows)])


def speed_table(results: Results, connections: int) -> str:
    """Return the rates and latencies of the first workload, at one connection and at many."""
    rows = []
    for key, name in results.names.items():
        one, many = results.speed(key, JSON.key, 1), results.speed(key, JSON.key, connections)
        if one and many:
            rows.append([name, *speed_cells(one), *speed_cells(many)])
    units = ["req/s", "p50", "p99", "CPU/req"]
    head = [JSON.title, *[f"{unit}, 1 conn" for unit in units], *[f"{unit}, {connections} conn" for unit in units]]
    return table(head, rows)


def speed_cells(speed: Speed) -> list[str]:
    return [f"{speed.rate:,.0f}", milliseconds(speed.p50), milliseconds(speed.p99), microseconds(speed.cpu)]


def workload_table(results: Results, connections: int) -> str:
    """Return one row for each workload and contender: rate, CPU, and share of nginx's rate."""
    rows = []
    for workload in WORKLOADS:
        for key, name in results.names.items():
            speed = results.speed(key, workload.key, connections)
            if speed and key != "fastmcp":
                share = results.ratio(key, "nginx", workload.key, connections) if key in (BEFORE, OURS) else None
                cells = [f"{speed.rate:,.0f}", milliseconds(speed.p50), microseconds(speed.cpu)]
                rows.append([f"{workload.title}: {name}", *cells, DASH if share is None else f"{share:.3f}"])
    return table([f"{connections} connections", "req/s", "p50", "CPU/req", "share of nginx"], rows)


def other_table(results: Results, stream_counts: list[int]) -> str:
    """Return memory per held stream, the rate of a large body, and start-up."""
    rows = []
    for key, name in results.names.items():
        streams = [results.streams.get((key, count)) for count in stream_counts]
        rate, ready, idle = results.downloads.get(key), results.ready.get(key), results.idle.get(key)
        cells = [DASH if held is None else f"{held / 1024:.1f} KB" for held in streams]
        cells.append(DASH if rate is None else f"{rate / 1e6:,.0f} MB/s")
        cells.append(DASH if ready is None else f"{ready:.2f} s")
        cells.append(DASH if idle is None else f"{idle / 2**20:.1f} MB")
        rows.append([name, *cells])
    head = ["", *[f"per stream, {count:,}" for count in stream_counts], "streamed body", "ready", "idle"]
    return table(head, rows)


def caller_table(found: CallerResults) -> str:
    """Return one row for each way to identify callers."""
    rows = []
    for mode in MODES:
        share, cpu = found.share(mode), found.cpu(mode)
        rows.append(
            [
                mode,
                DASH if share is None else f"{share:.3f}",
                DASH if cpu is None else f"{cpu * 1e6:,.1f} µs",
                DASH if mode not in found.ready else f"{found.ready[mode]:.2f} s",
                DASH if mode not in found.idle else f"{found.idle[mode] / 2**20:.1f} MB",
            ]
        )
    return table([f"Callers, {found.principals:,} principals", "share of none", "CPU/req added", "ready", "idle"], rows)


def page_table(found: CallerResults) -> str:
    """Return one row for each filter of the API's list of grants."""
    rows = [[f"`{filters}`" if filters else "all", milliseconds(seconds)] for filters, seconds in found.pages.items()]
    return table([f"GET /api/v1/grants, {found.grants:,} grants", "a page"], rows)


def store_tables(results: Results) -> list[str]:
    """Return a table of what many grants cost, and one of how those that expire together were renewed."""
    tables = []
    if results.filled:
        head = ["Grants in the store", "ready after start", "resident when idle", "p50, 1 connection"]
        rows = [
            [f"{engine}: {it.grants:,}", f"{it.ready:.2f} s", f"{it.idle / 2**20:.1f} MB", milliseconds(it.p50)]
            for engine, both in results.filled.items()
            for it in both
        ]
        tables.append(table(head, rows))
    if results.storms:
        head = ["Grants that expire together", "rate", "most in a second", "seconds", "late", "lost", "early"]
        rows = [
            [
                f"{engine}: {it.grants:,}",
                f"{it.rate:g}",
                *map(str, (it.most, round(it.seconds), it.late, it.lost, it.early)),
            ]
            for engine, it in results.storms.items()
        ]
        tables.append(table(head, rows))
    return tables


def target_table(results: Results, connections: int, streams: int) -> str:
    """Return the targets with what was found, and in one more column what the other checkout reaches."""
    found = targets(results, connections, streams)
    head, rows = [*TARGET_HEAD], [target_row(target) for target in found]
    if BEFORE in results.names:
        head.insert(1, "before")
        for row, target in zip(rows, targets(results, connections, streams, BEFORE), strict=True):
            row.insert(1, amount(target.found, target.unit))
    return table(head, rows)


def target_row(target: Target) -> list[str]:
    bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}{target.unit}"
    return [target.what, amount(target.found, target.unit), bound, VERDICTS[target.met]]


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return DASH
    return f"{value:,.3g}{unit}" if value < 100 else f"{value:,.0f}{unit}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def microseconds(seconds: float | None) -> str:
    return DASH if seconds is None else f"{seconds * 1e6:,.0f} µs"


def notes(results: Results, connections: int) -> list[str]:
    """Return what a reader has to know to judge the numbers."""
    lines = [
        f"Load: {GENERATOR}; a stateless `tools/call` (MCP 2026-07-28), the same for all.",
        "Medians of interleaved rounds, p50 of the quietest; a share is the median of the shares of each round. CPU is"
        " that of the proxy's processes alone.",
        "JSON comes from nginx as a constant upstream, behind TLS too (HTTP/1.1, persistent connections, certificate"
        " verified); event streams come from raw protocol code on uvloop. Direct rates are those of the upstreams.",
        "End apart: the head and the event come in one segment, the last chunk in another, after 16 more requests (at"
        " most 4 ms). Head apart: the event and the last chunk come together, as late as that; so the MCP SDK for"
        " Python sends them. nginx buffers these answers, which is its default.",
    ]
    busy = [
        f"{results.names[key]} {min(cores):.2f} to {max(cores):.2f}"
        for key in results.names
        if key != "fastmcp" and (cores := results.cores(key, connections))
    ]
    if busy:
        lines.append(
            f"Cores kept busy at {connections} connections: {', '.join(busy)}. A proxy with one process that is well"
            " below 1 was waiting for the load, the upstream or other work on the machine."
        )
    if "fastmcp" in results.names:
        lines.append(
            "FastMCP's proxy has a Python upstream that speaks MCP (it could answer forty thousand requests a second);"
            " the others have a constant one."
        )
    if results.servers:
        each = ", ".join(f"{milliseconds(p50)} with {count:,}" for count, p50 in results.servers.items())
        lines.append(f"p50 at one connection by number of configured servers: {each}.")
    if results.callers:
        lines.append(
            "Callers: each mode in turns with `none`, one right after the other; the share is the median of all rounds,"
            " the CPU that of the quietest round of each. A page has 50 grants and is asked for over HTTP by an"
            " admin; some filters match few grants, or none."
        )
    return lines + results.absent


def machine() -> str:
    """Return the machine in words: processor, cores, memory, system, Python."""
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
    """Put the results into ``file``, below its heading and above what was written by hand after the mark."""
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
