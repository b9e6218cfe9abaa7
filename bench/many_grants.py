"""What many grants in the store cost a proxy that does not use them: start, memory and a request, on each engine."""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import measures
from bench.backend import ROOT, Backend
from bench.contenders import SECRET, Contender, configuration, proxied, source_path
from bench.engines import Opening
from bench.grant_lists import add_grants
from bench.processes import Child, free_port
from bench.workloads import JSON
from mcp_auth_proxy.config.settings import StoreSettings
from mcp_auth_proxy.store import open_store

PRINCIPALS = 1_000


@dataclass(slots=True)
class Filled:
    """A proxy on a store with ``grants``: seconds until ready, bytes resident then, seconds of a request (p50)."""

    grants: int
    ready: float
    idle: int
    p50: float


def measure(
    folder: Path, backend: Backend, opening: Opening, *, grants: int, starts: int, rounds: int, seconds: float
) -> list[Filled]:
    """Measure an empty store and one with many grants, in turns."""
    homes = {count: _prepare(folder / f"grants-{count}", backend, opening, count) for count in (0, grants)}
    found: dict[int, tuple[list[float], list[int]]] = {count: ([], []) for count in homes}
    for _ in range(starts):
        for count, (home, port) in homes.items():
            contender = _start(home, port, backend)
            try:
                child = measures.require_child(contender)
                measures.settle(child)
                found[count][0].append(contender.ready_seconds)
                found[count][1].append(child.resident_bytes())
            finally:
                contender.stop()
    running = {count: _start(home, port, backend) for count, (home, port) in homes.items()}
    try:
        p50s: dict[int, list[float]] = {count: [] for count in running}
        for contender in running.values():
            measures.verify(contender, JSON.key)
        for number in range(rounds):
            # In the other direction every second time: a machine that slows down favors the first.
            for count, contender in list(running.items())[:: -1 if number % 2 else 1]:
                p50s[count].append(measures.speed(contender, JSON.key, connections=1, seconds=seconds).p50)
    finally:
        for contender in running.values():
            contender.stop()
    return [Filled(count, median(ready), max(idle), min(p50s[count])) for count, (ready, idle) in found.items()]


def _prepare(home: Path, backend: Backend, opening: Opening, grants: int) -> tuple[Path, int]:
    home.mkdir(parents=True)
    settings, port = opening(home), free_port()
    asyncio.run(_fill(settings, grants))
    text = configuration(port, backend, 1)
    (home / "config.yaml").write_text(text.replace("store: {url: 'sqlite:///store.db'}", _store(settings)))
    return home, port


async def _fill(settings: StoreSettings, grants: int) -> None:
    engine = await open_store(settings)
    try:
        await add_grants(engine, grants, PRINCIPALS)
    finally:
        await engine.close()


def _store(settings: StoreSettings) -> str:
    """Return the section of the configuration."""
    key = f"keys: ['file:{settings.keys[0].name}']"
    if settings.postgresql is None:
        return f"store: {{url: 'sqlite:///{settings.path}', {key}}}"
    return f"store: {{url: 'env:BENCH_STORE', {key}}}"


def _start(home: Path, port: int, backend: Backend) -> Contender:
    command = [sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(home / "config.yaml")]
    given = {SECRET: "bench-client-secret", **source_path(ROOT)}
    if (home / "url").exists():
        given["BENCH_STORE"] = (home / "url").read_text()
    child = Child(command, log=home / "log", environment=given)
    ready = child.wait_for(port, "/readyz", deadline=120.0)
    return Contender("mcp-auth-proxy", proxied(port, backend), child, ready)
