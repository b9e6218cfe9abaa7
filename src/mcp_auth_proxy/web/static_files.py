"""``/static/…``: the style and the scripts of our own pages, which their policy allows by origin alone."""

import functools
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"

_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_FILES = frozenset(path.name for path in FOLDER.iterdir() if path.suffix in _TYPES)
_YEAR = 31_536_000


@functools.cache
def static_url(name: str) -> str:
    """Return the path of a file, with what it is in the query: a browser keeps it until it is another one."""
    return f"/static/{name}?v={_version(name)}"


@functools.cache
def _version(name: str) -> str:
    return hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()[:12]


async def static_file(request: Request) -> Response | None:
    """Return a file; None if there is none of this name."""
    name = request.path_params["name"]
    if name not in _FILES:
        return None
    fresh = request.query_params.get("v") == _version(name)
    headers = {
        "cache-control": f"public, max-age={_YEAR}, immutable" if fresh else "no-cache",
        "x-content-type-options": "nosniff",
    }
    return Response((FOLDER / name).read_bytes(), headers=headers, media_type=_TYPES[Path(name).suffix])
