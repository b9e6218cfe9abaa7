"""Open a link of the proxy in the user's browser, if there is a desktop."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Mapping
from typing import Literal

logger = logging.getLogger(__name__)


def should_open(choice: Literal["auto", "always", "never"], *, loopback: bool, environ: Mapping[str, str]) -> bool:
    """Return whether to open a browser: ``auto`` opens one if the proxy is local and a browser can be displayed."""
    if choice != "auto":
        return choice == "always"
    if not loopback or "SSH_CONNECTION" in environ:
        return False
    if environ.get("BROWSER"):
        return True
    if environ.get("CI"):
        return False
    return sys.platform in ("darwin", "win32") or any(name in environ for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def open_link(link: str) -> threading.Thread:
    """Open a link of the proxy in ``$BROWSER`` or the system's browser; no shell sees it (CVE-2025-6514).

    Returns at once, with the thread that starts it. Some browser commands run until the browser is closed. Neither a
    request nor the shutdown may wait for that, so this is a daemon thread instead of asyncio's executor.
    """
    thread = threading.Thread(target=_open, args=(link,), name="browser", daemon=True)
    thread.start()
    return thread


def _open(link: str) -> None:
    try:
        opened = _opened(link)
    except (webbrowser.Error, OSError) as error:
        opened = False
        logger.debug("the browser did not start: %s", error)
    if not opened:
        logger.warning("no browser could be opened (BROWSER=%s); open the link by hand", os.environ.get("BROWSER", ""))


def _opened(link: str) -> bool:
    opener = shutil.which("xdg-open")
    if opener is None or os.environ.get("BROWSER"):
        return webbrowser.open(link)
    # webbrowser does not wait for its exit code, and so never learns that there is no browser.
    quiet = subprocess.DEVNULL
    done = subprocess.run([opener, link], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, check=False)
    return done.returncode == 0
