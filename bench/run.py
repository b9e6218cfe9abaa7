"""One run: which measures are taken of which contenders, in which order."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import callers, many_grants, measures, refresh_storm
from bench.backend import Backend
from bench.contenders import Contender, Start, available, direct, ours
from bench.engines import engines
from bench.results import BEFORE, OURS, Results
from bench.workloads import JSON, Workload

CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how much is measured; seconds and bytes."""

    workloads: tuple[Workload, ...]
    rounds: int = 5
    seconds: float = 2.0
    streams: tuple[int, ...] = (1000, 2000)
    blob: int = 200 * 2**20
    starts: int = 3
    servers: int = 10_000
    principals: int = 1_000
    grants: int = 100_000
    storm: int = 10_000
    """Grants whose tokens expire in one minute."""
    refresh_rate: float = 50.0
    rates_only: bool = False
    """Whether memory, large bodies and start-up are left out."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, on what, and what was found so far. Nothing else of ours runs beside a measure."""

    plan: Plan
    folder: Path
    backend: Backend
    contenders: dict[str, Start]
    results: Results = field(default_factory=Results)

    def measure(self) -> Results:
        missing = sorted({"nginx", "fastmcp"} - set(available()))
        self.results.absent.extend(f"Not installed: {name}." for name in missing)
        self.rates()
        if not self.plan.rates_only:
            self.streams_and_body()
            self.start_up()
            if OURS in self.contenders:
                self.many_servers()
                self.callers()
                self.stores()
        return self.results

    def rates(self) -> None:
        """Start all contenders and put load on each in turn, so that what disturbs the machine disturbs all alike."""
        started: dict[str, Contender] = {}
        try:
            for name, start in self.contenders.items():
                started[name] = start(self.folder, self.backend)
                self.results.names[name] = started[name].name
            for workload in self.plan.workloads:
                for contender in started.values():
                    if workload.key in contender.endpoints:
                        measures.verify(contender, workload.key)
            for number in range(self.plan.rounds):
                say(f"round {number + 1} of {self.plan.rounds}")
                # In the other direction every second time: a machine that slows down favors the first.
                order = list(started.items())[:: -1 if number % 2 else 1]
                for workload in self.plan.workloads:
                    self.round(workload, [(name, one) for name, one in order if workload.key in one.endpoints])
        finally:
            for contender in started.values():
                contender.stop()

    def round(self, workload: Workload, contenders: list[tuple[str, Contender]]) -> None:
        for connections in (1, CONNECTIONS) if workload is JSON else (CONNECTIONS,):
            for name, contender in contenders:
                found = measures.speed(contender, workload.key, connections=connections, seconds=self.plan.seconds)
                self.results.rounds.setdefault((name, workload.key, connections), []).append(found)

    def streams_and_body(self) -> None:
        """Measure the memory of held streams, and the rate of one large body."""
        for name, start in self.contenders.items():
            if name not in ("nginx", BEFORE, OURS):
                continue
            say(f"streams and a large body: {name}")
            with running(start(self.folder, self.backend)) as contender:
                measures.fetch_grants(contender)
                rates = [measures.download_rate(contender, self.plan.blob) for _ in range(self.plan.rounds)]
                self.results.downloads[name] = max(rates)
                held = measures.stream_memory(contender, list(self.plan.streams))
                found = {(name, count): value for count, value in zip(self.plan.streams, held, strict=True)}
                self.results.streams.update(found)
        with running(direct(self.folder, self.backend)) as contender:
            self.results.downloads["direct"] = measures.download_rate(contender, self.plan.blob)

    def start_up(self) -> None:
        """Measure how long a start takes and how much memory is resident then."""
        for name, start in self.contenders.items():
            if name not in ("direct", "nginx"):
                say(f"start-up: {name}")
                seconds, memory = measures.start_up(start, self.folder, self.backend, times=self.plan.starts)
                self.results.ready[name], self.results.idle[name] = seconds, memory

    def many_servers(self) -> None:
        """Measure p50 with one configured server and with many."""
        count = self.plan.servers
        say(f"{count:,} configured servers")
        with (
            running(ours(self.folder, self.backend)) as one,
            running(partial(ours, servers=count)(self.folder, self.backend)) as many,
        ):
            few_p50, many_p50 = measures.many_servers(one, many, rounds=self.plan.rounds, seconds=self.plan.seconds / 2)
        self.results.servers = {1: few_p50, count: many_p50}

    def callers(self) -> None:
        """Measure what it costs that callers are identified, and a page of many grants."""
        plan = self.plan
        say(f"callers: {plan.principals:,} principals, {plan.grants:,} grants")
        self.results.callers = callers.measure(
            self.folder,
            self.backend,
            rounds=plan.rounds,
            seconds=plan.seconds,
            connections=CONNECTIONS,
            starts=plan.starts,
            principals=plan.principals,
            grants=plan.grants,
        )

    def stores(self) -> None:
        """Measure what many grants cost, and how those that expire together are renewed, on each engine."""
        plan = self.plan
        with engines() as found:
            for name, opening in found.items():
                folder = self.folder / f"stores-{name.lower()}"
                say(f"{name}: {plan.grants:,} grants in the store")
                self.results.filled[name] = many_grants.measure(
                    folder,
                    self.backend,
                    opening,
                    grants=plan.grants,
                    starts=plan.starts,
                    rounds=plan.rounds,
                    seconds=plan.seconds / 2,
                )
                say(f"{name}: {plan.storm:,} grants that expire in one minute")
                self.results.storms[name] = refresh_storm.measure(
                    folder / "storm", opening, grants=plan.storm, rate=plan.refresh_rate
                )


@contextmanager
def running(contender: Contender) -> Iterator[Contender]:
    try:
        yield contender
    finally:
        contender.stop()


def say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)
