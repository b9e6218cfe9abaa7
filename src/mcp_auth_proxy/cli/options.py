"""What the commands share: options, help texts, where the settings come from, the event loop."""

import logging
import os
import sys
from collections.abc import Callable, Collection, Coroutine
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcp_auth_proxy.cli.terminal import complain
from mcp_auth_proxy.config import location
from mcp_auth_proxy.errors import ConfigError, ConfigurationError
from mcp_auth_proxy.observability import logs

if TYPE_CHECKING:
    from mcp_auth_proxy.config.settings import Settings

logger = logging.getLogger(__name__)

EXAMPLE = "https://mcp.example.com/mcp"
LEVEL_VARIABLE = "MCP_AUTH_PROXY_LOG_LEVEL"
_TAKE_URL = ("serve", "login", "logout", "status", "doctor", "stdio")
"""The commands that need no configuration if they are given a URL."""

config_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    shell_complete=lambda context, parameter, incomplete: _any_file(incomplete),
    help="Configuration file. Default: $MCP_AUTH_PROXY_CONFIG, ./mcp-auth-proxy.yaml, the user's config folder.",
)


def _any_file(incomplete: str) -> list[Any]:
    """Let the shell complete the name of a file."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def examples(*lines: str) -> str:
    """Return the end of a help text, which click must not wrap."""
    return "\n".join(
        ["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  mcp-auth-proxy {line}" for line in lines)]
    )


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --log-level and --log-format to a command, and configure logging before it runs."""

    @click.option(
        "--log-level", type=click.Choice([*logs.LEVELS]), default=None, help=f"Default: ${LEVEL_VARIABLE}, else info."
    )
    @click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Default: text.")
    @wraps(command)
    def configured(*args: Any, log_level: str | None, log_format: logs.Format, **kwargs: Any) -> Any:
        level = log_level or os.environ.get(LEVEL_VARIABLE, "info").lower()
        if level not in logs.LEVELS:
            raise click.UsageError(f"${LEVEL_VARIABLE} is {level!r}; it must be one of {', '.join(logs.LEVELS)}.")
        logs.configure(level, log_format, access_log=kwargs.pop("access_log", False))
        return command(*args, **kwargs)

    return configured


def passed_log_options() -> list[str]:
    """Return --log-level and --log-format of the command that runs, for a process that it starts."""
    given = click.get_current_context().params
    return [
        word
        for name, option in (("log_level", "--log-level"), ("log_format", "--log-format"))
        if given.get(name)
        for word in (option, given[name])
    ]


def account_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --as, and --url with --api-key, to a command about accounts; it gets ``owner`` and ``remote``.

    ``remote`` is the URL of a proxy that runs elsewhere and where its key is, or None.
    """

    @click.option(
        "--as",
        "owner",
        metavar="NAME",
        help="Whose account it is, if callers are identified. Default: shared, or everybody's.",
    )
    @click.option(
        "--url", metavar="URL", help="Use the API of the proxy there. Default: the configuration and store here."
    )
    @click.option(
        "--api-key", metavar="SOURCE", help="Where the key for --url is: env:NAME or file:PATH. Default: none."
    )
    @wraps(command)
    def checked(*args: Any, url: str | None, api_key: str | None, **kwargs: Any) -> Any:
        if (url is None) != (api_key is None):
            raise click.UsageError("--url and --api-key are needed together: --url URL --api-key env:NAME.")
        if url is not None and kwargs.get("config_file") is not None:
            raise click.UsageError("Give --url or --config, not both.")
        return command(*args, remote=None if url is None else (url, api_key), **kwargs)

    return checked


def duration_option(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """Return the seconds of an option such as ``10m``. Raises BadParameter."""
    from mcp_auth_proxy.config import values

    try:
        return None if text is None else values.duration(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", ctx=context, param=option) from None


def settings_from(
    config_file: str | None,
    url: str | None = None,
    *,
    secrets_of: Collection[str] | None = None,
) -> "Settings":
    """Return the settings of the configuration file, or those for one URL. Raises ConfigurationError.

    Not for ``serve``, which listens. ``secrets_of``: the servers whose secrets are needed, None for all.
    """
    from mcp_auth_proxy.config import load as config

    if url is not None:
        refuse_both(config_file)
        return config.single(url, environ=os.environ)
    place = config_place(config_file)
    settings = config.load(place.path, environ=os.environ, secrets_of=secrets_of, programs=place.is_chosen)
    name_file(place.path)
    return settings


def refuse_both(config_file: str | None) -> None:
    """Raise UsageError if there is a configuration file beside a URL."""
    if config_file is not None:
        raise click.UsageError("Give a URL or --config, not both.")


def name_file(path: Path) -> None:
    """Say on stderr which configuration file is used; as a log line if lines there must be JSON."""
    if click.get_current_context().params.get("log_format") == "json":
        logger.info("configuration: %s", path)
    else:
        complain(f"configuration: {path}")


def config_path(config_file: str | None) -> Path:
    """Return the configuration file to read. Raises ConfigurationError if there is none."""
    return config_place(config_file).path


def config_place(config_file: str | None) -> location.Place:
    """Return the configuration file to read, and whether it is chosen. Raises ConfigurationError if there is none."""
    place = location.find_place(config_file, os.environ)
    if place is not None:
        return place
    ways = "Use --config FILE, create mcp-auth-proxy.yaml in this folder"
    command = click.get_current_context().info_name
    last = (
        "set $MCP_AUTH_PROXY_CONFIG."
        if command not in _TAKE_URL
        else f"give the URL of a server: mcp-auth-proxy {command} {EXAMPLE}"
    )
    raise ConfigurationError([ConfigError("", f"No configuration was found. {ways}, or {last}")])


def run(work: Coroutine[Any, Any, int]) -> None:
    """Run the coroutine of a command on uvloop, and exit with its result."""
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(work)
    sys.exit(code)
