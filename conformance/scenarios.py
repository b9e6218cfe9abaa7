"""What a scenario asks of us: the proxy's configuration, and what the MCP client does once it is connected."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mcp import Client, types
from mcp.client import ClientRequestContext
from pydantic import ValidationError

SERVER = "conformance"
"""The name under which the scenario's server stands in the proxy's configuration."""

CLIENT_METADATA_URL = "https://conformance-test.local/client-metadata.json"
"""The one Client ID Metadata Document that the suite accepts; nobody fetches it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run of the suite, as its environment variables describe it."""

    name: str
    url: str
    version: str = "2025-11-25"
    context: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """How the client negotiates: as clients of the revision do."""
        return "auto" if self.version >= "2026-07-28" else "legacy"


# The configuration


def write_configuration(scenario: Scenario, folder: Path, wait: str) -> Path:
    """Write the proxy's configuration, and the files that it names; return where it is."""
    oauth, files = _oauth(scenario.name, scenario.context)
    server: dict[str, Any] = {"url": scenario.url}
    if oauth:
        server["oauth"] = oauth
    document = {
        "listen": "127.0.0.1:0",
        "store": {"url": "sqlite:///proxy.db"},
        "authorization": {"wait": wait, "open_browser": "never"},
        "servers": {SERVER: server},
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    path = folder / "mcp-auth-proxy.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _oauth(name: str, context: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a user would write who was told what the context tells: the ``oauth`` section, and files by name."""
    files: dict[str, str] = {}
    oauth: dict[str, Any] = {key: context[key] for key in ("client_id", "client_secret", "issuer") if key in context}
    match name:
        case "auth/basic-cimd":
            oauth["client_metadata_url"] = CLIENT_METADATA_URL
        case "auth/client-credentials-basic":
            oauth |= {"grant": "client_credentials", "client_auth": "client_secret_basic"}
        case "auth/client-credentials-jwt":
            files["client.pem"] = context["private_key_pem"]
            oauth |= {
                "grant": "client_credentials",
                "client_auth": "private_key_jwt",
                "private_key": "file:client.pem",
                "signing_alg": context["signing_algorithm"],
            }
        case "auth/enterprise-managed-authorization" | "auth/cross-app-access-complete-flow":
            files["id-token.jwt"] = context["idp_id_token"]
            oauth |= {
                "grant": "id_jag",
                "idp": {
                    "issuer": context["idp_issuer"],
                    "token_endpoint": context["idp_token_endpoint"],
                    "client_id": context["idp_client_id"],
                    "id_token": "file:id-token.jwt",
                },
            }
        case "auth/wif-jwt-bearer":
            files["assertion.jwt"] = context["valid_jwt"]
            oauth |= {"grant": "jwt_bearer", "assertion": "file:assertion.jwt"}
        case "auth/dpop" | "auth/dpop-nonce":
            oauth["dpop"] = "required"
        case _:
            pass
    return oauth, files


# The client


async def fill_defaults(context: ClientRequestContext, params: types.ElicitRequestParams) -> types.ElicitResult:
    """The user accepts a form as it is: every field gets the default of its schema (SEP-1034)."""
    properties = getattr(params, "requested_schema", {}).get("properties", {})
    content = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    return types.ElicitResult(action="accept", content=content)


async def act(client: Client, scenario: Scenario) -> None:
    """Do with a connected client what the scenario looks at. Raises where the server's answer is an error."""
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
    """The SDK refuses a result without ``resultType``, where the revision has clients take it as complete."""
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
"""Scenarios in which it matters what the client does; in all others it lists the tools and calls each."""
