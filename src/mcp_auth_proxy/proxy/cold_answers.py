"""Build what the proxy answers in place of a server while its user has not authorized yet (cold start).

Clients give up after 5 to 60 seconds, and few show an error of the handshake. So the handshake and the lists have
answers at once, with a tool that says what to do. Results that the server gave earlier (``Catalog``) are used if there
are any.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mcp_auth_proxy import __version__
from mcp_auth_proxy.models import Account, Catalog
from mcp_auth_proxy.rpc.answers import ask_admin_text
from mcp_auth_proxy.rpc.messages import Json, Message, is_revision

SESSION_VERSIONS = ("2025-03-26", "2025-06-18", "2025-11-25")
"""The revisions of MCP with sessions that the proxy can begin one for."""

MAX_TOOL_NAME = 40
"""Characters of the names of the proxy's own tools: some models take no longer ones."""

LISTS = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}
"""The member with the items of each list."""

CAPABILITIES = {"tools": "tools", "prompts": "prompts", "resources": "resources", "resourceTemplates": "resources"}
"""The capability that stands for each list."""

LIST_CHANGES = (
    ("tools", "notifications/tools/list_changed", "toolsListChanged"),
    ("prompts", "notifications/prompts/list_changed", "promptsListChanged"),
    ("resources", "notifications/resources/list_changed", "resourcesListChanged"),
)
"""Capability, notification, and the member of the filter of ``subscriptions/listen`` that asks for it."""

SUBSCRIPTION_META = "io.modelcontextprotocol/subscriptionId"
ACKNOWLEDGED = "notifications/subscriptions/acknowledged"

_UNCACHED = {"ttlMs": 0, "cacheScope": "private"}


def authorize_tool(server: str) -> str:
    """Return the name of the tool that waits for consent."""
    return f"authorize_{server}"[:MAX_TOOL_NAME]


def call_tool(server: str) -> str:
    """Return the name of the tool that calls a tool of the server, for clients that do not list again."""
    return f"call_{server}"[:MAX_TOOL_NAME]


def marker(server: str) -> bytes:
    """Return bytes that are in every body that names a tool of the proxy's own."""
    whole = f'_{server}"'
    shortest = MAX_TOOL_NAME - len("authorize_")
    return whole.encode() if len(server) <= shortest else whole[: shortest + 1].encode()


def link_text(account: Account, link: str | None) -> str:
    """Return what a user is told: where to authorize; None if only an admin can."""
    if link is None:
        return ask_admin_text(account.shown)
    return f"Server {account.shown} needs your authorization. Open {link} in a browser."


def announced_version(catalog: Catalog | None, requested: object) -> str:
    """Return the revision to answer an ``initialize`` with: what the server would, as far as that is known."""
    known = catalog.initialize.get(requested) if catalog is not None and isinstance(requested, str) else None
    answered = known.get("protocolVersion") if known is not None else None
    if is_revision(answered):
        return answered
    return requested if isinstance(requested, str) and requested in SESSION_VERSIONS else SESSION_VERSIONS[-1]


def initialize_result(account: Account, version: str, catalog: Catalog | None, link: str | None) -> Json:
    """Return the result of ``initialize``."""
    known = _known_initialize(catalog, version)
    return {
        "protocolVersion": version,
        "capabilities": _capabilities(known),
        "serverInfo": {"name": f"mcp-auth-proxy/{account.server}", "version": __version__},
        "instructions": _instructions(known, account, link),
    }


def discover_result(account: Account, catalog: Catalog | None, link: str | None) -> Json | None:
    """Return the result of ``server/discover``; None if nothing is known that could be one."""
    if catalog is None or catalog.discover is None:
        return None
    known = catalog.discover
    return {
        **known,
        "capabilities": _capabilities(known),
        "instructions": _instructions(known, account, link),
        "resultType": "complete",
        **_UNCACHED,
    }


def list_result(message: Message, account: Account, catalog: Catalog | None, link: str | None) -> Json:
    """Return the result of a list: what is remembered, and the proxy's own tools."""
    member = LISTS[message.method]
    items = list(catalog.lists.get(member, ())) if catalog is not None else []
    if member == "tools":
        names = {item.get("name") for item in items}
        own = own_tools(account, link, with_call=catalog is None or "tools" not in catalog.lists)
        items += [tool for tool in own if tool["name"] not in names]
    return _list(message, member, items)


def empty_list(message: Message) -> Json:
    """Return the result of a list of what a server does not have."""
    return _list(message, LISTS[message.method], [])


def _list(message: Message, member: str, items: Sequence[Mapping[str, Any]]) -> Json:
    return {member: items, **({"resultType": "complete", **_UNCACHED} if message.modern else {})}


def own_tools(account: Account, link: str | None, *, with_call: bool) -> list[Json]:
    """Return the definitions of the proxy's own tools."""
    server, text = account.server, link_text(account, link)
    authorize: Json = {
        "name": authorize_tool(server),
        "description": f"{text} Call this tool to wait until that is done. Then the tools of {server} can be used.",
        "inputSchema": {"type": "object", "properties": {}},
    }
    if not with_call:
        return [authorize]
    call: Json = {
        "name": call_tool(server),
        "description": (
            f"Call a tool of {server} by its name, if that tool is not listed here although {server} is authorized. "
            f"Before that: {text}"
        ),
        "inputSchema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": f"The name of the tool of {server}."},
                "arguments": {"type": "object", "description": "Its arguments."},
            },
            "required": ["name"],
        },
    }
    return [authorize, call]


def connected_result(message: Message, account: Account, tools: int | None) -> Json:
    """Return the result of the tool that waits for consent, once it is given. ``tools``: how many there are."""
    count = "" if tools is None else f" It has {tools} tool{'' if tools == 1 else 's'}."
    text = f"Server {account.shown} is connected.{count} List the tools again to see them."
    return _tool_result(message, text, is_error=False)


def refused_call(message: Message, server: str) -> Json:
    """Return the result of a call that names no tool, or whose arguments can't be sent."""
    return _tool_result(
        message,
        f'{call_tool(server)} needs the "name" of a tool of {server}, and its arguments as JSON.',
        is_error=True,
    )


def _tool_result(message: Message, text: str, *, is_error: bool) -> Json:
    result: Json = {"content": [{"type": "text", "text": text}], "isError": is_error}
    return {**result, "resultType": "complete"} if message.modern else result


def response(message: Message, result: Json) -> Json:
    """Return the response to a request."""
    return {"jsonrpc": "2.0", "id": message.id, "result": result}


def list_changes(capabilities: Iterable[str] = ("tools", "prompts", "resources")) -> list[Json]:
    """Return the notifications that lists have changed."""
    wanted = set(capabilities)
    return [{"jsonrpc": "2.0", "method": method} for capability, method, _ in LIST_CHANGES if capability in wanted]


def acknowledgment(message: Message, notifications: Mapping[str, Any]) -> Json:
    """Return the first message of a stream that ``subscriptions/listen`` opens (MCP 2026-07-28, subscriptions)."""
    # Only what JSON can express: a number that is too large was read as infinity.
    honored = {name: value for name, value in notifications.items() if value is True or _are_texts(value)}
    return _on_subscription(message, ACKNOWLEDGED, {"notifications": honored})


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def subscribed_changes(message: Message, notifications: Mapping[str, Any]) -> list[Json]:
    """Return the notifications that lists have changed, of the types that a subscription asks for."""
    return [
        _on_subscription(message, method, {}) for _, method, member in LIST_CHANGES if notifications.get(member) is True
    ]


def _on_subscription(message: Message, method: str, params: Json) -> Json:
    return {"jsonrpc": "2.0", "method": method, "params": {**params, "_meta": {SUBSCRIPTION_META: message.id}}}


def lists_of(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which of the capabilities with lists a result of ``initialize`` declares."""
    declared = result.get("capabilities")
    if not isinstance(declared, Mapping):
        return ()
    return tuple(capability for capability, _, _ in LIST_CHANGES if isinstance(declared.get(capability), Mapping))


def _known_initialize(catalog: Catalog | None, version: str) -> Mapping[str, Any] | None:
    if catalog is None or not catalog.initialize:
        return None
    results = list(catalog.initialize.values())
    return next((result for result in results if result.get("protocolVersion") == version), results[0])


def _capabilities(known: Mapping[str, Any] | None) -> Json:
    declared = known.get("capabilities") if known is not None else None
    capabilities = dict(declared) if isinstance(declared, Mapping) else {}
    for capability, _, _ in LIST_CHANGES:
        before = capabilities.get(capability)
        capabilities[capability] = {**(before if isinstance(before, Mapping) else {}), "listChanged": True}
    return capabilities


def _instructions(known: Mapping[str, Any] | None, account: Account, link: str | None) -> str:
    said = known.get("instructions") if known is not None else None
    text = link_text(account, link)
    if link is not None:
        text += f" Or call the tool {authorize_tool(account.server)}, which waits until that is done."
    return f"{said}\n\n{text}" if isinstance(said, str) and said else text


def is_acknowledgment(event: bytes) -> bool:
    """Return whether an event of a stream is the acknowledgment of a subscription."""
    data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
    try:
        message = json.loads(data)
    except ValueError:
        return False
    return isinstance(message, dict) and message.get("method") == ACKNOWLEDGED
