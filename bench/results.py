"""The numbers of one run, and the targets that they are held against."""

from dataclasses import dataclass, field
from statistics import median

from bench.callers import MODES, CallerResults
from bench.many_grants import Filled
from bench.measures import Speed, summary
from bench.refresh_storm import Storm
from bench.workloads import APART, JSON, WORKLOADS

OURS = "ours"
BEFORE = "before"
"""Keys of the two versions of the proxy: of this checkout, and of the one given with ``--against``."""


@dataclass(slots=True)
class Results:
    """What a run has measured so far, by the key of the contender; what could not be measured is absent."""

    names: dict[str, str] = field(default_factory=dict)
    rounds: dict[tuple[str, str, int], list[Speed]] = field(default_factory=dict)
    """By contender, workload and number of connections."""
    streams: dict[tuple[str, int], float] = field(default_factory=dict)
    downloads: dict[str, float] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    servers: dict[int, float] = field(default_factory=dict)
    callers: CallerResults | None = None
    filled: dict[str, list[Filled]] = field(default_factory=dict)
    storms: dict[str, Storm] = field(default_factory=dict)
    """By engine."""
    absent: list[str] = field(default_factory=list)

    def speed(self, name: str, workload: str, connections: int) -> Speed | None:
        rounds = self.rounds.get((name, workload, connections))
        return summary(rounds) if rounds else None

    def ratio(self, name: str, other: str, workload: str, connections: int) -> float | None:
        """Return the rate of one contender over another's: the median of the ratios of each round.

        The two were measured one after the other in each round, so what disturbs a round disturbs both.
        """
        own = self.rounds.get((name, workload, connections), [])
        others = self.rounds.get((other, workload, connections), [])
        ratios = [one.rate / two.rate for one, two in zip(own, others, strict=False)]
        return median(ratios) if ratios else None

    def cores(self, name: str, connections: int) -> list[float]:
        """Return how many cores a contender kept busy under each workload."""
        found = [self.speed(name, workload.key, connections) for workload in WORKLOADS]
        return [one.rate * one.cpu for one in found if one is not None and one.cpu is not None]


@dataclass(frozen=True, slots=True)
class Target:
    """One bound, and the number that is held against it; ``found`` is None if it was not measured."""

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


def targets(results: Results, connections: int, streams: int, name: str = OURS) -> list[Target]:
    """Return all targets, with the numbers of the contender ``name``."""
    many = f"{connections} connections"
    fast, apart = (cpu_per_request(results, name, workload.key, connections) for workload in (JSON, APART))
    stream, idle = results.streams.get((name, streams)), results.idle.get(name)
    own, theirs = results.downloads.get(name), results.downloads.get("nginx")
    shares = [
        Target(
            f"{workload.title}: requests/s over nginx, {many}",
            results.ratio(name, "nginx", workload.key, connections),
            workload.min_share,
            True,
            " ×",
        )
        for workload in WORKLOADS
        if workload.min_share is not None
    ]
    over_fastmcp = results.ratio(name, "fastmcp", JSON.key, connections)
    return [
        *shares,
        Target(f"{JSON.title}: CPU per request, {many}", scaled(fast, 1e6), 35, False, " µs"),
        Target(f"{APART.title}: CPU per request, {many}", scaled(apart, 1e6), 42, False, " µs"),
        Target("p50 added over direct, 1 connection", scaled(added_latency(results, name), 1e3), 0.12, False, " ms"),
        Target(f"memory per held stream, {streams:,} streams", scaled(stream, 1 / 1024), 17, False, " KB"),
        Target("resident when idle", scaled(idle, 2**-20), 58, False, " MB"),
        Target("ready after start", results.ready.get(name), 1.0, False, " s"),
        Target("streamed body, rate over nginx", own / theirs if own and theirs else None, 0.3, True, " ×"),
        Target(f"requests/s over FastMCP's proxy, {many}", over_fastmcp, 300, True, " ×"),
        many_servers(results, name),
        *(caller_targets(results.callers) if name == OURS and results.callers else []),
        *(store_targets(results) if name == OURS else []),
    ]


def caller_targets(found: CallerResults) -> list[Target]:
    """Return the targets for callers that are identified: the mode that costs most counts."""
    others = MODES[1:]
    shares = [share for mode in others if (share := found.share(mode)) is not None]
    cpus = [cpu for mode in others if (cpu := found.cpu(mode)) is not None]
    count = f"{found.principals:,} principals"
    return [
        Target("requests/s with callers over without", min(shares, default=None), 0.95, True, " ×"),
        Target("CPU per request added by callers", scaled(max(cpus, default=None), 1e6), 3, False, " µs"),
        Target(
            f"resident when idle, {count}", scaled(max(found.idle.values(), default=None), 2**-20), 60, False, " MB"
        ),
        Target(f"ready after start, {count}", max(found.ready.values(), default=None), 0.5, False, " s"),
        Target(
            f"a page of {found.grants:,} grants, any filter",
            scaled(max(found.pages.values(), default=None), 1e3),
            30,
            False,
            " ms",
        ),
    ]


def store_targets(results: Results) -> list[Target]:
    """Return the targets for many grants in the store, and for many that expire together."""
    targets = []
    for engine, (empty, full) in results.filled.items():
        what = f"{full.grants:,} grants over none, {engine}"
        targets += [
            Target(f"start, {what}", full.ready - empty.ready, 0.1, False, " s"),
            Target(f"resident when idle, {what}", (full.idle - empty.idle) / 2**20, 1, False, " MB"),
            Target(f"p50, {what}", full.p50 / empty.p50, 1.1, False, " ×"),
        ]
    for engine, storm in results.storms.items():
        what = f"{storm.grants:,} grants that expire together, {engine}"
        targets += [
            Target(f"refreshes in a second, {what}", storm.most, storm.rate, False),
            Target(f"lost, {what}", storm.lost, 0, False),
            Target(f"time over the least possible, {what}", storm.seconds / storm.least_seconds, 1.5, False, " ×"),
            Target(f"renewed after their expiry, {what}", storm.late, 0, False),
            Target(f"sent before Retry-After ended, {what}", storm.early, 0, False),
        ]
    return targets


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def cpu_per_request(results: Results, name: str, workload: str, connections: int) -> float | None:
    speed = results.speed(name, workload, connections)
    return speed.cpu if speed else None


def added_latency(results: Results, name: str) -> float | None:
    """Return the seconds that a contender adds to the p50 of direct traffic at one connection."""
    own, direct = results.speed(name, JSON.key, 1), results.speed("direct", JSON.key, 1)
    return own.p50 - direct.p50 if own and direct else None


def many_servers(results: Results, name: str) -> Target:
    counts = sorted(results.servers) if name == OURS else []
    found = results.servers[counts[-1]] / results.servers[counts[0]] if counts else None
    return Target(f"p50 with {max(counts, default=10_000):,} servers over 1", found, 1.1, False, " ×")
