"""The formula of `parameter_count` against the tree of parameters, of every published size.

Trees are shapes only: nothing of a model of 31 billion parameters is allocated.
"""

import math

import jax
import pytest
from flax import nnx

from refimpl.model import transformer
from refimpl.model.config import GemmaConfig
from refimpl.model.layer_spec import LayerSpec
from refimpl.model.numerics import FLOAT32
from refimpl.model.transformer import Block, Transformer
from refimpl.model.variants import VARIANTS


def elements(abstract: nnx.Module) -> int:
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}
    return sum(math.prod(leaf.shape) for leaf in leaves)


def elements_of_layers(config: GemmaConfig) -> dict[LayerSpec, int]:
    """Layers that are specified alike are built once, as building them is all that takes time."""
    places = {spec: index for index, spec in enumerate(config.layers)}
    return {
        spec: elements(nnx.eval_shape(lambda i=i: Block(config, i, FLOAT32, rngs=nnx.Rngs(0))))
        for spec, i in places.items()
    }


class NoBlock(nnx.Module):
    """A layer without parameters."""

    def __init__(self, *_: object, **__: object) -> None: ...


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_parameters_are_counted_as_the_tree_has_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VARIANTS[name]
    layers = elements_of_layers(config)
    monkeypatch.setattr(transformer, "Block", NoBlock)
    around = elements(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    assert around + sum(layers[spec] for spec in config.layers) == config.parameter_count


def test_the_whole_tree_of_the_largest() -> None:
    config = VARIANTS["gemma-4-31b"]
    whole = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert elements(whole) == config.parameter_count == 30_697_345_340
