"""Tiny models for tests: loaded once for each name, compiled once for each use."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from refimpl_weights import synthetic

from refimpl.model.cache import KVCache
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.config import GemmaConfig
from refimpl.model.implementations import Implementations
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.parameters import load_model
from refimpl.model.trace import Taps, in_order

GOLDEN = Path(__file__).parent / "golden" / "tiny"


@dataclass(frozen=True)
class TinyModel:
    """A synthetic checkpoint, loaded and split into what compiled functions take."""

    config: GemmaConfig
    numerics: Numerics
    graph: nnx.GraphDef[Any]
    parameters: Mapping[str, Any]


@cache
def tiny_model(name: str, numerics: Numerics = FLOAT32) -> TinyModel:
    """The synthetic checkpoint of this name, in the activation type of the numerics."""
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_checkpoint(folder, name, dtype=numerics.activation)
        checkpoint = open_checkpoint(folder)
        graph, state = nnx.split(load_model(checkpoint, numerics))
        return TinyModel(checkpoint.config, numerics, graph, nnx.to_pure_dict(state))


@cache
def full_pass(name: str) -> Callable[[np.ndarray, np.ndarray], tuple[Any, dict[str, Any]]]:
    """Compiled (tokens, positions) -> logits and the stream after every layer, without a cache.

    Call it with "3 40" arrays only, such as `golden_case` gives: compiling takes seconds.
    """
    model = tiny_model(name)

    def run(parameters: Any, tokens: Any, positions: Any) -> Any:
        taps = Taps(("embed", "streams", "layers.*.residual"))
        logits, _ = nnx.merge(model.graph, parameters)(tokens, positions, taps=taps)
        return logits, taps.values

    compiled = jax.jit(run)

    def in_turn(tokens: np.ndarray, positions: np.ndarray) -> tuple[Any, dict[str, Any]]:
        logits, values = compiled(model.parameters, tokens, positions)
        # Of several streams the first is the embedding.
        stages = [
            stage for stage in in_order(values) if stage != "embed" or "streams" not in values
        ]
        return logits, {stage: values[stage] for stage in stages}

    return in_turn


@cache
def cached_pass(
    name: str, implementations: Implementations, numerics: Numerics = FLOAT32
) -> Callable[[KVCache, np.ndarray, np.ndarray], tuple[Any, KVCache]]:
    """Compiled (cache, tokens, positions) -> logits and the cache after them."""
    model = tiny_model(name, numerics)

    def run(parameters: Any, cache: KVCache, tokens: Any, positions: Any) -> Any:
        module = nnx.merge(model.graph, parameters)
        return module(tokens, positions, cache, implementations=implementations)

    compiled = jax.jit(run, compiler_options=numerics.compiler_options or None)
    return lambda cache, tokens, positions: compiled(model.parameters, cache, tokens, positions)


@dataclass(frozen=True)
class GoldenCase:
    """One input of a tiny model, padded to one shape for all, and Hugging Face's results.

    Attributes:
        tokens, positions: int32 "3 40"; padding has position -1.
        is_token: bool "b t", of the case's own shape; where False the results mean nothing.
        logits: "b t v". residual: "l+1 b t d", the scaled embedding first; or "l+1 u b t d" of a
            model with several streams, all of them before the first layer first.
    """

    tokens: np.ndarray
    positions: np.ndarray
    is_token: np.ndarray
    logits: np.ndarray
    residual: np.ndarray


def golden_case(name: str, case: str, dtype: str = "float32") -> GoldenCase:
    """What `tests/golden/README.md` describes, with bit patterns as numbers."""
    golden = np.load(GOLDEN / f"{name}.npz")
    ids, positions = golden[f"{case}.ids"], golden[f"{case}.positions"]
    is_token = golden[f"{case}.mask"] == 1
    tokens, padded = np.zeros((3, 40), np.int32), np.full((3, 40), -1, np.int32)
    rows, length = ids.shape
    tokens[:rows, :length] = ids
    padded[:rows, :length] = np.where(is_token, positions, -1)
    results = [golden[f"{case}.{dtype}.{what}"] for what in ("logits", "residual")]
    if dtype == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        results = [(bits.astype(np.uint32) << 16).view(np.float32) for bits in results]
    return GoldenCase(tokens, padded, is_token, *results)
