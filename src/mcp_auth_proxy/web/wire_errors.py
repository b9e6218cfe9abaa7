"""Errors of the wires: what other systems answer with instead of problem details.

The router uses them too, so they need neither the API nor its models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PROBLEM = "application/problem+json"
JSON = "application/json"

COMPLETE_CLIENT = "/api/mcp/client/{id}/complete-oauth"
COMPLETE_TOOL = "/tools/{tool_id}/complete-oauth"

REFUSED_BY_PROVIDER = "authorization-refused"
"""The kind of a problem: the authorization server refused the client or the user, not the code."""

_URN = "urn:mcp-auth-proxy:"
_PROBLEMS = ("/api/v1/", "/api/mcp/", "/v1/customers/")


@dataclass(frozen=True, slots=True, kw_only=True)
class WireError:
    """An error before it has a shape. ``faults`` are those of a body, each with ``loc``, ``msg`` and ``type``."""

    status: int
    kind: str
    detail: str
    event_id: str
    faults: Sequence[Mapping[str, object]] = field(default=())


@dataclass(frozen=True, slots=True)
class Shaped:
    """What is sent: ``document`` is JSON."""

    status: int
    media_type: str
    document: Mapping[str, object]


def client_error(error: WireError) -> Shaped:
    """Return the error of ``COMPLETE_CLIENT``."""
    document = {
        "event_id": error.event_id,
        "type": error.kind,
        "is_bifrost_error": True,
        "status_code": error.status,
        "error": {"type": error.kind, "code": error.kind, "message": error.detail, "param": None},
    }
    return Shaped(error.status, JSON, document)


def tool_error(error: WireError) -> Shaped:
    """Return the error of ``COMPLETE_TOOL``; the faults of a body are a list alone."""
    if error.status == 422 and error.faults:
        return Shaped(422, JSON, {"detail": list(error.faults)})
    status = 401 if error.kind == REFUSED_BY_PROVIDER else error.status
    return Shaped(status, JSON, {"is_success": False, "item_id": None, "detail": error.detail, "error": error.kind})


def refusal(path: str, error: WireError, title: str) -> Shaped | None:
    """Return how a request is refused that did not come as far as the API; None if it was for a page."""
    if _is_at(path, COMPLETE_CLIENT):
        return client_error(error)
    if _is_at(path, COMPLETE_TOOL):
        return tool_error(error)
    if not path.startswith(_PROBLEMS):
        return None
    kind = f"{_URN}{error.kind}"
    return Shaped(error.status, PROBLEM, {"type": kind, "title": title, "status": error.status, "detail": error.detail})


def is_wire(path: bytes) -> bool:
    """Return whether a path is that of a wire whose first segment a server may have too."""
    return path.startswith(b"/v1/customers/") or _is_at(path.decode("latin-1"), COMPLETE_TOOL)


def _is_at(path: str, pattern: str) -> bool:
    return re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path) is not None
