"""``completion``: what a shell needs to complete the commands, options, servers and clients."""

import os
from typing import TYPE_CHECKING

import click

from mcp_auth_proxy.cli.options import examples
from mcp_auth_proxy.cli.terminal import say

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PROGRAM = "mcp-auth-proxy"
VARIABLE = "_MCP_AUTH_PROXY_COMPLETE"
"""Set by the shell when it asks the program for completions."""

SHELLS = ("bash", "zsh", "fish")


@click.command(epilog=examples("completion bash >> ~/.bashrc", "completion fish"))
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, servers and clients.

    For bash and zsh it belongs into ~/.bashrc or ~/.zshrc; for fish, into a file mcp-auth-proxy.fish in
    ~/.config/fish/completions.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, shell
    asking = found(context.find_root().command, {}, PROGRAM, VARIABLE)
    # Not source(): it runs the shell to ask for its version.
    say(*(asking.source_template % asking.source_vars()).strip("\n").split("\n"))


def server_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list["CompletionItem"]:
    """Return the configured servers that begin as the word does. Nothing may be printed, whatever is wrong."""
    from click.shell_completion import CompletionItem

    from mcp_auth_proxy.config import location
    from mcp_auth_proxy.config.load import load
    from mcp_auth_proxy.errors import McpAuthProxyError

    try:
        path = location.find(context.params.get("config_file"), os.environ)
        servers = {} if path is None else load(path, environ=os.environ, secrets_of=()).servers
    except (McpAuthProxyError, OSError):
        return []
    names = [
        name
        for server in servers.values()
        for name in (server.name, *(f"{server.name}@{account}" for account in server.accounts))
    ]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
