"""``/flows``: authorizations that somebody asks for."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from mcp_auth_proxy.broker import FlowRequest, FlowState, PendingAuthorization
from mcp_auth_proxy.broker.client_registration import redirect_uri
from mcp_auth_proxy.broker.requested_flows import allowed_return_origin, mode_of, notice, state_of
from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import RedirectRefused
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, Flow, FlowMode, GrantType
from mcp_auth_proxy.web.api import completion
from mcp_auth_proxy.web.api.models import Body, Check, Fault, View, moment
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.problems import Problem, invalid, invalid_field, not_found
from mcp_auth_proxy.web.api.reach import (
    AccountName,
    answered,
    own_account,
    owns,
    server_id_and_name,
    usable_server,
)

MAX_SCOPES = 100

NO_AUTHORIZATION = "no-authorization"
"""The kind of a problem: the server asks for none."""


class FlowView(View):
    """An authorization. What there is nothing of, is null."""

    id: str
    server: str
    server_name: str
    account: str
    status: Literal["pending", "connected", "failed", "expired", "cancelled"]
    reason: str | None
    mode: Literal["browser", "headless", "device"]
    connect_url: Annotated[
        str | None, Meta(description="The link that the user opens; null if the code goes to a program's redirect_uri.")
    ]
    authorization_url: Annotated[str | None, Meta(description="Mode headless: where the user authorizes.")]
    notice: Annotated[str | None, Meta(description="Mode headless: what the user has to know before.")]
    user_code: Annotated[str | None, Meta(description="Mode device: what the user enters at verification_uri.")]
    verification_uri: str | None
    scopes: list[str]
    return_origin: str | None
    created_at: datetime
    expires_at: datetime


class NewFlow(Body):
    """An authorization to begin, or to return if it is under way."""

    account: AccountName = DEFAULT_ACCOUNT
    scopes: Annotated[list[Annotated[str, Check(values.scope)]], Meta(max_length=MAX_SCOPES)] | None = None
    mode: Literal["browser", "headless", "device"] | None = None
    redirect_uri: Annotated[str, Check(values.any_url)] | None = None
    return_origin: Annotated[str, Check(values.allowed_origin)] | None = None


async def flow_view(call: Call[Any, Any], flow: Flow) -> FlowView:
    """Return a flow as its principal sees it. Raises AuthorizationError and StoreError."""
    api, account = call.api, flow.key.account
    state = state_of(flow, api.clock())
    pending, device, mode = state is FlowState.PENDING, flow.device, mode_of(flow)
    server = api.servers.get(account.server)
    headless = pending and mode is FlowMode.HEADLESS
    return FlowView(
        id=flow.id,
        server=server.server_id if server is not None else account.server,
        server_name=account.server,
        account=account.name,
        status=state.value,
        reason=flow.reason or None,
        mode=mode.value,
        connect_url=api.broker.link(flow) if pending and not flow.ends_elsewhere else None,
        authorization_url=await api.broker.authorization_url(flow) if headless else None,
        notice=notice(flow) if headless else None,
        user_code=device.user_code if pending and device is not None else None,
        verification_uri=device.verification_uri if pending and device is not None else None,
        scopes=list(flow.scopes),
        return_origin=flow.return_origin,
        created_at=moment(flow.created_at),
        expires_at=moment(flow.expires_at),
    )


async def create_flow(call: Call[NewFlow, None]) -> Answer:
    """Begin an authorization, or return the one under way."""
    server, body = usable_server(call), call.body
    account = own_account(call, server, body.account)
    if faults := _faults(call, server):
        raise invalid(faults)
    wanted = FlowRequest(
        mode=_mode(call, server),
        redirect_uri=None if body.redirect_uri == _own_redirect_uri(call, server) else body.redirect_uri,
        scopes=None if body.scopes is None else tuple(dict.fromkeys(body.scopes)),
        return_origin=return_origin(call, body.return_origin),
    )
    flow, new = await begin(call, server, account.name, wanted)
    headers = {"location": f"/api/v1/flows/{flow.id}"} if new else {}
    return Answer(await flow_view(call, flow), status=201 if new else 200, headers=headers)


async def begin(call: Call[Any, Any], server: ServerSettings, account: str, wanted: FlowRequest) -> tuple[Flow, bool]:
    """Return the flow that is asked for, and whether it is new. Raises Problem, AuthorizationError and StoreError."""
    if server.oauth.grant.unattended:
        raise Problem(409, "no-user-needed", f"{server.name} is authorized without a user.")
    with answered(server.name):
        status, challenge = await call.api.probe(server)
        try:
            outcome, new = await call.api.broker.request_flow(
                own_account(call, server, account), wanted, status=status, challenge=challenge
            )
        except RedirectRefused as refused:
            raise invalid_field(("body", "redirect_uri"), str(refused)) from None
    if not isinstance(outcome, PendingAuthorization):
        await call.api.made.connected(server)
        raise Problem(409, NO_AUTHORIZATION, f"{server.name} asks for no authorization: use it as it is.")
    return outcome.flow, new


def return_origin(call: Call[Any, Any], given: str | None) -> str:
    """Return the origin that hears how a flow ends. Raises ValueError if it is not allowed."""
    return allowed_return_origin(
        None if given is None else values.allowed_origin(given),
        popup_origins=call.api.settings().admin.popup_origins,
        public_url=call.api.public_url,
    )


def _faults(call: Call[NewFlow, None], server: ServerSettings) -> list[Fault]:
    """Return what does not fit the server or the configuration."""
    body, mode, own = call.body, _mode(call, server), _own_redirect_uri(call, server)
    wrong: dict[str, str] = {}
    if (mode is FlowMode.DEVICE) is not (server.oauth.grant is GrantType.DEVICE_CODE):
        wrong["mode"] = f"can't be {mode} with grant {server.oauth.grant} of {server.name}"
    if body.redirect_uri not in (None, own) and mode is not FlowMode.HEADLESS:
        wrong["redirect_uri"] = f"must be {own}, unless mode is headless"
    try:
        return_origin(call, body.return_origin)
    except ValueError as error:
        wrong["return_origin"] = str(error)
    return [Fault(loc=["body", name], msg=problem, type="value_error") for name, problem in wrong.items()]


def _mode(call: Call[NewFlow, None], server: ServerSettings) -> FlowMode:
    if call.body.mode is not None:
        return FlowMode(call.body.mode)
    return FlowMode.DEVICE if server.oauth.grant is GrantType.DEVICE_CODE else FlowMode.BROWSER


def _own_redirect_uri(call: Call[Any, Any], server: ServerSettings) -> str:
    """Return where browsers always come back to: to the proxy."""
    return redirect_uri(call.api.public_url, server.oauth.grant)


async def read_flow(call: Call[None, None]) -> Answer:
    """Return an authorization."""
    return Answer(await flow_view(call, await _own_flow(call)))


async def delete_flow(call: Call[None, None]) -> Answer:
    """Cancel an authorization; one that has ended stays as it is."""
    flow = await _own_flow(call)
    if state_of(flow, call.api.clock()) is FlowState.PENDING:
        await call.api.broker.cancel_flow(flow)
    return Answer(status=204)


async def _own_flow(call: Call[Any, Any]) -> Flow:
    flow = await call.api.broker.flow(call.path["id"])
    if flow is None or not owns(call, flow):
        raise not_found("flow")
    call.server = server_id_and_name(call, flow.key.account.server)
    return flow


CREATE = Operation(
    "POST",
    "/servers/{id}/flows",
    create_flow,
    action="flows.create",
    access=Access.SELF,
    summary="Begin an authorization (201), or return the one under way (200)",
    body=NewFlow,
    answers={201: FlowView, 200: FlowView},
    problems=(409, 502, 504),
    starts_flow=True,
)

OPERATIONS = (
    CREATE,
    Operation(
        "GET",
        "/flows/{id}",
        read_flow,
        action="flows.read",
        access=Access.SELF,
        summary="Return an authorization",
        answers={200: FlowView},
    ),
    Operation(
        "DELETE",
        "/flows/{id}",
        delete_flow,
        action="flows.delete",
        access=Access.SELF,
        summary="Cancel an authorization",
        answers={204: None},
    ),
    *completion.OPERATIONS,
)
