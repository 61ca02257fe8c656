"""Named intermediates of a forward pass: collect them, save them, compare them with another's.

The names are a stable interface, the same in notebooks, files and reports:

    embed                          scaled embedding
    streams                        all streams before the first layer, where there are several
    layers.3.attention.input       after the norm before attention
    layers.3.attention.query       after norm and rotary embedding; likewise key, value
    layers.3.attention.scores      scaled and capped, before the mask, "b k g t s"
    layers.3.attention.mixed       weighted values, before the output projection
    layers.3.attention.output      what attention adds to the stream
    layers.3.middle                the stream after attention
    layers.3.feed_forward.input    after the norm before the feed-forward; likewise gate, up
    layers.3.experts.router        scores of the experts, where there are any, "b t e"
    layers.3.feed_forward.output   what the feed-forward adds to the stream
    layers.3.per_layer_input       what the per-layer input adds, where there is one
    layers.3.residual              the stream after the layer, or all streams "u b t d"
    final_norm                     the stream after the last norm
    logits

Dictionaries lose that order on their way: `jax.jit` returns them sorted by name, and safetensors
files keep an order of their own. So it is taken from the names wherever it matters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from refimpl_weights.errors import WeightsError
from refimpl_weights.safetensors import SafetensorsCheckpoint
from refimpl_weights.safetensors_writer import write_safetensors

from refimpl.errors import TraceError

# Within a layer, in the order of the forward pass.
LAYER_STEPS = (
    "attention.input",
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.scores",
    "attention.mixed",
    "attention.output",
    "middle",
    "feed_forward.input",
    "feed_forward.gate",
    "feed_forward.up",
    "experts.router",
    "feed_forward.output",
    "per_layer_input",
    "residual",
)


def in_order(names: Iterable[str]) -> list[str]:
    """The names as the forward pass comes upon them, unknown ones last and as they were.

    >>> in_order(["logits", "layers.10.middle", "layers.2.residual", "layers.2.middle", "embed"])
    ['embed', 'layers.2.middle', 'layers.2.residual', 'layers.10.middle', 'logits']
    """
    return sorted(names, key=_place)


@dataclass
class Taps:
    """Takes note of the intermediates whose names match; by default of none, at no cost.

    One object serves one forward pass. Inside `jax.jit` the values are tracers: return `values`
    from the compiled function to have them as arrays.

    Attributes:
        wanted: shell patterns, such as "layers.*.residual"; a star also spans dots.
        prefix: put before every name.
        values: what was noted, by full name.

    Raises:
        TraceError: one string in place of a sequence of them.
    """

    wanted: Sequence[str] = ()
    prefix: str = ""
    values: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A string is a sequence of its letters, and the letter "*" would match everything.
        if isinstance(self.wanted, str):
            raise TraceError(
                f"wanted must be a list of patterns, got {self.wanted!r}; put it in []"
            )

    def __call__(self, name: str, value: Array) -> None:
        """Note a value if its name is wanted."""
        if self.wants(name):
            self.values[self.prefix + name] = value

    def wants(self, name: str) -> bool:
        """Whether a value of this name would be kept."""
        return any(fnmatchcase(self.prefix + name, pattern) for pattern in self.wanted)

    def scope(self, name: str) -> "Taps":
        """The same collection, seen from inside a part of the model."""
        return Taps(self.wanted, f"{self.prefix}{name}.", self.values)


def save(path: Path, trace: Mapping[str, Any]) -> None:
    """Write a trace as safetensors, bit for bit.

    Raises:
        TraceError: the file cannot be written, or a value is no array of numbers.
    """
    try:
        write_safetensors(path, {name: np.asarray(value) for name, value in trace.items()})
    except WeightsError as error:
        raise TraceError(f"cannot write the trace {path}: {error}") from error


def load(path: Path) -> dict[str, np.ndarray]:
    """Read a trace that `save` wrote, in the order of the forward pass.

    Raises:
        TraceError: the file is missing or is not safetensors.
    """
    try:
        file = SafetensorsCheckpoint(path)
        return {name: np.asarray(file.read(name)) for name in in_order(file.names())}
    except WeightsError as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error


@dataclass(frozen=True)
class Difference:
    """How one intermediate differs between two traces, as float64.

    Attributes:
        name: of the intermediate.
        largest: largest absolute difference; inf where one has a nan that the other has not.
        mean: mean absolute difference.
        relative: largest, over the root mean square of the first trace's values.
        where: index of the largest difference.
        is_within: whether `largest` is within the bound.
    """

    name: str
    largest: float
    mean: float
    relative: float
    where: tuple[int, ...]
    is_within: bool


def compare(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, bound: float
) -> tuple[Difference, ...]:
    """Differences of the names that both traces have, in the order of the forward pass.

    Args:
        bound: largest absolute difference that counts as equal, times max(1, root mean square).

    Raises:
        TraceError: no name in common, or a shape differs.
    """
    names = in_order(name for name in ours if name in theirs)
    if not names:
        raise TraceError(
            f"the traces have no name in common: one has {_some(ours)}, the other {_some(theirs)}"
        )
    return tuple(_difference(name, ours[name], theirs[name], bound) for name in names)


def report(differences: Sequence[Difference]) -> str:
    """A table of differences that marks the first one out of bounds.

    >>> print(report([Difference("embed", 0.0, 0.0, 0.0, (0,), True)]))
    [OK]   embed  max 0.0e+00  mean 0.0e+00  rel 0.0e+00  at 0
    """
    width = max((len(difference.name) for difference in differences), default=0)
    lines, is_first = [], True
    for difference in differences:
        mark = "" if difference.is_within or not is_first else "  <- first"
        is_first = is_first and difference.is_within
        lines.append(
            f"{'[OK]  ' if difference.is_within else '[DIFF]'} {difference.name:<{width}}  "
            f"max {difference.largest:7.1e}  mean {difference.mean:7.1e}  "
            f"rel {difference.relative:7.1e}  at {','.join(map(str, difference.where))}{mark}"
        )
    return "\n".join(lines)


def _place(name: str) -> tuple[int, int, int]:
    match name.split(".", 2):
        case ["embed"]:
            return (0, 0, 0)
        case ["streams"]:
            return (0, 1, 0)
        case ["layers", index, step] if index.isdecimal() and step in LAYER_STEPS:
            return (1, int(index), LAYER_STEPS.index(step))
        case ["final_norm"]:
            return (2, 0, 0)
        case ["logits"]:
            return (3, 0, 0)
    return (4, 0, 0)


def _difference(name: str, ours: Any, theirs: Any, bound: float) -> Difference:
    one, other = (np.asarray(side).astype(np.float64) for side in (ours, theirs))
    if one.shape != other.shape:
        raise TraceError(
            f"{name} has shape {one.shape} in one trace and {other.shape} in the other; "
            "were both made from the same tokens?"
        )
    if one.size == 0:
        return Difference(name, 0.0, 0.0, 0.0, (), True)
    with np.errstate(invalid="ignore"):  # inf - inf is nan, yet equal
        distance = np.asarray(np.abs(one - other))
    distance[np.isnan(distance)] = np.inf
    distance[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
    where = np.unravel_index(int(distance.argmax()), distance.shape)
    finite = one[np.isfinite(one)]
    scale = float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0
    largest = float(distance.max())
    return Difference(
        name=name,
        largest=largest,
        mean=float(distance.mean()),
        relative=largest / scale if scale > 0 else largest,
        where=tuple(int(i) for i in where),
        is_within=largest <= bound * max(1.0, scale),
    )


def _some(trace: Mapping[str, Any]) -> str:
    names = list(trace)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"
