"""``demo``: the whole flow on this machine, with its own authorization server and MCP server."""

import asyncio
import logging
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from mcp_auth_proxy.app import lifespan
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationServer
from mcp_auth_proxy.cli.demo_servers.ledger import Rules
from mcp_auth_proxy.cli.demo_servers.local_server import serve
from mcp_auth_proxy.cli.demo_servers.mcp_server import ProtectedMcpServer, Protection
from mcp_auth_proxy.cli.listener import bind, listening
from mcp_auth_proxy.cli.terminal import say
from mcp_auth_proxy.config.settings import (
    Address,
    AuthorizationSettings,
    KeySource,
    ServerSettings,
    Settings,
    StoreSettings,
)
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.models import Flow

TOKEN_SECONDS = 60.0

WORDS = {
    "challenge": "401 / 403",
    "resource-metadata": "discovery",
}


class Story:
    """Print each step when it happens, and remember the steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def chapter(self, title: str) -> None:
        say("", title)

    def show(self, step: str, words: str) -> None:
        name = WORDS.get(step, step)
        self.steps.append(name)
        say(f"  {name:<14} {words}")

    def require(self, *steps: str) -> None:
        """Raise McpAuthProxyError if one of the steps has not happened since the last call."""
        missing = [step for step in steps if step not in self.steps]
        self.steps.clear()
        if missing:
            raise McpAuthProxyError(f"The demo failed: missing steps {', '.join(missing)}.")


async def demo() -> int:
    """Run the demo and return the exit code. Raises McpAuthProxyError if a step is missing or fails."""
    # The SDK logs each session at INFO, which would clutter the output.
    logging.getLogger("mcp_auth_proxy").setLevel(logging.ERROR)
    # A notification may still arrive while the client closes its stream.
    logging.getLogger("mcp.client.streamable_http").setLevel(logging.CRITICAL)
    story = Story()
    with tempfile.TemporaryDirectory(prefix="mcp-auth-proxy-demo-") as folder:
        async with _servers(story) as (authorization_server, resource):
            settings = _settings(Path(folder), resource)
            await _first_call(story, settings)
            await _after_restart(story, settings, authorization_server)
    say("", "Done: one consent for each scope, and the client never saw OAuth.")
    return 0


async def _first_call(story: Story, settings: Settings) -> None:
    async with _proxy(story, settings) as url:
        story.chapter("A client without OAuth calls a tool of a protected server, through the proxy:")
        story.show("client", f"calls echo at {url}")
        story.show("result", await _call(url, "echo", text="hello through the proxy"))
        story.require("401 / 403", "discovery", "registration", "link", "consent", "token", "retry", "result")
        story.chapter("A tool that needs another scope: the proxy requests it, once:")
        story.show("client", "calls write_note")
        story.show("result", await _call(url, "write_note", text="remember this"))
        story.require("401 / 403", "consent", "token", "retry", "result")


async def _after_restart(story: Story, settings: Settings, authorization_server: AuthorizationServer) -> None:
    story.chapter("The proxy is restarted; the user is not asked again:")
    async with _proxy(story, settings) as url:
        story.show("restart", "the grant is read from the encrypted store")
        story.show("result", await _call(url, "whoami"))
        if "consent" in story.steps:
            raise McpAuthProxyError("The demo failed: the login was lost in the restart.")
        story.require("restart", "result")
        story.chapter("The access token is revoked; the client does not notice:")
        ended = authorization_server.ledger.end_access_tokens()
        story.show("expiry", f"{ended} access tokens were revoked at the authorization server")
        story.show("result", await _call(url, "add", a=20, b=22))
        story.require("401 / 403", "refresh", "retry", "result")


@asynccontextmanager
async def _servers(story: Story) -> AsyncIterator[tuple[AuthorizationServer, str]]:
    """Start the authorization server and the MCP server; yield the first, and the URL of the second."""
    made: list[AuthorizationServer] = []

    def make_authorization_server(origin: str) -> AuthorizationServer:
        made.append(AuthorizationServer(origin, rules=Rules(token_seconds=TOKEN_SECONDS), announce=story.show))
        return made[0]

    def make_mcp_server(origin: str) -> ProtectedMcpServer:
        return ProtectedMcpServer(
            Protection(
                resource=f"{origin}/mcp",
                issuer=made[0].issuer,
                find_token=made[0].ledger.token,
                announce=story.show,
            )
        )

    async with serve(make_authorization_server), serve(make_mcp_server, lifespan="on") as server:
        story.chapter("Servers on this machine:")
        story.show("servers", f"authorization server {made[0].issuer}, protected MCP server {server.origin}/mcp")
        yield made[0], f"{server.origin}/mcp"


@asynccontextmanager
async def _proxy(story: Story, settings: Settings) -> AsyncIterator[str]:
    """Run the proxy until the block ends; yield the address for clients."""
    users: set[asyncio.Task[None]] = set()

    def announce(flow: Flow, link: str) -> None:
        story.show("link", "the proxy shows the user a link: " + link.partition("?")[0])
        users.add(asyncio.create_task(_consent(link)))

    sock, address = bind(settings.listen)
    with sock:
        async with (
            lifespan(settings, address, announce=announce, announce_key=_say_nothing) as application,
            listening(application, sock),
        ):
            yield f"{application.public_url}/notes/mcp"
    await asyncio.gather(*users)


async def _consent(link: str) -> None:
    """Act as the user: open the link, press Allow, return to the callback."""
    async with httpx2.AsyncClient(follow_redirects=True, trust_env=False) as browser:
        page = await browser.get(link)
        ticket = re.search(r'name="ticket" value="([^"]+)"', page.text)
        form = re.search(r'action="([^"]+)"', page.text)
        if ticket is None or form is None:
            raise McpAuthProxyError(f"The demo failed: expected a consent page, got HTTP {page.status_code}.")
        target = page.url.join(form[1])
        await browser.post(target, data={"ticket": ticket[1], "decision": "allow"})


async def _call(url: str, tool: str, **arguments: Any) -> str:
    """Call a tool as any MCP client would; return the text of the result."""
    # Importing the SDK takes 0.6 s, so only the commands that use it do.
    from mcp import Client

    async with Client(url) as client:
        result = await client.call_tool(tool, arguments)
    text = " ".join(getattr(block, "text", "") for block in result.content)
    if result.is_error:
        raise McpAuthProxyError(f"The demo failed: {tool} returned {text}")
    return f"{tool}: {text}"


def _settings(folder: Path, resource: str) -> Settings:
    listen = Address("127.0.0.1", 0)
    sock, address = bind(listen)
    # The port must be the same after the restart, because it is part of the redirect URI.
    sock.close()
    return Settings(
        listen=replace(listen, port=address.port),
        public_url=None,
        store=StoreSettings(
            path=folder / "demo.db",
            keys=(KeySource(kind="file", name=str(folder / "demo.key")),),
            default_key=True,
        ),
        authorization=AuthorizationSettings(open_browser="never"),
        servers={"notes": ServerSettings(name="notes", url=resource)},
    )


def _say_nothing(line: str) -> None:
    """Do not announce the key: the demo deletes its store at the end."""
