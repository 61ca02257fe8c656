"""Every parameter of a model, read from its checkpoint exactly once.

Our tree of parameters is walked and the file's tensors are looked up. Whatever is missing, left
over, of another shape or not finite is collected, and one error lists it all; a model is never
returned in part. Tensors are read one at a time and keep the file's precision.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from refimpl_kernels.matrix import Matrix
from refimpl_weights.errors import WeightsError
from refimpl_weights.quantized import QuantizedArray

from refimpl.errors import CheckpointError
from refimpl.model import names
from refimpl.model.checkpoint import Checkpoint
from refimpl.model.device import to_device
from refimpl.model.numerics import FLOAT32, Numerics
from refimpl.model.transformer import Transformer, abstract_transformer

Progress = Callable[[int, int], None]

# What the kernels widen without loss. A tensor of integers belongs to a quantization that we do not
# know, and a float64 would lose bits.
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))


def load_model(
    checkpoint: Checkpoint, numerics: Numerics = FLOAT32, *, progress: Progress | None = None
) -> Transformer:
    """The model with the checkpoint's weights, matrices in the precision of the file.

    Args:
        numerics: where the forward pass rounds.
        progress: called with parameters read so far and in all.

    Raises:
        CheckpointError: listing every tensor that is missing, unused, mis-shaped, mistyped,
            unreadable or not finite.
    """
    graph, state = nnx.split(abstract_transformer(checkpoint.config, numerics))
    wanted = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    plan, faults = _plan(checkpoint, wanted)
    arrays, more_faults = _read_all(
        checkpoint, plan, wanted, progress or _no_progress, keep=not faults
    )
    _raise_if(faults + more_faults, checkpoint)
    return nnx.merge(graph, nnx.traversals.unflatten_mapping(arrays))


def _plan(
    checkpoint: Checkpoint, wanted: Mapping[names.Path, tuple[int, ...]]
) -> tuple[dict[names.Path, tuple[str, ...]], list[str]]:
    """The file's tensors for each of our parameters, and all that does not fit."""
    faults: list[str] = []
    plan: dict[names.Path, tuple[str, ...]] = {}
    used: set[str] = set()
    for path, shape in wanted.items():
        alternatives = checkpoint.sources[path].alternatives
        chosen = next(
            (found for found in alternatives if all(n in checkpoint.available for n in found)),
            alternatives[0],
        )
        used.update(chosen)
        missing = [name for name in chosen if name not in checkpoint.available]
        faults += [f"missing: {name}" for name in missing]
        if not missing:
            plan[path] = tuple(checkpoint.available[name] for name in chosen)
            faults += _shape_faults(checkpoint, path, plan[path], shape)
    for group in checkpoint.unread:
        used.update(group)
        faults += _unread_faults(checkpoint, group)
    faults += [f"unused: {full}" for name, full in checkpoint.available.items() if name not in used]
    return plan, faults


def _unread_faults(checkpoint: Checkpoint, group: names.Shapes) -> list[str]:
    """What is wrong with tensors that nothing reads: a sign of another architecture."""
    held = {name: checkpoint.available[name] for name in group if name in checkpoint.available}
    faults = [f"missing: {name}" for name in group if held and name not in held]
    return faults + [
        f"mis-shaped: {full} is {checkpoint.source.shape(full)}, expected {group[name]}"
        for name, full in held.items()
        if checkpoint.source.shape(full) != group[name]
    ]


def _shape_faults(
    checkpoint: Checkpoint, path: names.Path, tensors: tuple[str, ...], wanted: tuple[int, ...]
) -> list[str]:
    """What is wrong with the shapes, given that joined and transposed they must be `wanted`."""
    shapes = [checkpoint.source.shape(name) for name in tensors]
    if len(wanted) == 1:
        expected = [wanted]
    else:
        # One by one: a query too narrow and a key too wide would add up to the right sum.
        single = len(tensors) == 1
        joined = wanted[1:] if single else names.joined_outputs(checkpoint.config, path)
        expected = [(outputs, wanted[0]) for outputs in joined]
        height = names.stack_height(checkpoint.config, path)
        expected = [
            (height, outputs // height, inputs) if len(shape) == 3 else (outputs, inputs)
            for shape, (outputs, inputs) in zip(shapes, expected, strict=True)
        ]
    return [
        f"mis-shaped: {name} is {got}, expected {shape}"
        for name, got, shape in zip(tensors, shapes, expected, strict=True)
        if got != shape
    ]


def _read_all(
    checkpoint: Checkpoint,
    plan: Mapping[names.Path, tuple[str, ...]],
    wanted: Mapping[names.Path, tuple[int, ...]],
    progress: Progress,
    *,
    keep: bool,
) -> tuple[dict[names.Path, Matrix], list[str]]:
    """Every parameter, and what is wrong with the tensors' content.

    From the first fault on, or from the start unless `keep`, tensors are only looked through.
    """
    total = sum(int(np.prod(shape)) for shape in wanted.values())
    done, faults = 0, []
    arrays: dict[names.Path, Matrix] = {}
    for path, tensors in plan.items():
        read: list[np.ndarray | QuantizedArray] = []
        for name in tensors:
            try:
                read.append(checkpoint.source.read(name))
            except WeightsError as error:
                faults.append(f"unreadable: {error}")
            else:
                faults += _content_faults(name, read[-1])
        if keep and not faults:
            arrays[path] = to_device(read, is_table=path[-2] in ("table", "head"))
        done += int(np.prod(wanted[path]))
        progress(done, total)
    return arrays, faults


def _content_faults(name: str, array: np.ndarray | QuantizedArray) -> list[str]:
    if isinstance(array, QuantizedArray):
        floats = [part for part in (array.scales, array.minimums) if part is not None]
    elif array.dtype in _FLOATS:
        floats = [array]
    else:
        expected = ", ".join(dtype.name for dtype in _FLOATS)
        return [f"mistyped: {name} is {array.dtype.name}, expected one of {expected}"]
    return [] if all(bool(np.isfinite(part).all()) for part in floats) else [f"not finite: {name}"]


def _raise_if(faults: list[str], checkpoint: Checkpoint) -> None:
    if not faults:
        return
    listed = "\n  ".join(faults)
    raise CheckpointError(
        f"{checkpoint.path} does not hold the {checkpoint.config.family} model that its "
        f"configuration describes; {len(faults)} faults:\n  {listed}"
    )


def _no_progress(done: int, total: int) -> None:
    del done, total
