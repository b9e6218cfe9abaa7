"""Read the forms of our own pages."""

from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request

MAX_FORM = 4096
"""Bytes of a form."""


async def read_form(request: Request, *, limit: int = MAX_FORM) -> dict[str, str]:
    """Return the fields of a form; none if it is too long, incomplete, or has a field twice."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                return {}
    except ClientDisconnect:
        return {}
    fields = parse_qsl(body.decode("ascii", "replace"), keep_blank_values=True)
    return dict(fields) if len(dict(fields)) == len(fields) else {}
