"""`GET /openapi.json`, made from the schemas that requests are read with and replies are typed by.

Owns how a schema of ours becomes one of OpenAPI's.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypedDict

from pydantic import TypeAdapter

from refimpl.server.contract import CompletionRequest
from refimpl.server.extensions import Extensions
from refimpl.server.operations import OPERATIONS, Operation
from refimpl.server.settings import ServerSettings

JSON = "application/json"
_REFERENCE = "#/components/schemas/{model}"


class ErrorFields(TypedDict):
    """What went wrong.

    Attributes:
        message: for a person.
        type: the kind of error.
        param: the field at fault, or null.
        code: for a program, or null.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """The body of every reply that is not a success."""

    error: ErrorFields


# Everywhere: no key, another method of the same path, our own fault.
_EVERYWHERE = (401, 405, 500)
_OF_BODIES = (400, 408, 413)
_REASONS = {
    400: "The request is wrong; `param` names the field.",
    401: "There is no API key, or a wrong one.",
    404: "There is no model of this name.",
    405: "The path takes another method.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    429: "The key's limit is reached; `Retry-After` says when to come again.",
    500: "The server had an error.",
    503: "The server is full, loading, ending, or has failed.",
    504: "The request did not end in time.",
}


def document(settings: ServerSettings) -> dict[str, Any]:
    """The whole description; what the settings cap is in it."""
    schemas: dict[str, Any] = {"Error": _schema(Error, {})}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        described = _operation(operation, schemas)
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    completion = schemas[CompletionRequest.__name__]
    _cap(completion["properties"], settings)
    for name in Extensions.model_fields:
        completion["properties"][name]["description"] += " Not of OpenAI's contract."
    if not settings.require_model:
        completion["required"].remove("model")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "refimpl",
            "version": version("refimpl"),
            "description": "OpenAI's legacy completions over Google's Gemma models.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # Without keys nobody needs one.
        "security": [{"key": []}, {}],
    }


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": _responses(operation, schemas),
    }
    if "{" in operation.path:
        name = operation.path.split("{")[1].split("}")[0]
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if operation.body is not None:
        schema = _schema(operation.body, schemas)
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return described


def _responses(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    if isinstance(operation.reply, str):
        content: dict[str, Any] = {operation.reply: {"schema": {"type": "string"}}}
    else:
        content = {JSON: {"schema": _schema(operation.reply, schemas)}}
    if operation.name == "complete":
        # Without a type: tools disagree on whether it describes the text or one event of it.
        content["text/event-stream"] = {
            "schema": {"description": "Events whose data are pieces of such a reply, then [DONE]."}
        }
    bodies = _OF_BODIES if operation.body is not None else ()
    refused = {"schema": {"$ref": _REFERENCE.format(model="Error")}}
    return {
        "200": {"description": "Success.", "content": content},
        **{
            str(status): {"description": _REASONS[status], "content": {JSON: refused}}
            for status in sorted({*_EVERYWHERE, *bodies, *operation.errors})
        },
    }


def _schema(of: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """A reference to the schema of a type, which is put among the others with all it refers to."""
    schema = TypeAdapter(of).json_schema(ref_template=_REFERENCE, mode="validation")
    for name, definition in schema.pop("$defs", {}).items():
        schemas[name] = _nullable(definition)
    if "title" not in schema:
        return schema
    schemas[schema["title"]] = _nullable(schema)
    return {"$ref": _REFERENCE.format(model=schema["title"])}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of requests as it is read: null for what may be left out is left out."""
    if schema.get("additionalProperties") is not False:
        return schema
    required = schema.get("required", [])
    properties = {
        name: each if name in required else _or_null(each)
        for name, each in schema["properties"].items()
    }
    return {**schema, "properties": properties}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    about = {key: schema[key] for key in ("title", "description", "default") if key in schema}
    value = {key: each for key, each in schema.items() if key not in about}
    forms: Sequence[Any] = value.get("anyOf", [value])
    null = {"type": "null"}
    return {**about, "anyOf": [*(form for form in forms if form != null), null]}


def _cap(properties: dict[str, Any], settings: ServerSettings) -> None:
    """Write into the schema what `contract` holds requests to besides."""
    for name, key, most in (
        ("logprobs", "maximum", settings.max_logprobs),
        ("prompt_logprobs", "maximum", settings.max_logprobs),
        ("user", "maxLength", settings.max_user_length),
        ("logit_bias", "maxProperties", settings.max_logit_bias),
    ):
        properties[name]["anyOf"][0][key] = most
    text, texts, _ = properties["stop"]["anyOf"]
    text["maxLength"] = texts["items"]["maxLength"] = settings.max_stop_length
    texts["maxItems"] = settings.max_stop
