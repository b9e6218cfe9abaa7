"""The API as an ASGI application: who calls, which operation, is it valid, and what comes of it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mcp_auth_proxy import models
from mcp_auth_proxy.errors import McpAuthProxyError, StoreError
from mcp_auth_proxy.models import Caller
from mcp_auth_proxy.web.api import (
    audit,
    discovery,
    events,
    flows,
    grants,
    keys,
    me,
    oauth_clients,
    openapi,
    principals,
    servers,
)
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.credentials import caller_of
from mcp_auth_proxy.web.api.limits import Limits
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation, is_admin
from mcp_auth_proxy.web.api.problems import Problem, forbidden, not_found, problem_of, too_many
from mcp_auth_proxy.web.api.validation import read_body, read_query

logger = logging.getLogger(__name__)

PREFIX = "/api/v1"

MAX_BODY = 256 * 1024
"""Bytes of a body."""


def operations() -> tuple[Operation, ...]:
    """Return all endpoints, in the order of the documentation."""
    resources = (me, servers, discovery, flows, grants, oauth_clients, principals, keys, events)
    known = tuple(operation for resource in resources for operation in resource.OPERATIONS)
    return openapi.described(known, PREFIX)


class Api:
    """The application below ``/api/v1``, or that of other operations. Belongs to one event loop."""

    def __init__(
        self,
        context: ApiContext,
        known: Sequence[Operation] | None = None,
        *,
        prefix: str = PREFIX,
        limits: Limits | None = None,
        problem_response: Callable[[Problem, str], Response] = Problem.response,
    ) -> None:
        """``known``: the operations, below ``prefix``. ``limits``: those of another application, to share them.

        ``problem_response`` makes the response of a problem and the id of its request.
        """
        self.context = context
        self.limits = limits if limits is not None else Limits(context.clock)
        self._routes = Routes(operations() if known is None else known)
        self._prefix = prefix
        self._problem_response = problem_response

    def has(self, path: str) -> bool:
        """Return whether there is an operation at a path, with whatever method."""
        return bool(self._routes.at(path.removeprefix(self._prefix)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        request_id = audit.request_id_of(request.headers.raw)
        try:
            answer = await self._answer(request, request_id)
            response = answer.response(request.headers.get("if-none-match") if request.method == "GET" else None)
        except Problem as problem:
            response = self._problem_response(problem, request_id)
        except McpAuthProxyError as error:
            if isinstance(error, StoreError):
                logger.error("%s", error)
            response = self._problem_response(problem_of(error), request_id)
        response.headers["x-request-id"] = request_id
        response.headers["x-content-type-options"] = "nosniff"
        return response

    async def _answer(self, request: Request, request_id: str) -> Answer:
        path = request.scope["path"].removeprefix(self._prefix)
        # HEAD is a GET of which the server sends no body.
        found = self._routes.find("GET" if request.method == "HEAD" else request.method, path)
        operation = found[0] if found is not None else None
        if operation is not None and operation.access is Access.OPEN:
            caller = models.Caller(principal=models.Principal(id="", name=""), credential="", scopes=frozenset())
        else:
            caller = await caller_of(request, self.context)
            if seconds := self.limits.calls.take(caller.principal.id):
                raise too_many("Too many requests of this principal.", seconds)
        if found is None:
            raise self._routes.problem(path)
        return await self._perform(request, request_id, caller, *found)

    async def _perform(
        self, request: Request, request_id: str, caller: Caller, operation: Operation, path: Mapping[str, str]
    ) -> Answer:
        call: Call[Any, Any] = Call(
            api=self.context,
            caller=caller,
            body=None,
            query=None,
            path=path,
            raw_query=request.scope["query_string"],
            if_match=request.headers.get("if-match"),
            address=request.client.host if request.client is not None else "",
            request_id=request_id,
            operation=operation,
        )
        if operation.access is not Access.OPEN:
            await self._check_access(call)
        if operation.body is not None:
            body = await _json_body(request)
            if body and operation.access is not Access.OPEN:
                # A body may take minutes, in which its sender was disabled, or is an admin no more (T74).
                call.caller = await caller_of(request, self.context)
                await self._check_access(call)
            more = operation.more_faults
            call.body = read_body(body, operation.body, (lambda value: ()) if more is None else partial(more, call))
        if operation.query is not None:
            call.query = read_query(call.raw_query, operation.query)
        if operation.starts_flow and (seconds := self.limits.flows.take(caller.principal.id)):
            raise too_many("Too many authorizations were started by this principal.", seconds)
        return await perform(call)

    async def _check_access(self, call: Call[Any, Any]) -> None:
        """Check that the caller may use the operation. Raises Problem (403)."""
        admin, caller = is_admin(call.caller), call.caller
        if not admin and models.Scope.SELF not in caller.scopes:
            problem = forbidden("This credential is not for the API: it needs the scope self or admin.")
        elif not admin and call.operation.access is Access.ADMIN:
            problem = forbidden("This is for admins, with a credential that has the scope admin.")
        else:
            return
        if not call.operation.is_safe:
            await audit.record(call, problem.kind)
        raise problem


async def perform(call: Call[Any, Any]) -> Answer:
    """Run the handler of a valid call, and record what came of it. Raises Problem and McpAuthProxyError."""
    if call.operation.is_safe:
        return await call.operation.handler(call)
    try:
        answer = await call.operation.handler(call)
    except Problem as problem:
        await audit.record(call, problem.kind)
        raise
    except McpAuthProxyError as error:
        await audit.record(call, problem_of(error).kind)
        raise
    await audit.record(call, audit.OK)
    return answer


class Routes:
    """Operations by method and path."""

    def __init__(self, known: Sequence[Operation]) -> None:
        self._known = [(tuple(operation.path.split("/")), operation) for operation in known]

    def find(self, method: str, path: str) -> tuple[Operation, Mapping[str, str]] | None:
        """Return the operation, and the parameters in the path; None if there is no such operation."""
        for operation, parameters in self.at(path):
            if operation.method == method:
                return operation, parameters
        return None

    def problem(self, path: str) -> Problem:
        """Return what is wrong with a path or method that has no operation (404, 405)."""
        methods = sorted({operation.method for operation, _ in self.at(path)})
        if path == openapi.START:
            methods = ["GET", "POST"]
        if not methods:
            return not_found("endpoint")
        allowed = [*methods, *(["HEAD"] if "GET" in methods else [])]
        return Problem(
            405, "method-not-allowed", f"Possible here: {', '.join(methods)}.", headers={"allow": ", ".join(allowed)}
        )

    def at(self, path: str) -> list[tuple[Operation, Mapping[str, str]]]:
        """Return the operations at a path, each with the parameters in the path."""
        parts = path.split("/")
        found: list[tuple[Operation, Mapping[str, str]]] = []
        for pattern, operation in self._known:
            if len(pattern) == len(parts) and all(map(_fits, pattern, parts)):
                pairs = zip(pattern, parts, strict=True)
                found.append((operation, {name[1:-1]: value for name, value in pairs if name.startswith("{")}))
        return found


def _fits(pattern: str, part: str) -> bool:
    return bool(part) if pattern.startswith("{") else pattern == part


async def _json_body(request: Request) -> bytes:
    """Return the body. Raises Problem (413, 415) and ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json":
        raise Problem(415, "unsupported-media-type", "The body must be application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Problem(413, "too-large", f"The body is over {MAX_BODY // 1024} KiB.")
    if body and not kind:
        raise Problem(415, "unsupported-media-type", "The body must be application/json, and say so in Content-Type.")
    return bytes(body)
