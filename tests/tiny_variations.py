"""Tiny models with something changed: cut short, wrong on purpose, or of other weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from refimpl_weights import synthetic
from safetensors.numpy import save_file

from refimpl.model.cache import KVCache
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.implementations import Implementations
from refimpl.model.layer_spec import AttentionKind
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.parameters import load_model
from refimpl.model.trace import Taps
from refimpl.model.transformer import Transformer
from tests.oracle import OracleResult, forward, from_hugging_face
from tests.tiny_models import TinyModel

LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL
# Compiling is nearly all of the time that these models take, and half of it is spent on speed.
_QUICKLY = {"xla_backend_optimization_level": 0}
KIND_NAMES = {LOCAL: "sliding_attention", GLOBAL: "full_attention"}


def variation(model: TinyModel, **changes: Any) -> TinyModel:
    """The same weights under a changed configuration, cut to the first layers if it has fewer."""
    config = replace(model.config, **changes)
    abstract = nnx.eval_shape(lambda: Transformer(config, model.numerics, rngs=nnx.Rngs(0)))
    layers = {index: model.parameters["layers"][index] for index in range(config.num_layers)}
    return replace(
        model,
        config=config,
        graph=nnx.split(abstract)[0],
        parameters={**model.parameters, "layers": layers},
    )


def traced(model: TinyModel, *wanted: str) -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """Compiled (tokens, positions) -> logits and the wanted intermediates, without a cache."""

    def run(parameters: Any, tokens: Any, positions: Any) -> Any:
        taps = Taps(wanted)
        logits, _ = nnx.merge(model.graph, parameters)(tokens, positions, taps=taps)
        return logits, taps.values

    compiled = jax.jit(run, compiler_options=model.numerics.compiler_options or _QUICKLY)
    return lambda tokens, positions: compiled(model.parameters, tokens, positions)


def over_cache(
    model: TinyModel, implementations: Implementations
) -> Callable[..., tuple[jax.Array, KVCache]]:
    """Compiled (cache, tokens, positions) -> logits and the cache after them."""

    def run(parameters: Any, cache: KVCache, tokens: Any, positions: Any) -> Any:
        module = nnx.merge(model.graph, parameters)
        return module(tokens, positions, cache, implementations=implementations)

    compiled = jax.jit(run, compiler_options=model.numerics.compiler_options or _QUICKLY)
    return lambda cache, tokens, positions: compiled(model.parameters, cache, tokens, positions)


def text_tensors(name: str, *, layers: int) -> dict[str, np.ndarray]:
    """The first layers' weights of a synthetic model, and the others, as "norm.weight"."""
    found = {}
    for full, array in synthetic.tensors(name).items():
        bare = full.removeprefix("language_model.").removeprefix("model.")
        parts = bare.split(".")
        is_text = bare != full and (parts[0] != "layers" or int(parts[1]) < layers)
        if is_text:
            found[bare] = array
    return found


def judge(
    name: str,
    kinds: Sequence[AttentionKind],
    tokens: np.ndarray,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    visible: np.ndarray | None = None,
) -> OracleResult:
    """What the oracle makes of tokens "b t" at positions 0, 1, ..., given the first layers.

    Args:
        name: a key of `synthetic.TINY`.
        kinds: of the layers that take part.
        tokens: ids.
        tensors: in place of the model's own.
        visible: where there is no padding.
    """
    described = synthetic.TINY[name]
    config = from_hugging_face(
        {
            **described,
            "num_hidden_layers": len(kinds),
            "layer_types": [KIND_NAMES[kind] for kind in kinds],
        }
    )
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    weights = text_tensors(name, layers=len(kinds)) if tensors is None else tensors
    return forward(config, weights, tokens, positions, visible=visible)


def write_folder(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> Path:
    """A checkpoint folder with these tensors of the text decoder, its layers counted in them."""
    synthetic.write_checkpoint(folder, name)
    place = folder / "config.json"
    config = json.loads(place.read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] = sum(key.endswith("input_layernorm.weight") for key in tensors)
    place.write_text(json.dumps(config))
    save_file(
        {f"model.{key}": array for key, array in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def load_tiny(path: Path, numerics: Numerics = FLOAT32) -> TinyModel:
    """A checkpoint, file or folder, as `tiny_models` holds its own."""
    checkpoint = open_checkpoint(path)
    graph, state = nnx.split(load_model(checkpoint, numerics))
    return TinyModel(checkpoint.config, numerics, graph, nnx.to_pure_dict(state))
