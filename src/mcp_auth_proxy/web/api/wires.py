"""The wires: calls of other systems, translated to the operations of the API.

Clients that were written for Windmill (discover), Tetrate (OAuth clients of a project), Bifrost (complete) and SELISE
Blocks (complete with a code) work unchanged. Nothing here has logic of its own: who may call, what is valid, limits and
audit events are those of the operation that a call is translated to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

import msgspec
from msgspec import Meta
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mcp_auth_proxy.web import wire_errors
from mcp_auth_proxy.web.api import completion, discovery, oauth_clients
from mcp_auth_proxy.web.api.application import Api
from mcp_auth_proxy.web.api.models import Body, View
from mcp_auth_proxy.web.api.oauth_clients import NewOAuthClient, OAuthClientChange, OAuthClientList, OAuthClientView
from mcp_auth_proxy.web.api.operations import Answer, Call, Operation
from mcp_auth_proxy.web.api.pages import PageInfo
from mcp_auth_proxy.web.api.problems import Problem, not_found
from mcp_auth_proxy.web.api.validation import read_body
from mcp_auth_proxy.web.wire_errors import COMPLETE_CLIENT, COMPLETE_TOOL, Shaped, WireError

DISCOVER = "/api/mcp/oauth/discover"
CLIENTS = "/v1/customers/{customer_id}/projects/{project_id}/mcp-oauth-clients"

MAX_QUERY = 16 * 1024
"""Characters of a ``code`` that is a whole callback query."""


class Wires:
    """The application of all wires; it belongs to an ``Api`` and shares its limits."""

    def __init__(self, api: Api) -> None:
        self._apis = [
            Api(api.context, wire.operations, prefix="", limits=api.limits, problem_response=wire.problem_response)
            for wire in WIRES
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for a path of ``WIRES``; the site has no others for it."""
        await next(api for api in self._apis if api.has(scope["path"]))(scope, receive, send)


# OAuth clients of a customer's project


class WireClient(NewOAuthClient):
    """A new client. The body may repeat where it is."""

    customer_id: str | None = None
    project_id: str | None = None


class WireClientChange(OAuthClientChange):
    """The change of a client. The body may repeat which one it is."""

    id: str | None = None
    customer_id: str | None = None
    project_id: str | None = None


class WireClientList(View):
    """Clients, oldest first."""

    clients: list[OAuthClientView]
    page: PageInfo


async def list_clients(call: Call[Any, Any]) -> Answer:
    """Return the clients of a project."""
    _enter_project(call)
    found = (await oauth_clients.list_clients(call)).content
    assert isinstance(found, OAuthClientList)
    return Answer(WireClientList(clients=found.items, page=found.page))


async def create_client(call: Call[Any, Any]) -> Answer:
    """Store a new client in a project."""
    place = CLIENTS.format(**call.path)
    _enter_project(call)
    answer = await oauth_clients.create_client(call)
    return replace(answer, headers={**answer.headers, "location": f"{place}/{call.target}"})


async def get_client(call: Call[Any, Any]) -> Answer:
    """Return a client of a project."""
    _enter_project(call)
    return await oauth_clients.get_client(call)


async def change_client(call: Call[Any, Any]) -> Answer:
    """Change a client of a project."""
    _enter_project(call)
    return await oauth_clients.change_client(call)


async def delete_client(call: Call[Any, Any]) -> Answer:
    """Revoke a client of a project and delete it."""
    _enter_project(call)
    return await oauth_clients.delete_client(call)


def _enter_project(call: Call[Any, Any]) -> None:
    """Translate the path of a call to that of the API. Raises Problem (404) for another customer or project."""
    own = {
        "customer_id": call.api.settings().admin.customer_id,
        "project_id": call.caller.principal.project_id,
    }
    for name, value in own.items():
        if call.path[name] != value or (getattr(call.body, name, None) or value) != value:
            raise not_found("customer or project")
    call.path = {name: value for name, value in call.path.items() if name not in own}
    if (getattr(call.body, "id", None) or call.path.get("id")) != call.path.get("id"):
        raise not_found("OAuth client")


# Completion


class Success(View):
    """What came of a trial."""

    status: Literal["success"]
    message: str


class WireCode(Body):
    """The code of a headless authorization, or the whole query that its callback had."""

    code: Annotated[str, Meta(min_length=1, max_length=MAX_QUERY)]
    state: str
    project_key: str


class WireResult(View):
    """What came of a code."""

    is_success: bool
    item_id: str | None
    detail: str
    error: str | None


async def complete_client(call: Call[Any, Any]) -> Answer:
    """Try a server as an MCP client would."""
    call.body = completion.Completion()
    done = (await completion.complete(call)).content
    assert isinstance(done, completion.CompletionView)
    return Answer(Success(status="success", message=done.message))


async def complete_tool(call: Call[Any, Any]) -> Answer:
    """Finish a headless authorization with its code."""
    given, tool = call.body, call.path["tool_id"]
    call.path = {"id": tool}
    if given.project_key != call.caller.principal.project_id:
        raise not_found("project")
    call.body = read_body(msgspec.json.encode({"state": given.state, **_code(given.code)}), completion.Completion)
    done = (await completion.complete(call)).content
    assert isinstance(done, completion.CompletionView)
    return Answer(WireResult(is_success=True, item_id=tool, detail=done.message, error=None))


def _code(text: str) -> dict[str, str]:
    """Return the code; the ``iss`` too if it is a whole callback query: the wire has no field for it (RFC 9207)."""
    query = parse_qs(text.removeprefix("?"))
    if "code" not in query:
        return {"code": text}
    return {name: query[name][0] for name in ("code", "iss") if name in query}


# The table


@dataclass(frozen=True, slots=True)
class Wire:
    """Operations whose errors have one shape."""

    operations: tuple[Operation, ...]
    problem_response: Callable[[Problem, str], Response] = Problem.response


def _shaped_by(shape: Callable[[WireError], Shaped]) -> Callable[[Problem, str], Response]:
    def response(problem: Problem, request_id: str) -> Response:
        faults = [msgspec.to_builtins(fault) for fault in problem.errors]
        error = WireError(
            status=problem.status, kind=problem.kind, detail=problem.detail, event_id=request_id, faults=faults
        )
        shaped = shape(error)
        headers = {**problem.headers, "cache-control": "no-store"}
        return Response(msgspec.json.encode(shaped.document), shaped.status, headers, shaped.media_type)

    return response


def _as(wired: Operation, path: str, handler: Callable[[Call[Any, Any]], Any], **changes: Any) -> Operation:
    """Return an operation of the API at the path of a wire."""
    return replace(wired, path=path, handler=handler, **changes)


def _operation(known: Sequence[Operation], action: str) -> Operation:
    return next(operation for operation in known if operation.action == action)


def _of_clients() -> tuple[Operation, ...]:
    known, one = oauth_clients.OPERATIONS, f"{CLIENTS}/{{id}}"
    return (
        _as(_operation(known, "oauth-clients.list"), CLIENTS, list_clients, answers={200: WireClientList}),
        _as(_operation(known, "oauth-clients.create"), CLIENTS, create_client, body=WireClient),
        _as(_operation(known, "oauth-clients.get"), one, get_client),
        _as(_operation(known, "oauth-clients.change"), one, change_client, body=WireClientChange),
        _as(_operation(known, "oauth-clients.delete"), one, delete_client),
    )


_COMPLETE = _operation(completion.OPERATIONS, "servers.complete")

WIRES = (
    Wire((_as(_operation(discovery.OPERATIONS, "servers.discover"), DISCOVER, discovery.discover),)),
    Wire(_of_clients()),
    Wire(
        (_as(_COMPLETE, COMPLETE_CLIENT, complete_client, body=None, answers={200: Success}),),
        _shaped_by(wire_errors.client_error),
    ),
    Wire(
        (_as(_COMPLETE, COMPLETE_TOOL, complete_tool, body=WireCode, answers={200: WireResult}),),
        _shaped_by(wire_errors.tool_error),
    ),
)
