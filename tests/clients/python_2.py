"""The official Python client 2.x, as a program like those in program.mjs."""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any, cast

from mcp import Client, MCPError
from mcp.client.session import ClientRequestContext
from mcp.client.subscriptions import Subscription, SubscriptionLost
from mcp.types import (
    ElicitCompleteNotification,
    ElicitRequestParams,
    ElicitRequestURLParams,
    ElicitResult,
    TextContent,
    ToolListChangedNotification,
)

url, era, action = sys.argv[1:]


def say(event: str, **members: Any) -> None:
    print(json.dumps({"event": event, **members}), flush=True)


async def asked(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
    assert isinstance(params, ElicitRequestURLParams)
    say("asked", url=params.url)
    return ElicitResult(action=cast(Any, action))


async def note(message: Any) -> None:
    match message:
        case ToolListChangedNotification():
            say("changed")
        case ElicitCompleteNotification(params=params):
            say("complete", id=params.elicitation_id)


async def listen(subscription: Subscription) -> None:
    try:
        async for _ in subscription:
            say("changed")
    except SubscriptionLost:
        say("lost")


async def obey(client: Client, command: dict[str, Any]) -> None:
    try:
        if "tool" in command:
            result = await client.call_tool(command["tool"], command["arguments"])
            text = "".join(part.text for part in result.content if isinstance(part, TextContent))
            say("result", text=text, isError=result.is_error)
        else:
            tools = (await client.list_tools()).tools
            say("tools", names=[tool.name for tool in tools], text=" ".join(str(tool.description) for tool in tools))
    except MCPError as error:
        say("error", text=str(error), code=error.error.code, data=error.error.data)


async def main() -> None:
    elicitation = None if action == "none" else asked
    async with AsyncExitStack() as stack:
        client = Client(url, mode=era, elicitation_callback=elicitation, message_handler=note)
        await stack.enter_async_context(client)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        say("connected", instructions=client.instructions, revision=client.protocol_version)
        if client.protocol_version >= "2026":
            subscription = await stack.enter_async_context(client.listen(tools_list_changed=True))
            listening = tasks.create_task(listen(subscription))
            stack.callback(listening.cancel)
        while line := await asyncio.to_thread(sys.stdin.readline):
            tasks.create_task(obey(client, json.loads(line)))


asyncio.run(main())
