"""`GET /v1/models`: the names of the model that is served, and what it can do."""

from typing import Literal, TypedDict

from refimpl.server.errors import model_not_found
from refimpl.server.lifecycle import Service


class Limits(TypedDict):
    """The most that one request may ask for.

    Attributes:
        prompts: in an array.
        candidates: of all prompts together.
        tokens: to generate, of all candidates together.
        stop: strings.
        stop_length: of a stop string, in characters.
        logit_bias: entries.
        body_bytes: of the body.
        seconds: until it ends, finished or not.
    """

    prompts: int
    candidates: int
    tokens: int
    stop: int
    stop_length: int
    logit_bias: int
    body_bytes: int
    seconds: float


class Capabilities(TypedDict):
    """What can be asked of a model here.

    Attributes:
        context_length: most tokens of prompt and completion together.
        trained_context_length: what the model itself was made for.
        vocabulary_size: ids are below it.
        max_logprobs: most of the likeliest tokens in each place.
        fill_in_the_middle: whether the model was trained to.
        suffix: how a suffix is reached.
        numerics: where the forward pass rounds.
        slots: choices that are generated at the same time.
        system_fingerprint: as replies have it.
        limits: of one request.
    """

    context_length: int
    trained_context_length: int
    vocabulary_size: int
    max_logprobs: int
    fill_in_the_middle: bool
    suffix: Literal["fill_in_the_middle", "resampling"]
    numerics: str
    slots: int
    system_fingerprint: str
    limits: Limits


class ModelName(TypedDict):
    """A name of a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Model(ModelName):
    """A model."""

    capabilities: Capabilities


class ModelList(TypedDict):
    """All names."""

    object: Literal["list"]
    data: list[ModelName]


def list_models(service: Service) -> ModelList:
    """Every name, the model's own first."""
    return ModelList(object="list", data=[_named(service, name) for name in service.names])


def describe(service: Service, name: str) -> Model:
    """One name, and what the model can do.

    Raises:
        Problem: 404, nothing is called so; 503, it is not loaded.
    """
    # The rest of the path is the name, with the slash that may end any path.
    name = name.rstrip("/")
    if name not in service.names:
        raise model_not_found(name)
    return Model(**_named(service, name), capabilities=_capabilities(service))


def _named(service: Service, name: str) -> ModelName:
    return ModelName(id=name, object="model", created=service.created, owned_by="refimpl")


def _capabilities(service: Service) -> Capabilities:
    engine, settings = service.engine, service.settings
    gemma = engine.gemma
    is_trained = gemma.tokenizer.fill_in_the_middle is not None
    return Capabilities(
        context_length=engine.context,
        trained_context_length=gemma.config.context_length,
        vocabulary_size=gemma.vocab_size,
        max_logprobs=settings.max_logprobs,
        fill_in_the_middle=is_trained,
        suffix="fill_in_the_middle" if is_trained else "resampling",
        numerics=gemma.numerics.name,
        slots=engine.options.slots,
        system_fingerprint=service.fingerprint,
        limits=Limits(
            prompts=settings.max_prompts,
            candidates=settings.max_candidates,
            tokens=settings.max_tokens_total,
            stop=settings.max_stop,
            stop_length=settings.max_stop_length,
            logit_bias=settings.max_logit_bias,
            body_bytes=settings.max_body_bytes,
            seconds=settings.request_timeout,
        ),
    )
