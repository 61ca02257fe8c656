"""How a model would be divided among devices: shapes and layouts, without a device or an array.

Tensor parallelism over one mesh axis. Every matrix "i o" is divided along its outputs, so that each
device computes whole outputs: no sum over inputs is cut, and a divided run could give the bits of
one device. (The usual division cuts the inputs of the two output projections and adds up partial
sums, which moves as many bytes and takes as much memory, but rounds in another order.)

    queries, keys, values    by whole heads, and the cache with them
    gate, up and all others  by column
    experts                  by whole experts
    vocabulary tables        by token, which is their column
    norms, routers           whole on every device

What lies joined in one matrix of ours (queries, keys and values; gate and up) is laid out here as
the matrices that it was joined from, because columns of the joined one would give one device all
keys and none of the queries. A divided run would have to join each device's share anew; the bytes
of every device are exact all the same.

A dimension whose units do not divide evenly is held whole by every device. For key/value heads
fewer than devices that is more than a run would need, since a device's queries read one of them:
heads could be copied to groups of devices, which one mesh axis does not express.

Nothing here runs: the engine knows one device. A plan counts what each would have to hold.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from refimpl.errors import InvalidRequestError
from refimpl.model import names
from refimpl.model.cache import KVCache
from refimpl.model.config import GemmaConfig
from refimpl.model.numerics import FLOAT32
from refimpl.model.storage import Storage
from refimpl.model.transformer import Transformer

AXIS = "model"


@dataclass(frozen=True, kw_only=True)
class Divided:
    """A parameter, or one of the matrices that are joined in it, as devices would hold it.

    Attributes:
        path: of the parameter.
        part: what it is of a joined matrix: "query", "gate", ...; else "".
        unit: what is never cut: "heads", "experts" or "columns"; "" of what stays whole.
        count: of these units.
        is_divided: whether devices have different parts of it.
        arrays: one, or of a quantized matrix its integers, scales and minimums. Each with its
            sharding.
    """

    path: names.Path
    part: str
    unit: str
    count: int
    is_divided: bool
    arrays: tuple[jax.ShapeDtypeStruct, ...]


def mesh_of(devices: int) -> AbstractMesh:
    """A mesh of so many devices, of which none need exist.

    Raises:
        InvalidRequestError: less than one.
    """
    if devices < 1:
        raise InvalidRequestError(
            f"devices must be at least 1, got {devices}", parameter="devices"
        )
    return AbstractMesh((devices,), (AXIS,))


@cache
def parameter_shapes(config: GemmaConfig) -> dict[names.Path, tuple[int, ...]]:
    """The shape of every parameter of the model's tree, which is built without allocating it."""
    tree = nnx.eval_shape(lambda: Transformer(config, FLOAT32, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(tree))
    return {path: tuple(variable.get_value().shape) for path, variable in flat}


def divide_parameters(
    config: GemmaConfig, mesh: AbstractMesh, storage: Storage
) -> tuple[Divided, ...]:
    """Every parameter of the tree over the devices, what is joined in pieces."""
    return tuple(
        _divided(path, piece, mesh, storage)
        for path, shape in parameter_shapes(config).items()
        for piece in _pieces(config, path, shape)
    )


def divide_cache(cache: KVCache, mesh: AbstractMesh) -> KVCache:
    """An abstract cache over the devices: by key/value heads, and positions on every device.

    Args:
        cache: as `jax.eval_shape` gives it.
    """
    return replace(
        jax.tree.map(lambda array: divide(array, mesh, axis=None), cache),
        keys=tuple(divide(array, mesh, axis=2) for array in cache.keys),
        values=tuple(divide(array, mesh, axis=2) for array in cache.values),
    )


def divide(
    array: jax.ShapeDtypeStruct, mesh: AbstractMesh, *, axis: int | None, units: int | None = None
) -> jax.ShapeDtypeStruct:
    """The array with a sharding along an axis; whole on every device where units do not divide.

    Args:
        axis: None for whole on every device.
        units: of the axis, that are never cut; None for its length.
    """
    entries: list[str | None] = [None] * len(array.shape)
    if axis is not None and (array.shape[axis] if units is None else units) % mesh.size == 0:
        entries[axis] = AXIS
    sharding = NamedSharding(mesh, PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def bytes_of_a_device(tree: Any) -> int:
    """What one device holds of all arrays of a tree that has shardings. Each holds as much."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for array in jax.tree.leaves(tree)
    )


def bytes_of_one_copy(tree: Any) -> int:
    """What all arrays of a tree take where nothing is held twice."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(tree))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A matrix as it is divided, or a vector; see `Divided`."""

    shape: tuple[int, ...]
    part: str = ""
    unit: str = ""
    count: int = 1


def _divided(path: names.Path, piece: _Piece, mesh: AbstractMesh, storage: Storage) -> Divided:
    axis = 1 if piece.unit else None
    arrays = tuple(
        divide(array, mesh, axis=axis, units=piece.count) for array in storage.arrays(piece.shape)
    )
    return Divided(
        path=path,
        part=piece.part,
        unit=piece.unit,
        count=piece.count,
        is_divided=bool(piece.unit) and piece.count % mesh.size == 0 and mesh.size > 1,
        arrays=arrays,
    )


def _pieces(config: GemmaConfig, path: names.Path, shape: tuple[int, ...]) -> Iterator[_Piece]:
    """What a parameter is divided as: itself, or the matrices that are joined in it."""
    match path:
        case ("layers", int(layer), "attention", "query_key_value", "weight"):
            head_width = config.layers[layer].head_width
            widths = names.joined_outputs(config, path)
            # Some layers have no values of their own, some neither keys nor values.
            for part, width in zip(("query", "key", "value"), widths, strict=False):
                count = width // head_width
                yield _Piece(shape=(shape[0], width), part=part, unit="heads", count=count)
        case ("layers", int(), "feed_forward", "gate_up", "weight"):
            widths = names.joined_outputs(config, path)
            for part, width in zip(("gate", "up"), widths, strict=True):
                yield _Piece(shape=(shape[0], width), part=part, unit="columns", count=width)
        case ("layers", int(), "experts", "gate_up" | "down", "weight") if config.experts:
            # An expert's gate lies beside its own up projection: columns of whole experts.
            yield _Piece(shape=shape, unit="experts", count=config.experts.count)
        case ("streams", "into" | "back", "weight"):
            for stream, width in enumerate(names.joined_outputs(config, path), start=1):
                part = f"stream {stream}"
                yield _Piece(shape=(shape[0], width), part=part, unit="columns", count=width)
        case ("layers", int(), "experts" | "streams", _, "weight"):
            # What every device has to know of every token; a handful of outputs.
            yield _Piece(shape=shape)
        case _ if len(shape) == 1:
            yield _Piece(shape=shape)
        case _:
            yield _Piece(shape=shape, unit="columns", count=shape[1])
