"""The proxy under test, in this event loop or as a process, always behind a real socket."""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import httpx2
import yaml

from fakes import postgresql
from fakes.mcp_client import PlainClient
from mcp_auth_proxy.app import Application, lifespan
from mcp_auth_proxy.cli.listener import bind, listening
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.identity import Authenticator
from mcp_auth_proxy.models import Flow

Json = dict[str, Any]


class Sections(TypedDict, total=False):
    """The sections of a configuration file besides ``servers`` and ``listen``, with values as in YAML."""

    public_url: str
    health_listen: str
    health_quit: bool
    upstream_timeout: str
    store: Mapping[str, object]
    authorization: Mapping[str, object]
    limits: Mapping[str, object]
    inbound: Mapping[str, object]
    outbound: Mapping[str, object]
    admin: Mapping[str, object]
    events: Mapping[str, object]


class RunningProxy:
    """A proxy that serves; ``links`` are the links that it has announced, in order."""

    def __init__(self, origin: str, links: list[str], application: Application | None = None) -> None:
        self.origin = origin
        self.links = links
        self._application = application

    @property
    def application(self) -> Application:
        assert self._application is not None, "only a proxy in this process has one"
        return self._application

    def client(self, server: str, **options: Any) -> PlainClient:
        return PlainClient(f"{self.origin}/{server}/mcp", **options)

    async def next_link(self, count: int = 1) -> str:
        """Wait, bounded, until ``count`` links have been announced; return the last of them."""
        await until(lambda: len(self.links) >= count, f"{count} links, have {len(self.links)}")
        return self.links[count - 1]


def write_config(
    folder: Path, servers: Mapping[str, str | Json], *, listen: str = "127.0.0.1:0", **sections: Unpack[Sections]
) -> Path:
    """Write a configuration file, with the store in ``folder``. A server may be given as its URL alone.

    Unless ``authorization`` says so, there is no cold start, so that the proxy asks servers nothing of its own accord.
    """
    document: dict[str, object] = {
        "listen": listen,
        "store": postgresql.section_of(folder) or {"url": "sqlite:///proxy.db"},
        # Most tests are about held requests; those about cold start turn it on.
        "authorization": {"wait": "5s", "open_browser": "never", "cold_start": False},
        "servers": {name: {"url": entry} if isinstance(entry, str) else entry for name, entry in servers.items()},
    }
    for name, section in sections.items():
        before = document.get(name)
        document[name] = {**before, **section} if isinstance(before, dict) and isinstance(section, dict) else section
    path = folder / "mcp-auth-proxy.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@asynccontextmanager
async def running_proxy(
    folder: Path,
    servers: Mapping[str, str | Json],
    *,
    clock: Callable[[], float] = time.time,
    listen: Address | None = None,
    authenticator: Authenticator | None = None,
    **sections: Unpack[Sections],
) -> AsyncIterator[RunningProxy]:
    """Run the proxy in this event loop until the block ends; the same ``folder`` means the same store.

    ``listen`` keeps the port over a restart, because the redirect URI names it. ``authenticator``: instead of that
    of the configuration.
    """
    settings = load(write_config(folder, servers, **sections), environ=os.environ)
    links: list[str] = []

    def announce(flow: Flow, link: str) -> None:
        links.append(link)

    sock, address = bind(listen or settings.listen)
    with sock:
        async with (
            lifespan(
                settings,
                address,
                clock=clock,
                announce=announce,
                announce_key=lambda line: None,
                authenticator=authenticator,
            ) as application,
            listening(application, sock),
        ):
            yield RunningProxy(application.public_url, links, application)


class ProxyProcess(RunningProxy):
    """``mcp-auth-proxy serve`` as a process; ``log`` is all that it wrote, to stdout (``out``) and stderr (``err``)."""

    def __init__(self, process: asyncio.subprocess.Process, origin: str) -> None:
        super().__init__(origin, [])
        self.process = process
        self.log = ""
        self.out = ""
        self.err = ""
        self.reading: asyncio.Task[None] | None = None

    def note(self, line: str, *, err: bool = False) -> None:
        self.log += line
        if err:
            self.err += line
        else:
            self.out += line
        self.links += re.findall(r"http://\S+/connect/\S+", line)

    async def stop(self, sign: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; return the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(sign)
        code = await asyncio.wait_for(self.process.wait(), 40)
        if self.reading is not None:
            await self.reading
        return code


Environment = Mapping[str, str | None]
"""Environment variables to set; None removes one."""


PROGRAM = (sys.executable, "-m", "mcp_auth_proxy")


async def start_command(
    *arguments: str,
    env: Environment | None = None,
    cwd: Path | None = None,
    max_files: int | None = None,
    program: Sequence[str] = PROGRAM,
) -> asyncio.subprocess.Process:
    """Start a command of the proxy without a terminal. ``max_files`` is its limit on open files, soft and hard."""
    limited = ("/bin/sh", "-c", f'ulimit -n {max_files} && exec "$@"', "sh") if max_files else ()
    return await asyncio.create_subprocess_exec(
        *limited,
        *program,
        *arguments,
        env={name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None},
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run_command(
    *arguments: str, env: Environment | None = None, cwd: Path | None = None, timeout: float = 50
) -> tuple[int, str, str]:
    """Run a command of the proxy to its end; return exit code, stdout and stderr, which names no file (see below)."""
    process = await start_command(*arguments, env=env, cwd=cwd)
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), unnamed(err.decode())


def unnamed(err: str) -> str:
    """Return stderr without its first line, if that says which configuration file is used, as in every command."""
    return re.sub(r"\Aconfiguration: .*\n", "", err)


@asynccontextmanager
async def proxy_process(
    config: Path,
    *arguments: str,
    listen: str = "127.0.0.1:0",
    env: Environment | None = None,
    max_files: int | None = None,
) -> AsyncIterator[ProxyProcess]:
    """Run ``serve`` with this file until the block ends; yield the process once it is ready."""
    options = ("--config", str(config), "--listen", listen, *arguments)
    async with serving(*options, env=env, max_files=max_files) as proxy:
        yield proxy


@asynccontextmanager
async def serving(
    *arguments: str,
    env: Environment | None = None,
    cwd: Path | None = None,
    max_files: int | None = None,
    program: Sequence[str] = PROGRAM,
    ready_at: str | None = None,
) -> AsyncIterator[ProxyProcess]:
    """Run ``serve`` with these arguments until the block ends; yield the process once it is ready.

    ``ready_at``: the origin to ask, if that which the proxy prints is a web server's in front of it.
    """
    process = await start_command("serve", *arguments, env=env, cwd=cwd, max_files=max_files, program=program)
    proxy = ProxyProcess(process, "")
    started = asyncio.Event()

    async def read(stream: asyncio.StreamReader, *, err: bool) -> None:
        async for raw in stream:
            line = raw.decode(errors="replace")
            proxy.note(line, err=err)
            found = re.search(r"is listening at (http\S+)", line)
            if found:
                proxy.origin = found[1]
                started.set()

    async def read_all() -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        await asyncio.gather(read(process.stdout, err=False), read(process.stderr, err=True))
        started.set()

    proxy.reading = asyncio.create_task(read_all())
    try:
        # It waits 30 seconds for a database server that is away.
        await asyncio.wait_for(started.wait(), 40)
        assert proxy.origin, f"serve did not start:\n{proxy.log}"
        await ready(ready_at or proxy.origin)
        yield proxy
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await proxy.reading


async def ready(origin: str) -> None:
    """Wait, bounded, until /readyz answers 200."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        for _ in range(200):
            try:
                if (await client.get(f"{origin}/readyz")).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            await asyncio.sleep(0.05)
    raise AssertionError(f"{origin} did not become ready")


async def until(condition: Callable[[], object], what: str = "the condition", timeout: float = 20) -> None:
    """Wait, bounded, until the condition holds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not condition():
        assert loop.time() < deadline, f"{what} did not hold within {timeout} s"
        await asyncio.sleep(0.01)


async def wait_until_stable(value: Callable[[], int]) -> int:
    """Wait, bounded, until a number no longer changes; return it."""
    for _ in range(50):
        before = value()
        await asyncio.sleep(0.2)
        if value() == before:
            return before
    raise AssertionError("the number keeps changing")


def link_in(answer: Json) -> str:
    """Return the authorization link in a response of the proxy, in whatever form."""
    found = re.search(r"http://[^\s\"\\]+/connect/[^\s\"\\]+", json.dumps(answer))
    assert found, f"no link in {answer}"
    return found[0]
