"""Reload while serving: on SIGHUP, and when a file of the configuration changes."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mcp_auth_proxy.app import Application
from mcp_auth_proxy.config import loops
from mcp_auth_proxy.config.reload import ConfigFile, Reloader
from mcp_auth_proxy.config.settings import Settings

logger = logging.getLogger(__name__)


@asynccontextmanager
async def reloading(
    application: Application, file: ConfigFile | None, *, stop: Callable[[], None]
) -> AsyncIterator[None]:
    """Apply changes of ``file`` to a running application, until the block ends.

    SIGHUP is also sent when the terminal that the proxy was started from is closed; ``stop`` is called then.
    """
    loop = asyncio.get_running_loop()
    # nohup starts the proxy with SIGHUP ignored: it must then outlive its terminal.
    ends_with_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

    async def validate(settings: Settings) -> None:
        await loops.check(settings, application.listening, application.public_url, resolver=application.resolver)

    reloader = None
    if file is not None:
        reloader = Reloader(
            file, application.settings, application.apply, validate=validate, renew_keys=application.renew_keys
        )

    def on_hangup() -> None:
        if ends_with_terminal and not _has_terminal():
            stop()
        elif reloader is not None:
            reloader.request()
        else:
            logger.warning(
                "SIGHUP: there is nothing to reload, because serve was given a URL and no configuration file"
            )

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    watch = loop.create_task(reloader.run()) if reloader is not None else None
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        if watch is not None:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch


def _has_terminal() -> bool:
    """Return whether the process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
