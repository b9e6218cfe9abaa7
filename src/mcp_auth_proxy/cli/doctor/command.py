"""The command itself: prints the report, and says by its exit code whether the proxy would be able to authorize."""

import click

from mcp_auth_proxy.cli.doctor.examine import examine
from mcp_auth_proxy.cli.doctor.report import Outcome, as_json, as_text
from mcp_auth_proxy.config.settings import ServerSettings, Settings


async def doctor(settings: Settings, server: ServerSettings, *, as_machine: bool) -> int:
    """Examine one server. Returns 0 where the proxy can authorize, or need not; else 1. Raises ProxyError."""
    report = await examine(settings, server)
    click.echo(as_json(report) if as_machine else as_text(report))
    return 1 if report.outcome is Outcome.REFUSED else 0
