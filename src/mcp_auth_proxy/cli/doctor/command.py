"""The command: prints the report; the exit code says whether the proxy can authorize."""

from mcp_auth_proxy.cli.doctor.examine import examine
from mcp_auth_proxy.cli.doctor.report import Outcome, as_document, as_lines
from mcp_auth_proxy.cli.terminal import say, say_json, waiting
from mcp_auth_proxy.config.settings import ServerSettings, Settings


async def doctor(settings: Settings, server: ServerSettings, *, as_machine: bool) -> int:
    """Examine one server. Return 0 if the proxy can authorize or does not need to, else 1. Raises McpAuthProxyError."""
    with waiting("Running discovery"):
        report = await examine(settings, server)
    if as_machine:
        say_json(as_document(report))
    else:
        say(*as_lines(report))
    return 1 if report.outcome is Outcome.REFUSED else 0
