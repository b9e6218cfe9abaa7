"""``complete`` and ``verify`` of a server: try it as an MCP client would, or finish a headless authorization."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationDenied,
    CallbackRefused,
    IssuerMissing,
    StateRefused,
    TokenRefused,
    UpstreamTimeout,
)
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Flow, Tool
from mcp_auth_proxy.web.api.models import Body, Fault, View
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.problems import Problem, invalid, invalid_field
from mcp_auth_proxy.web.api.reach import AccountName, answered, own_account, usable_server
from mcp_auth_proxy.web.wire_errors import REFUSED_BY_PROVIDER


class Completion(Body):
    """Nothing, to try the server; or the code of a headless authorization."""

    account: AccountName = DEFAULT_ACCOUNT
    code: Annotated[str, Meta(min_length=1, max_length=4096, pattern="^[ -~]*$")] | None = None
    state: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    iss: Annotated[str, Meta(max_length=2000)] | None = None


class Trial(Body):
    """Which account to try a server with."""

    account: AccountName = DEFAULT_ACCOUNT


class ToolView(View):
    """A tool that a server offers."""

    name: str
    description: str


class CompletionView(View):
    """What came of a trial, or of a code. After a code there are no tools: ask for them with another call."""

    status: Literal["connected"]
    message: str
    tools: list[ToolView]


async def complete(call: Call[Completion, None]) -> Answer:
    """Try the server as an MCP client would; or finish a headless authorization with its code."""
    server, body = usable_server(call), call.body
    if body.code is None and body.state is None and body.iss is None:
        tools = await _tools(call, server, body.account)
        word = "tool" if len(tools) == 1 else "tools"
        return Answer(_completed(f"{server.name} is connected, and has {len(tools)} {word}.", tools))
    if body.code is None or body.state is None:
        absent = [name for name, value in (("code", body.code), ("state", body.state)) if value is None]
        raise invalid([Fault(loc=["body", name], msg="The field is required.", type="missing") for name in absent])
    await finish(call, server, body.code, body.state, body.iss)
    return Answer(_completed(f"{server.name} is connected.", []))


async def finish(call: Call[Any, Any], server: ServerSettings, code: str, state: str, iss: str | None) -> Flow:
    """Complete a headless flow with its code. Raises Problem, AuthorizationError and StoreError."""
    account = own_account(call, server, DEFAULT_ACCOUNT)
    try:
        flow = await call.api.broker.complete_headless(account, code=code, state=state, iss=iss)
    except StateRefused as refused:
        raise invalid_field(("body", "state"), str(refused), "value_error.csrf") from None
    except IssuerMissing as missing:
        raise invalid_field(("body", "iss"), str(missing), "missing") from None
    except (CallbackRefused, TokenRefused, AuthorizationDenied) as refused:
        of_code = isinstance(refused, CallbackRefused) or refused.error in ("invalid_grant", "")
        raise Problem(400, "code-refused" if of_code else REFUSED_BY_PROVIDER, str(refused)) from None
    await call.api.made.connected(server)
    return flow


async def verify(call: Call[Trial, None]) -> Answer:
    """Try the server as an MCP client would."""
    server = usable_server(call)
    tools = await _tools(call, server, call.body.account)
    return Answer(_completed(f"{server.name} answers.", tools))


async def _tools(call: Call[Any, Any], server: ServerSettings, name: str) -> list[Tool]:
    account = server.account(call.caller.principal, name)
    with answered(server.name):
        try:
            tools = await call.api.list_tools(server, account)
        except UpstreamTimeout as error:
            raise Problem(502, "upstream-failed", f"{server.name} can't be used: {error}") from None
    await call.api.made.connected(server)
    return tools


def _completed(message: str, tools: list[Tool]) -> CompletionView:
    views = [ToolView(name=tool.name, description=tool.description) for tool in tools]
    return CompletionView(status="connected", message=message, tools=views)


OPERATIONS = (
    Operation(
        "POST",
        "/servers/{id}/complete",
        complete,
        action="servers.complete",
        access=Access.SELF,
        summary="Try a server with initialize and tools/list; or finish a headless authorization with its code",
        body=Completion,
        answers={200: CompletionView},
        problems=(502, 504),
    ),
    Operation(
        "POST",
        "/servers/{id}/verify",
        verify,
        action="servers.verify",
        access=Access.SELF,
        summary="Try a server with initialize and tools/list",
        body=Trial,
        answers={200: CompletionView},
        problems=(502, 504),
    ),
)
