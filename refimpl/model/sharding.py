"""How a model would be divided among devices: shapes and layouts, without a device or an array.

Tensor parallelism. Every matrix "i o" is divided along its outputs, so that each device computes
whole outputs: no sum over inputs is cut, and a divided run could give the bits of one device. (The
usual division cuts the inputs of the two output projections and adds up partial sums, which takes
as much memory, but rounds in another order.)

    queries, keys, values    by whole heads, and the cache with them
    gate, up and all others  by column
    experts                  by whole experts
    vocabulary tables        by token, which is their column
    norms, routers           whole on every device

What lies joined in one matrix of ours (queries, keys and values; gate and up) is laid out here as
the matrices that it was joined from, because columns of the joined one would give one device all
keys and none of the queries. A divided run would have to join each device's shares anew; the bytes
of every device are exact all the same.

The devices are a mesh with an axis for each prime factor of their number, and a dimension is
divided over the first axes, as many as divide it evenly. So 4 key/value heads are 4 shares on 8
devices, each on the two neighbours whose queries read that head; and one head, or 5 columns on 4
devices, are whole on every device.

Nothing here runs: the engine knows one device. A plan counts what each would have to hold.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from refimpl.errors import InvalidRequestError
from refimpl.model import names
from refimpl.model.config import GemmaConfig
from refimpl.model.storage import Storage
from refimpl.model.transformer import abstract_transformer

AXIS = "model"  # with a number


@dataclass(frozen=True, kw_only=True)
class Divided:
    """A parameter, or one of the matrices that are joined in it, as devices would hold it.

    Attributes:
        path: of the parameter.
        part: what it is of a joined matrix: "query", "gate", ...; else "".
        unit: what is never cut: "heads", "experts" or "columns"; "" of what stays whole.
        count: of these units.
        shares: into how many it is divided; each share is on as many devices as any other.
        arrays: one, or of a quantized matrix its integers, scales and minimums. Each with its
            sharding.
    """

    path: names.Path
    part: str
    unit: str
    count: int
    shares: int
    arrays: tuple[jax.ShapeDtypeStruct, ...]


def mesh_of(devices: int) -> AbstractMesh:
    """A mesh of so many devices, of which none need exist: an axis for each prime factor.

    >>> mesh_of(12).axis_sizes
    (2, 2, 3)

    Raises:
        InvalidRequestError: less than one.
    """
    if devices < 1:
        raise InvalidRequestError(f"devices must be at least 1, got {devices}", parameter="devices")
    factors, factor, left = list[int](), 2, devices
    while factor * factor <= left:
        if left % factor:
            factor += 1
        else:
            factors.append(factor)
            left //= factor
    factors += [left] if left > 1 or not factors else []
    return AbstractMesh(tuple(factors), tuple(f"{AXIS}{i}" for i in range(len(factors))))


def shares_of(units: int, mesh: AbstractMesh) -> int:
    """Into how many shares so many units are divided.

    >>> [shares_of(units, mesh_of(12)) for units in (24, 8, 6, 1)]
    [12, 4, 2, 1]
    """
    return math.prod(mesh.shape[name] for name in _axes_for(units, mesh))


def _axes_for(units: int, mesh: AbstractMesh) -> tuple[str, ...]:
    """The first axes of the mesh, as many as together divide the units evenly."""
    shares, chosen = 1, list[str]()
    for name, size in mesh.shape.items():
        if units % (shares * size):
            break
        shares *= size
        chosen.append(name)
    return tuple(chosen)


@cache
def parameter_shapes(config: GemmaConfig) -> dict[names.Path, tuple[int, ...]]:
    """The shape of every parameter of the model's tree, which is built without allocating it."""
    tree = abstract_transformer(config)
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


def divide_keys(array: Array | jax.ShapeDtypeStruct, mesh: AbstractMesh) -> jax.ShapeDtypeStruct:
    """Cached keys or values "b s k h" by heads, as the matrices that they come from."""
    return divide(array, mesh, axis=2)


def divide(
    array: Array | jax.ShapeDtypeStruct,
    mesh: AbstractMesh,
    *,
    axis: int | None,
    units: int | None = None,
) -> jax.ShapeDtypeStruct:
    """The shape and type of an array with a sharding along an axis.

    Args:
        array: of which nothing but shape and type is looked at.
        axis: None for whole on every device.
        units: of the axis, that are never cut; None for its length.
    """
    entries: list[tuple[str, ...] | None] = [None] * len(array.shape)
    if axis is not None:
        entries[axis] = _axes_for(array.shape[axis] if units is None else units, mesh) or None
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
        shares=shares_of(piece.count, mesh) if piece.unit else 1,
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
