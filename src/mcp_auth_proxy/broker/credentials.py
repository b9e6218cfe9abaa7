"""Read credentials that something else renews, such as a projected service account token: at each use, never cached."""

import asyncio
import re
from pathlib import Path

from mcp_auth_proxy.config.settings import Credential, Secret
from mcp_auth_proxy.errors import AuthorizationError

LARGEST = 64 * 1024
"""Maximum size of a credential file, in bytes."""

_TOKEN = re.compile(r"[\x21-\x7e]+")


async def read(source: Credential, setting: str) -> str:
    """Return the current value of a credential. ``setting`` is the dotted path of its key, for error messages.

    Raises AuthorizationError if the file can't be read or holds no token. The message never repeats the content.
    """
    text = source.value if isinstance(source, Secret) else await asyncio.to_thread(_read_file, source, setting)
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        where = "" if isinstance(source, Secret) else f" (the file {source})"
        raise AuthorizationError(f"{setting}{where} holds no token: one line of printable characters was expected.")
    return token


def _read_file(path: Path, setting: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise AuthorizationError(f"{setting}: the file {path} is too large for a token.")
        return content.decode("ascii")
    except OSError as error:
        raise AuthorizationError(f"{setting}: the file {path} can't be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise AuthorizationError(f"{setting}: the file {path} holds no token: it is not text.") from None
