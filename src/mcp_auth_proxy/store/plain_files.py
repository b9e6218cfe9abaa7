"""Plain files with tokens that other programs have written: where they are, and what is in them."""

import json
import logging
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
        if path.stat().st_size > MAX_FILE:
            raise ValueError("it is too large")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is not used: it can't be read (%s)", path, type(error).__name__)
        return {}
    return values if isinstance(values, Mapping) else {}
