"""Plain files with tokens that other programs have written: where they are, and what is in them."""

import json
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

MAX_FILE = 1024 * 1024
"""Bytes of a plain file that is read."""


def mcp_use_tokens(folder: Path, server_url: str) -> Path:
    """Return the file in which mcp-use keeps the tokens for a server: ``{netloc}_{path}.json``."""
    parts = urlsplit(server_url)
    return folder / f"{parts.netloc}_{parts.path.replace('/', '_')}.json"


def mcp_use_registration(folder: Path, server_url: str) -> Path:
    """Return the file in which mcp-use keeps the client for a server."""
    name = mcp_use_tokens(folder, server_url).name.removesuffix(".json")
    return folder / "registrations" / f"{name}_registration.json"


def read_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; an empty one if there is no such file or, with a warning, nothing usable."""
    try:
        values = json.loads(_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is not used: it can't be read (%s)", path, type(error).__name__)
        return {}
    return values if isinstance(values, Mapping) else {}


def _text(path: Path) -> str:
    """Return the text of a file. Raises OSError, and ValueError for one that is too large, no text, or a pipe."""
    # Whoever made the folder may have put a pipe there, which nobody writes to, or a link to an endless device.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a file")
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError("it is too large")
    return content.decode()
