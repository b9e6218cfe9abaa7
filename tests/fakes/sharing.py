"""The proxy that docs/sharing.md sets up: its commands run, with addresses and files moved to where a test has them."""

import asyncio
import json
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import yaml

from bench import certificates
from bench.certificates import Certificates
from bench.processes import free_port
from fakes.identity_provider import CLIENT_SECRET, Person
from fakes.mcp_client import PlainClient
from fakes.nginx import running_nginx
from fakes.proxy import PROGRAM, serving

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "sharing.md").read_text()

CLAUDE = """#!{python}
import json, pathlib, sys
pathlib.Path({file!r}).write_text(json.dumps(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Block:
    """A block of a page, in one language."""

    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]


def block(language: str, word: str, *, without: str = "\0", page: str = PAGE) -> Block:
    """Return the only block in a language that has this word, and is without another one."""
    blocks = [each for each in blocks_of(page) if each.language == language]
    (found,) = (each for each in blocks if word in each.text and without not in each.text)
    return found


PLAIN_NGINX = block("nginx", "proxy_pass", page=(DOCS / "deployment.md").read_text())


@dataclass(kw_only=True)
class Shared:
    """A machine with the proxy, nginx, and the commands of the page; ``moves`` are further replacements."""

    folder: Path
    files: Certificates
    moves: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    behind: int = field(default_factory=free_port)
    sign_on: int = 0
    """The port of what answers nginx's ``auth_request``."""
    env: dict[str, str] = field(default_factory=dict)
    """Of the proxy, in addition."""

    @classmethod
    def on(cls, folder: Path, **moves: str) -> "Shared":
        """Prepare a folder. ``moves`` are the URLs of the servers by the names in the page."""
        made = cls(folder=folder, files=certificates.create(folder))
        made.moves |= {f"https://{name.replace('_', '.')}/mcp": url for name, url in moves.items()}
        commands = folder / "bin"
        commands.mkdir()
        program = f'#!/bin/sh\nexec "{sys.executable}" -m mcp_auth_proxy "$@"\n'
        claude = CLAUDE.format(python=sys.executable, file=str(folder / "claude.json"))
        for name, text in {"mcp-auth-proxy": program, "claude": claude}.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        return made

    @property
    def origin(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.files.authority)

    def moved(self, text: str) -> str:
        """Return an example with the addresses and files of this test. Everything else stays as it is."""
        changes = {
            **self.moves,
            "https://mcp.example.com": self.origin,
            "server_name mcp.example.com": "server_name localhost",
            "mcp-auth-proxy.example.com": "localhost",
            "127.0.0.1:8787": f"127.0.0.1:{self.behind}",
            "listen 443": f"listen {self.port}",
            "$host;": "$http_host;",  # the port is not 443
            "/etc/ssl/mcp-auth-proxy/fullchain.pem": str(self.files.certificate),
            "/etc/ssl/mcp-auth-proxy/privkey.pem": str(self.files.key),
            "/etc/mcp-auth-proxy/": f"{self.folder}/",
            "/etc/nginx/": f"{self.folder}/",
            "127.0.0.1:4180": f"127.0.0.1:{self.sign_on}",
        }
        for old, new in changes.items():
            text = text.replace(old, new)
        return text

    def configure(self, *blocks: Block) -> None:
        """Write the configuration in these blocks, the sections of the later ones over those of the earlier ones."""
        document: dict[str, Any] = {"authorization": {"wait": 0, "open_browser": "never"}}
        for each in blocks:
            for key, value in yaml.safe_load(self.moved(each.text)).items():
                document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
        (self.folder / "mcp-auth-proxy.yaml").write_text(yaml.safe_dump(document))

    async def run(self, commands: Block, *, typed: str = "", **env: str) -> str:
        """Run commands as a terminal would, but end with the first one that fails; return their stdout."""
        process = await asyncio.create_subprocess_exec(
            *("sh", "-euc", self.moved(commands.text)),
            cwd=self.folder,
            env=self._environment(env),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(typed.encode()), 30)
        assert process.returncode == 0, f"{commands.text}:\n{err.decode()}"
        return out.decode()

    async def added_to_claude(self, commands: Block, **env: str) -> PlainClient:
        """Run a ``claude mcp add``; return a client with what it was told."""
        await self.run(commands, **env)
        *given, url = (told := json.loads((self.folder / "claude.json").read_text()))[:6]
        assert given == ["mcp", "add", "--transport", "http", "linear"]
        headers = told[6:]
        fields = [each.partition(": ") for each in headers[1::2]]
        assert headers[::2] == ["--header"] * len(fields)
        return self.client(url, {field: value for field, _, value in fields})

    def configured(self, file: Block, key: str = "") -> PlainClient:
        """Return a client with this JSON file, as the editors fill in its variables."""
        text = re.sub(r"\$\{(env:|input:)?(MCP_KEY|mcp-key)\}", key, self.moved(file.text))
        document = json.loads(text)
        server = document.get("servers", document.get("mcpServers"))["linear"]
        assert server.get("type", "http") == "http"
        return self.client(server["url"], server.get("headers", {}))

    def client(self, url: str, headers: Mapping[str, str]) -> PlainClient:
        """Return an MCP client that sends these fields."""
        client = PlainClient(url)
        client.http = httpx2.AsyncClient(verify=self.trusted, trust_env=False, timeout=20, headers=dict(headers))
        return client

    def person(self, **options: str) -> Person:
        return Person(trusted=self.trusted, **options)

    def link_in(self, text: str) -> str:
        """Return the link in an answer. Fails if there is none."""
        (found,) = set(re.findall(rf"{self.origin}/connect/[^\s\"\\]+", text))
        return str(found).rstrip(".")

    @asynccontextmanager
    async def serving(self, *, nginx: str = PLAIN_NGINX.text, program: Sequence[str] = PROGRAM) -> AsyncIterator[None]:
        """Run the proxy and nginx until the block ends."""
        at = f"http://127.0.0.1:{self.behind}"
        async with serving(env=self._environment({}), ready_at=at, program=program), self.with_nginx(nginx):
            yield

    @asynccontextmanager
    async def with_nginx(self, server: str) -> AsyncIterator[None]:
        """Run nginx with a ``server`` block until the block ends."""
        async with running_nginx(self.folder / "nginx", self.moved(server), self.port):
            yield

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "MCP_AUTH_PROXY_CONFIG": str(self.folder / "mcp-auth-proxy.yaml"),
            "CURL_CA_BUNDLE": str(self.files.authority),
            "SIGN_IN_SECRET": CLIENT_SECRET,
            **self.env,
            **env,
        }
