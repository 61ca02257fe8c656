"""What the server does: every path, what it takes, what it gives, and how it may refuse.

`app` serves these operations and nothing else; `openapi` describes them.
"""

from dataclasses import dataclass
from typing import Any, Literal

from refimpl.server.contract import CompletionRequest
from refimpl.server.models import Model, ModelList
from refimpl.server.probes import Status, Version
from refimpl.server.reply import Reply
from refimpl.server.schema import Fields
from refimpl.server.tokens import (
    DetokenizeRequest,
    Text,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One thing that the server does.

    Attributes:
        name: unique, and the name of what does it.
        method: of HTTP.
        path: with parameters as `{name}`.
        summary: one sentence.
        body: schema of the request, or None.
        reply: type of the reply; a media type if it is no JSON.
        errors: what may go wrong, besides what may go wrong everywhere.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    summary: str
    reply: Any
    body: type[Fields] | None = None
    errors: tuple[int, ...] = ()


OPERATIONS = (
    Operation(
        name="complete",
        method="POST",
        path="/v1/completions",
        summary="Go on from prompts.",
        body=CompletionRequest,
        reply=Reply,
        errors=(404, 429, 503, 504),
    ),
    Operation(
        name="list_models",
        method="GET",
        path="/v1/models",
        summary="List the names of the model.",
        reply=ModelList,
    ),
    Operation(
        name="describe_model",
        method="GET",
        path="/v1/models/{model}",
        summary="Say what a model can do. The name may have slashes in it.",
        reply=Model,
        errors=(404, 503),
    ),
    Operation(
        name="tokenize",
        method="POST",
        path="/tokenize",
        summary="Give the ids of a text.",
        body=TokenizeRequest,
        reply=Tokens,
        errors=(404, 503),
    ),
    Operation(
        name="detokenize",
        method="POST",
        path="/detokenize",
        summary="Give the text of ids.",
        body=DetokenizeRequest,
        reply=Text,
        errors=(404, 503),
    ),
    Operation(
        name="tokenizer_info",
        method="GET",
        path="/tokenizer_info",
        summary="Describe the tokenizer.",
        reply=TokenizerInfo,
        errors=(503,),
    ),
    Operation(
        name="health",
        method="GET",
        path="/health",
        summary="Whether the process is well. Needs no key.",
        reply=Status,
        errors=(503,),
    ),
    Operation(
        name="ready",
        method="GET",
        path="/ready",
        summary="Whether completions are taken. Needs no key.",
        reply=Status,
        errors=(503,),
    ),
    Operation(
        name="program_version",
        method="GET",
        path="/version",
        summary="The version of the server.",
        reply=Version,
    ),
    Operation(
        name="metrics",
        method="GET",
        path="/metrics",
        summary="Figures for Prometheus.",
        reply="text/plain",
    ),
    Operation(
        name="openapi",
        method="GET",
        path="/openapi.json",
        summary="This description.",
        reply=dict[str, Any],
    ),
    Operation(
        name="docs",
        method="GET",
        path="/docs",
        summary="This description as a page to read.",
        reply="text/html",
    ),
)
