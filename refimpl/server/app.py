"""The server's app: routes, errors, keys and headers around a service.

Every route is one of `operations.OPERATIONS`; its handler here has the same name.
"""

from collections.abc import Awaitable, Callable

from quart import Quart, Response, request

from refimpl.server import completions, cors, docs, errors, identity, keys, models, probes, tokens
from refimpl.server.body import read_json
from refimpl.server.errors import json_response
from refimpl.server.lifecycle import Service
from refimpl.server.metrics import CONTENT_TYPE
from refimpl.server.openapi import document
from refimpl.server.operations import OPERATIONS

Handler = Callable[..., Awaitable[Response]]


def create_app(service: Service) -> Quart:
    """The app around a service, which need not be ready.

    Args:
        service: has the settings, the engine once it is there, and the keys.
    """
    # No folder is served, and no templates are looked for.
    app = Quart("refimpl", static_folder=None, template_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = service.settings.max_body_bytes
    app.config["BODY_TIMEOUT"] = service.settings.body_timeout
    # A slash more at the end is no other path, and none anywhere is redirected: clients would send
    # what they post no second time.
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    errors.register(app)
    # What is said of replies is said in the opposite order; ids come first and last.
    identity.install(app)
    cors.install(app, service.settings.cors_origins)
    keys.install(app, service.keyring)
    handlers = _handlers(service)
    for operation in OPERATIONS:
        app.add_url_rule(
            operation.path.replace("{model}", "<path:model>"),
            operation.name,
            handlers[operation.name],
            methods=[operation.method],
        )
    return app


def _handlers(service: Service) -> dict[str, Handler]:
    """What each operation does, by its name."""
    max_depth = service.settings.max_json_depth
    description = document(service.settings)
    page = docs.page(description)

    async def complete() -> Response:
        return await completions.complete(service)

    async def list_models() -> Response:
        return json_response(models.list_models(service))

    async def describe_model(model: str) -> Response:
        return json_response(models.describe(service, model))

    async def tokenize() -> Response:
        body = await read_json(request, max_depth=max_depth)
        return json_response(await tokens.tokenize(service, body))

    async def detokenize() -> Response:
        body = await read_json(request, max_depth=max_depth)
        return json_response(tokens.detokenize(service, body))

    async def tokenizer_info() -> Response:
        return json_response(tokens.tokenizer_info(service))

    async def health() -> Response:
        return json_response(probes.health(service))

    async def ready() -> Response:
        return json_response(probes.ready(service))

    async def program_version() -> Response:
        return json_response(probes.program_version())

    async def metrics() -> Response:
        return Response(service.metrics.render(), content_type=CONTENT_TYPE)

    async def openapi() -> Response:
        return json_response(description)

    async def show_docs() -> Response:
        headers = {"Content-Security-Policy": docs.POLICY}
        return Response(page, headers=headers, content_type="text/html; charset=utf-8")

    return {
        "complete": complete,
        "list_models": list_models,
        "describe_model": describe_model,
        "tokenize": tokenize,
        "detokenize": detokenize,
        "tokenizer_info": tokenizer_info,
        "health": health,
        "ready": ready,
        "program_version": program_version,
        "metrics": metrics,
        "openapi": openapi,
        "docs": show_docs,
    }
