"""Make docs/api.md from the OpenAPI document: ``python deploy/api_page.py [--check]``.

The text around it, and the values of the curl lines, are here; everything else is what the API validates with.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mcp_auth_proxy.web.api import openapi
from mcp_auth_proxy.web.api.application import PREFIX, operations

Json = Mapping[str, Any]

PAGE = Path(__file__).resolve().parents[1] / "docs/api.md"
TEXTS = Path(__file__).with_name("api_texts")
WIDTH = 118

TITLES = {
    "me": "Who calls", "servers": "Servers", "flows": "Flows", "grants": "Grants", "oauth-clients": "OAuth clients",
    "principals": "Principals", "keys": "API keys", "events": "Audit trail", "openapi": "OpenAPI",
}  # fmt: skip

VARIABLES = {
    "/servers/{id}": "$SERVER", "/flows/{id}": "$FLOW", "/grants/{grant_id}": "$GRANT",
    "/oauth-clients/{id}": "$CLIENT", "/principals/{principal_id}": "$PRINCIPAL", "/keys/{key_id}": "$KEY_ID",
}  # fmt: skip
"""What the curl lines call the ids in a path."""

BODIES: dict[str, Json] = {
    "servers.create": {"name": "tickets", "url": "https://mcp.example.com/mcp", "oauth": {"scopes": ["read"]}},
    "servers.update": {"allow": ["role:admin"]},
    "servers.discover": {"mcp_server_url": "https://mcp.example.com/mcp"},
    "servers.complete": {},
    "servers.verify": {"account": "default"},
    "flows.create": {"account": "work", "mode": "headless"},
    "oauth-clients.create": {
        "provider": "tickets", "client_id": "my-client", "client_secret": "…",
        "authorization_url": "https://as.example.com/authorize", "token_url": "https://as.example.com/token",
    },
    "oauth-clients.change": {"client_secret": "…", "scopes": ["read", "write"]},
    "principals.create": {"name": "ci", "role": "member"},
    "principals.change": {"status": "disabled"},
    "keys.create": {"name": "laptop", "scopes": ["mcp", "self"]},
}  # fmt: skip
"""The bodies of the curl lines."""

QUERIES = {"grants.list": "?state=active&page_size=100", "events.list": "?page_size=10"}


def document() -> Json:
    """Return the OpenAPI document as JSON."""
    known: Json = msgspec.to_builtins(openapi.document(operations(), PREFIX))
    return known


def page(known: Json) -> str:
    """Return the page of an OpenAPI document."""
    parts = [text("introduction")]
    for tag, title in TITLES.items():
        parts.append(f"## {title}")
        parts += [part for _, part in sorted(_entries(known, tag), key=lambda entry: entry[0])]
    parts += [text("popup"), text("wires"), "## Models", *_models(known)]
    return "\n\n".join(parts) + "\n"


def text(name: str) -> str:
    """Return a part of the page that no document has."""
    return (TEXTS / f"{name}.txt").read_text().strip()


def _entries(known: Json, tag: str) -> Iterator[tuple[int, str]]:
    order = {"get": 0, "post": 1, "patch": 2, "delete": 3}
    for path, methods in known["paths"].items():
        for method, entry in methods.items():
            if tag in entry["tags"]:
                place = 10 * path.count("{") + order[method] + 5 * path.count("/")
                yield place, _entry(method.upper(), path, entry)


def _entry(method: str, path: str, entry: Json) -> str:
    who = "" if "description" not in entry else f" {entry['description']}"
    lines = [f"### {method} {path}", "", f"{entry['summary']}.{who}", ""]
    queries = [each for each in entry["parameters"] if each["in"] == "query"]
    if queries:
        lines += [f"- Query: {', '.join(_parameter(each) for each in queries)}"]
    if "requestBody" in entry:
        lines += [f"- Body: {_link(_schema_of(entry['requestBody']))}"]
    headers = [f"`{each['name']}`" for each in entry["parameters"] if each["in"] == "header"]
    if headers:
        lines += [f"- Heeds {', '.join(headers)}"]
    lines += [f"- Answers: {', '.join(_answers(entry))}"]
    problems = [status for status in entry["responses"] if int(status) >= 400]
    if problems:
        lines += [f"- Problems: {', '.join(problems)}"]
    return "\n".join([*lines, "", "```sh", _curl(method, path, entry), "```"])


def _answers(entry: Json) -> Iterator[str]:
    for status, response in entry["responses"].items():
        if int(status) < 400:
            name = _schema_of(response) if "content" in response else None
            yield f"{status} {_link(name)}" if name else status


def _parameter(parameter: Json) -> str:
    schema = parameter["schema"]
    values = f" ({', '.join(schema['enum'])})" if "enum" in schema else ""
    span = f" ({schema['minimum']}–{schema['maximum']})" if "minimum" in schema else ""
    return f"`{parameter['name']}`{values}{span}"


def _curl(method: str, path: str, entry: Json) -> str:
    name = entry["operationId"]
    for pattern, variable in VARIABLES.items():
        path = path.replace(pattern, re.sub(r"\{\w+\}", variable, pattern))
    command = ["curl -fsS"]
    if method not in ("GET", "POST") or (method == "POST" and name not in BODIES):
        command.append(f"-X {method}")
    command.append(f'"$PROXY{PREFIX}{path}{QUERIES.get(name, "")}"')
    if entry["security"]:
        command.append('-H "Authorization: Bearer $KEY"')
    if name in BODIES:
        command.append(f"--json '{json.dumps(BODIES[name], ensure_ascii=False)}'")
    return _wrapped(command)


def _wrapped(command: list[str]) -> str:
    """Return a command in one line, or if it is too long in two."""
    whole = " ".join(command)
    if len(whole) <= WIDTH:
        return whole
    return " ".join(command[:-1]) + " \\\n  " + command[-1]


def _schema_of(part: Json) -> str | None:
    (content,) = part["content"].values()
    return _name(content["schema"])


def _name(schema: Json) -> str | None:
    return schema["$ref"].rpartition("/")[2].rpartition(".")[2] if "$ref" in schema else None


def _link(name: str | None) -> str:
    return f"[{name}](#{name.lower()})" if name else "an object"


def _models(known: Json) -> Iterator[str]:
    for key, schema in sorted(known["components"]["schemas"].items(), key=lambda item: item[0].rpartition(".")[2]):
        said = schema.get("description", "").replace("``", "`").split("\n\n")[0]
        head = f"### {key.rpartition('.')[2]}\n\n{' '.join(said.split())}"
        if "enum" in schema:
            yield f"{head} One of {', '.join(f'`{value}`' for value in schema['enum'])}."
        else:
            yield "\n".join([head, "", "| field | type | |", "|---|---|---|", *_rows(schema)])


def _rows(schema: Json) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        said = field.get("description") or next(
            (each["description"] for each in field.get("anyOf", ()) if "description" in each), ""
        )
        given = field.get("default")
        notes = ["" if name in required or given in (None, "", []) else f"default `{json.dumps(given)}`", said]
        needed = "" if name in required else "?"
        yield f"| `{name}`{needed} | {_type(field)} | {'; '.join(filter(None, notes))} |"


def _type(field: Json) -> str:
    if name := _name(field):
        return _link(name)
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" if value else "empty" for value in field["enum"])
    kind: str = field.get("type", "any")
    return f"list of {_type(field['items'])}" if kind == "array" and "items" in field else kind


def main() -> int:
    """Write the page, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(description="Make docs/api.md from the OpenAPI document.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is not up to date")
    wanted, options = page(document()), parser.parse_args()
    if not options.check:
        PAGE.write_text(wanted)
    elif wanted != PAGE.read_text():
        print("docs/api.md is not what the API says: run make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
