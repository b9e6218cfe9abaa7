"""What an endpoint is (``Operation``), what its handler gets (``Call``) and returns (``Answer``)."""

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import msgspec
from starlette.responses import Response

from mcp_auth_proxy.models import Caller, Role, Scope
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.models import Fault
from mcp_auth_proxy.web.api.problems import Problem

B_co = TypeVar("B_co", covariant=True)
Q_co = TypeVar("Q_co", covariant=True)


class Access(StrEnum):
    """Who may use an endpoint."""

    OPEN = "open"
    """Everybody, without a credential."""
    SELF = "self"
    """Any principal, for its own things; admins for those of others too."""
    ADMIN = "admin"


def is_admin(caller: Caller) -> bool:
    """Return whether a caller may do what is for admins: by its role, and with the credential that it uses."""
    return caller.principal.role is Role.ADMIN and Scope.ADMIN in caller.scopes


@dataclass(slots=True, kw_only=True)
class Call(Generic[B_co, Q_co]):
    """One valid call of an operation."""

    api: ApiContext
    caller: Caller
    body: B_co
    query: Q_co
    path: Mapping[str, str]
    """The parameters in the path, decoded."""
    raw_query: bytes
    if_match: str | None
    address: str
    """Whose request it is, for the audit trail."""
    request_id: str
    operation: "Operation"
    target: str = ""
    """The id of what is changed, for the audit trail; by default the first parameter of the path."""
    server: tuple[str, str] = ("", "")
    """The id and name of the server that the call concerns, for the audit trail."""

    @property
    def is_admin(self) -> bool:
        return is_admin(self.caller)

    def check_match(self, view: msgspec.Struct) -> None:
        """Check If-Match against the resource as it is now. Raises Problem (412)."""
        if self.if_match is None:
            return
        wanted = [each.strip() for each in self.if_match.split(",")]
        if "*" not in wanted and etag_of(view) not in wanted:
            raise Problem(412, "changed", "The resource was changed since: read it again. Its ETag is another one.")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler returns. Without ``content`` the response has no body."""

    content: msgspec.Struct | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    etag: bool = False
    """Whether the response has an ETag, which If-Match can name."""

    def response(self, if_none_match: str | None = None) -> Response:
        """Return the response; 304 if it may have one and the client has it already."""
        headers = {"cache-control": "no-store", **self.headers}
        if self.content is None:
            return Response(status_code=204 if self.status == 200 else self.status, headers=headers)
        if self.etag:
            headers["etag"] = tag = etag_of(self.content)
            if if_none_match is not None and tag in [each.strip() for each in if_none_match.split(",")]:
                return Response(status_code=304, headers=headers)
        return Response(msgspec.json.encode(self.content), self.status, headers, "application/json")


def etag_of(view: msgspec.Struct) -> str:
    """Return the entity tag of a resource (RFC 9110 §8.8.3)."""
    return f'"{hashlib.sha256(msgspec.json.encode(view)).hexdigest()[:32]}"'


Handler = Callable[[Call[Any, Any]], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint: the route, and its entry in the OpenAPI document."""

    method: str
    path: str
    """Below ``/api/v1``; parameters are ``{name}`` and hold no slash."""
    handler: Handler
    action: str = field(kw_only=True)
    """RESOURCE.VERB: its name in the audit trail, and the operationId."""
    access: Access = field(kw_only=True)
    summary: str = field(kw_only=True)
    answers: Mapping[int, type[msgspec.Struct] | None] = field(kw_only=True)
    """The statuses of success, with their bodies."""
    problems: tuple[int, ...] = field(kw_only=True, default=())
    """The statuses of failure besides those that every operation of its kind has."""
    body: type[msgspec.Struct] | None = field(kw_only=True, default=None)
    query: type[msgspec.Struct] | None = field(kw_only=True, default=None)
    etag: bool = field(kw_only=True, default=False)
    """Whether the answer has an ETag (GET), or If-Match is heeded (others)."""
    starts_flow: bool = field(kw_only=True, default=False)
    more_faults: Callable[[Call[Any, Any], Mapping[str, Any]], Iterable[Fault]] | None = field(
        kw_only=True, default=None
    )
    """What the handler's rules find in a body that has faults already, so that one answer names all."""

    @property
    def is_safe(self) -> bool:
        """Whether it changes nothing (RFC 9110 §9.2.1); anything else leaves an audit event."""
        return self.method == "GET"
