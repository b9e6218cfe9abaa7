# mypy: ignore-errors
# Its mcp is the one of .venv-clients.
"""The official Python client 1.x, as a program like those in program.mjs."""

import asyncio
import json
import sys
from typing import Any

from mcp import ClientSession, McpError
from mcp.client.streamable_http import streamablehttp_client
from mcp.types import ElicitCompleteNotification, ElicitResult, ToolListChangedNotification

url, _, action = sys.argv[1:]


def say(event: str, **members: Any) -> None:
    print(json.dumps({"event": event, **members}), flush=True)


async def asked(context: Any, params: Any) -> ElicitResult:
    say("asked", url=params.url)
    return ElicitResult(action=action)


async def note(message: Any) -> None:
    match getattr(message, "root", None):
        case ToolListChangedNotification():
            say("changed")
        case ElicitCompleteNotification(params=params):
            say("complete", id=params.elicitationId)


async def obey(session: ClientSession, command: dict[str, Any]) -> None:
    try:
        if "tool" in command:
            result = await session.call_tool(command["tool"], command["arguments"])
            say("result", text="".join(part.text for part in result.content), isError=result.isError)
        else:
            tools = (await session.list_tools()).tools
            say("tools", names=[tool.name for tool in tools], text=" ".join(str(tool.description) for tool in tools))
    except McpError as error:
        say("error", text=str(error), code=error.error.code, data=error.error.data)


async def main() -> None:
    elicitation = None if action == "none" else asked
    async with (
        streamablehttp_client(url) as (read, write, _),
        ClientSession(read, write, elicitation_callback=elicitation, message_handler=note) as session,
    ):
        begun = await session.initialize()
        say("connected", instructions=begun.instructions, revision=begun.protocolVersion)
        async with asyncio.TaskGroup() as tasks:
            while line := await asyncio.to_thread(sys.stdin.readline):
                tasks.create_task(obey(session, json.loads(line)))


asyncio.run(main())
