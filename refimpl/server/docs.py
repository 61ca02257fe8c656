"""`GET /docs`: the description of `openapi` as a page, with nothing from outside."""

from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
code { font: 14px ui-monospace, monospace } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3em .8em .3em 0 }
tr { border-top: 1px solid #8884 } h2 { margin-top: 2em }
"""
# Nothing is loaded and nothing runs, whatever a name or a description may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(document: dict[str, Any]) -> str:
    """The page for an OpenAPI document."""
    title = escape(document["info"]["title"])
    body = "".join(_body(document))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{escape(document['info']['description'])}</p>{body}</html>\n"
    )


def _body(document: dict[str, Any]) -> Iterator[str]:
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation['summary'])}</p>"
            request = operation.get("requestBody")
            if request is not None:
                yield from _fields(schemas[_name(request)])
            yield from _statuses(operation["responses"])


def _fields(schema: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    yield "<table><tr><th>Field<th>Type<th>Default<th>Meaning"
    for name, field in schema["properties"].items():
        default = "required" if name in required else _spelt(field.get("default"))
        yield (
            f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}"
            f"<td>{escape(default)}<td>{escape(field.get('description', ''))}"
        )
    yield "</table>"


def _statuses(responses: dict[str, Any]) -> Iterator[str]:
    yield "<table><tr><th>Status<th>Meaning"
    for status, response in responses.items():
        yield f"<tr><td>{status}<td>{escape(response['description'])}"
    yield "</table>"


def _name(request: dict[str, Any]) -> str:
    return request["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(form) for form in field["anyOf"] if form != {"type": "null"})
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "enum" in field:
        return ", ".join(repr(value) for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        return f"array of {_type(field['items'])}"
    bounds = [
        f"{word} {field[key]:g}"
        for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
        if key in field
    ]
    return " ".join([kind, *bounds])


def _spelt(default: object) -> str:
    return "" if default is None else repr(default)
