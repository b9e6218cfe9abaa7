"""What goes wrong with a call, as problem details (RFC 9457)."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil

import msgspec
from starlette.responses import Response

from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    CallbackRefused,
    CallerRefused,
    ClientNotActive,
    McpAuthProxyError,
    StoreError,
    TooManyAccounts,
    UpstreamError,
    UpstreamPoolTimeout,
    UpstreamTimeout,
)
from mcp_auth_proxy.web.api.models import Fault, View

URN = "urn:mcp-auth-proxy:"
MEDIA_TYPE = "application/problem+json"

CHALLENGE = 'Bearer realm="mcp-auth-proxy"'


class ProblemView(View, rename={"kind": "type"}, omit_defaults=True):
    """Problem details. ``type`` is ``urn:mcp-auth-proxy:`` and the kind of the problem."""

    kind: str
    title: str
    status: int
    detail: str = ""
    errors: list[Fault] = msgspec.field(default_factory=list)
    existing_id: str | None = None
    request_id: str = ""


class Problem(Exception):
    """A call that is answered with an error."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[Fault] = (),
        existing_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``kind`` is the last part of ``type``, ``detail`` one or two sentences for the user."""
        self.status = status
        self.kind = kind
        self.detail = detail
        self.errors = list(errors)
        self.existing_id = existing_id
        self.headers = dict(headers or {})
        super().__init__(detail)

    def response(self, request_id: str) -> Response:
        """Return the response."""
        view = ProblemView(
            kind=f"{URN}{self.kind}",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            errors=self.errors,
            existing_id=self.existing_id,
            request_id=request_id,
        )
        return Response(msgspec.json.encode(view), self.status, {**self.headers, "content-type": MEDIA_TYPE})


def invalid(errors: Sequence[Fault]) -> Problem:
    """Return the problem of a request with these faults (422)."""
    named = "; ".join(f"{'.'.join(map(str, fault.loc))}: {fault.msg}" for fault in errors[:3])
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return Problem(422, "invalid", f"The request is not valid. {named}{more}", errors=errors)


def invalid_field(loc: Sequence[str | int], msg: str, kind: str = "value_error") -> Problem:
    """Return the problem of a request with one fault (422). ``loc`` begins with ``body`` or ``query``."""
    return invalid([Fault(loc=list(loc), msg=msg, type=kind)])


def not_found(what: str) -> Problem:
    """Return the problem of something that is not there, or that the caller may not know of (404)."""
    return Problem(404, "not-found", f"There is no such {what}.")


def forbidden(detail: str) -> Problem:
    """Return the problem of a caller who may not do that (403)."""
    return Problem(403, "forbidden", detail)


def too_many(detail: str, seconds: float) -> Problem:
    """Return the problem of a caller who has to wait (429)."""
    return Problem(429, "too-many-requests", detail, headers=retry_after(seconds))


def retry_after(seconds: float | None) -> dict[str, str]:
    """Return the field that says when to try again, in whole seconds; none if nothing is known about that."""
    return {} if seconds is None else {"retry-after": str(max(1, ceil(seconds)))}


_CALLER_KINDS = {400: "several-credentials", 401: "unauthenticated", 403: "forbidden", 503: "unavailable"}


def problem_of(error: McpAuthProxyError) -> Problem:
    """Return how an error of the layers below is answered, unless a handler knows better."""
    detail = str(error)
    match error:
        case CallerRefused(status=status, retry_after=seconds):
            headers = {"www-authenticate": CHALLENGE} if status == 401 else retry_after(seconds)
            return Problem(status, _CALLER_KINDS.get(status, "forbidden"), detail, headers=headers)
        case ClientNotActive(status=status):
            return Problem(409, f"client-{status}", detail)
        case TooManyAccounts():
            return Problem(409, "too-many-accounts", detail)
        case AuthorizationServerUnavailable(retry_after=seconds):
            return Problem(503, "authorization-server-unavailable", detail, headers=retry_after(seconds))
        case AuthorizationError():
            return Problem(502, "authorization-failed", detail)
        case CallbackRefused(status=status):
            return Problem(status, "callback-refused", detail)
        case UpstreamTimeout():
            return Problem(504, "upstream-timeout", detail)
        case UpstreamPoolTimeout():
            return Problem(503, "upstream-busy", detail, headers=retry_after(1))
        case UpstreamError():
            return Problem(502, "upstream-failed", detail)
        case StoreError():
            return Problem(503, "store-unavailable", detail, headers=retry_after(1))
        case _:
            return Problem(500, "failed", detail)
