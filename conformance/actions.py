"""The calls that the MCP client makes in a scenario once it is connected."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from mcp import Client, types
from mcp.client import ClientRequestContext
from pydantic import ValidationError

from conformance.scenarios import Scenario


async def fill_defaults(context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
    """Accept a form as it is: every field gets the default of its schema (SEP-1034)."""
    properties = getattr(params, "requested_schema", {}).get("properties", {})
    content = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    return types.ElicitResult(action="accept", content=content)


async def act(client: Client, scenario: Scenario) -> None:
    """Make the calls that the scenario checks. Raises RuntimeError if the server's answer is an error."""
    await _ACTIONS.get(scenario.name, _use_every_tool)(client, scenario)


async def _use_every_tool(client: Client, scenario: Scenario) -> None:
    for tool in (await client.list_tools()).tools:
        await _call(client, tool.name, dict.fromkeys(tool.input_schema.get("required", ()), 0))


async def _list_only(client: Client, scenario: Scenario) -> None:
    await client.list_tools()


async def _add(client: Client, scenario: Scenario) -> None:
    await client.list_tools()
    await _call(client, "add_numbers", {"a": 2, "b": 3})


async def _use_everything(client: Client, scenario: Scenario) -> None:
    await _use_every_tool(client, scenario)
    for resource in (await client.list_resources()).resources:
        await client.read_resource(resource.uri)
    for prompt in (await client.list_prompts()).prompts:
        await client.get_prompt(prompt.name)


async def _calls_of_the_context(client: Client, scenario: Scenario) -> None:
    await client.list_tools()
    for call in scenario.context["toolCalls"]:
        await _call(client, call["name"], call["arguments"])


async def _return_the_schema(client: Client, scenario: Scenario) -> None:
    tools = (await client.list_tools()).tools
    focal = next(tool for tool in tools if tool.name != "json_schema_echo")
    await _call(client, "json_schema_echo", {"schema": focal.input_schema})


async def _answer_what_is_asked(client: Client, scenario: Scenario) -> None:
    """Answer the requests for input. The SDK refuses a result without ``resultType``; the revision accepts it."""
    await client.list_tools()
    for name in ("test_mrtr_echo_state", "test_mrtr_unrelated", "test_mrtr_no_state", "test_mrtr_unrelated"):
        await _call(client, name, {})
    with suppress(ValidationError):
        await _call(client, "test_mrtr_no_result_type", {})


async def _call(client: Client, name: str, arguments: dict[str, Any]) -> None:
    result = await client.call_tool(name, arguments)
    if result.is_error:
        raise RuntimeError(f"the tool {name} answered: {result.content}")


_ACTIONS: Mapping[str, Callable[[Client, Scenario], Awaitable[None]]] = {
    "tools_call": _add,
    "http-standard-headers": _use_everything,
    "http-custom-headers": _calls_of_the_context,
    "sep-2322-client-request-state": _answer_what_is_asked,
    "json-schema-ref-no-deref": _list_only,
    "json-schema-2020-12-preservation": _return_the_schema,
}
"""The scenarios that need certain calls; in all others the client lists the tools and calls each."""
