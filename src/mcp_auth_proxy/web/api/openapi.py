"""``/openapi.json``: the OpenAPI 3.1 document, made from the operations and the models that they validate with."""

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from mcp_auth_proxy import __version__
from mcp_auth_proxy.web.api.models import View
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.pages import PageQuery
from mcp_auth_proxy.web.api.problems import MEDIA_TYPE, ProblemView

Json = dict[str, Any]

_REF = "#/components/schemas/{name}"
_ID = "^[A-Za-z0-9_.:-]+$"
"""What ids are made of; those of servers of the configuration are their names."""

_EITHER = ((MEDIA_TYPE, "object"), ("text/html", "string"))

_PARAMETER = re.compile(r"\{(\w+)\}")
_SECURITY: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key (mapk_…) or a JWT. X-API-Key, or Basic with the key as password, does as well as "
        "Bearer; a request has one of them.",
    },
}
START = "/oauth/start"
"""The path of the page of ``web.start``, which is no operation: it answers browsers."""

_SUBMIT = "The same, as the form of that page sends it; for programs there is no difference"

_START: Json = {
    "operationId": "oauth.start",
    "tags": ["oauth"],
    "summary": "Begin an authorization by the URL of a server alone, in a popup",
    "parameters": [
        {"name": "mcp_server_url", "in": "query", "required": True, "schema": {"type": "string", "format": "uri"}},
        *(
            {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
            for name, text in (
                ("scopes", "Separated by commas."),
                ("account", "An account of the server."),
                ("return_origin", "The origin of the page that hears how it ends: see the key admin.popup_origins."),
            )
        ),
    ],
    "responses": {
        "200": {
            "description": "A page that shows what is asked for, and asks the user of a browser.",
            "content": {"text/html": {"schema": {"type": "string"}}},
        },
        "303": {"description": "To the link of the flow; for a browser without a session, to the sign-in."},
        **{
            str(status): {
                "description": HTTPStatus(status).phrase,
                "content": {kind: {"schema": {"type": schema}} for kind, schema in _EITHER},
            }
            for status in (400, 401, 403, 409, 422, 429, 502, 503, 504)
        },
    },
    "security": [{name: []} for name in _SECURITY],
}

_RETRY_AFTER: Json = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_INFO = (
    "Everything that the commands can do. Errors are problem details (RFC 9457). Lists have pages: pass the "
    "next_page_token of an answer as page_token. A session of a browser is a credential too, for the proxy's own pages."
)


class OpenApiView(View):
    """An OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.1)."""

    openapi: str
    info: Json
    servers: list[Json]
    paths: dict[str, Json]
    components: Json


def document(operations: Sequence[Operation], prefix: str) -> OpenApiView:
    """Return the document of these operations, which are below ``prefix``."""
    models = [ProblemView, *(model for operation in operations for model in _models(operation))]
    _, schemas = msgspec.json.schema_components(list(dict.fromkeys(models)), ref_template=_REF)
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _entry(operation)
    paths[START] = {"get": _START, "post": _START | {"operationId": "oauth.submit", "summary": _SUBMIT}}
    return OpenApiView(
        openapi="3.1.0",
        info={"title": "mcp-auth-proxy", "version": __version__, "description": _INFO},
        servers=[{"url": prefix}],
        paths=paths,
        components={"schemas": schemas, "securitySchemes": _SECURITY},
    )


def _models(operation: Operation) -> Iterable[type[msgspec.Struct]]:
    yield from (model for model in operation.answers.values() if model is not None and model is not OpenApiView)
    if operation.body is not None:
        yield operation.body


def _entry(operation: Operation) -> Json:
    entry: Json = {
        "operationId": operation.action,
        "tags": [operation.action.partition(".")[0]],
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation), *_query_parameters(operation), *_header_parameters(operation)],
        "responses": _responses(operation),
    }
    if operation.body is not None:
        required = any(field.required for field in msgspec.structs.fields(operation.body))
        entry["requestBody"] = {"required": required, "content": {"application/json": {"schema": _ref(operation.body)}}}
    if operation.access is Access.ADMIN:
        entry["description"] = "For admins."
    entry["security"] = [] if operation.access is Access.OPEN else [{name: []} for name in _SECURITY]
    return entry


def _path_parameters(operation: Operation) -> list[Json]:
    schema = {"type": "string", "pattern": _ID, "maxLength": 100}
    return [
        {"name": name, "in": "path", "required": True, "schema": schema} for name in _PARAMETER.findall(operation.path)
    ]


def _query_parameters(operation: Operation) -> list[Json]:
    if operation.query is None:
        return []
    _, schemas = msgspec.json.schema_components([operation.query], ref_template=_REF)
    model = schemas[operation.query.__name__]
    required = set(model.get("required", ()))
    return [
        {"name": name, "in": "query", "required": name in required, "schema": _inlined(schema, schemas)}
        for name, schema in model["properties"].items()
    ]


def _inlined(schema: Json, schemas: Mapping[str, Json]) -> Json:
    """Return a schema without references: those of a query's models are not among the document's."""
    if "$ref" in schema:
        return schemas[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        # A parameter is absent rather than null.
        kinds = [_inlined(each, schemas) for each in schema["anyOf"] if each != {"type": "null"}]
        rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
        return {**rest, **kinds[0]} if len(kinds) == 1 else {**rest, "anyOf": kinds}
    return schema


def _header_parameters(operation: Operation) -> list[Json]:
    if not operation.etag:
        return []
    name = "If-None-Match" if operation.is_safe else "If-Match"
    return [{"name": name, "in": "header", "required": False, "schema": {"type": "string"}}]


def _responses(operation: Operation) -> Json:
    responses: Json = {}
    for status, model in operation.answers.items():
        response: Json = {"description": HTTPStatus(status).phrase}
        responses[str(status)] = response
        if model is not None:
            schema = {"type": "object"} if model is OpenApiView else _ref(model)
            response |= {"content": {"application/json": {"schema": schema}}}
        if operation.etag and operation.is_safe:
            response |= {"headers": {"ETag": {"schema": {"type": "string"}}}}
    if operation.etag and operation.is_safe:
        responses["304"] = {"description": HTTPStatus.NOT_MODIFIED.phrase}
    for status in sorted(_problems(operation)):
        response = {"description": HTTPStatus(status).phrase}
        response |= {"content": {MEDIA_TYPE: {"schema": _ref(ProblemView)}}}
        responses[str(status)] = response | ({"headers": _RETRY_AFTER} if status in (429, 503) else {})
    return responses


def _problems(operation: Operation) -> set[int]:
    """Return the statuses of failure that an operation may have."""
    found = set(operation.problems)
    if operation.access is not Access.OPEN:
        found |= {400, 401, 403, 429, 503}
    if "{" in operation.path:
        found.add(404)
    if operation.body is not None:
        found |= {413, 415, 422}
    if operation.query is not None:
        found.add(422)
        found |= {400} if issubclass(operation.query, PageQuery) else set()
    if operation.etag and not operation.is_safe:
        found.add(412)
    return found


def _ref(model: type[msgspec.Struct]) -> Json:
    return {"$ref": _REF.format(name=model.__name__)}


def described(known: Sequence[Operation], prefix: str) -> tuple[Operation, ...]:
    """Return these operations and the one that shows their document, which it describes too."""
    made: list[OpenApiView] = []

    async def show(call: Call[None, None]) -> Answer:
        if not made:
            made.append(document(operations, prefix))
        return Answer(made[0], headers={"cache-control": "public, max-age=300"})

    operations = (
        *known,
        Operation(
            "GET",
            "/openapi.json",
            show,
            action="openapi.show",
            access=Access.OPEN,
            summary="Return this document",
            answers={200: OpenApiView},
        ),
    )
    return operations
