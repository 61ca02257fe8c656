"""Prefill and decode on a CPU as a chain of programs: into the stream, layers, out of it, a draw.

All layers of one specification and one form of weights share a program. So what is compiled, kept
on disk and read at a start does not grow with the number of layers, nor does the memory that XLA
takes for it. To draw is most of what there is to compile in decode; its program takes row after
row, so that all widths share it. A call costs the host about 0.1 milliseconds a layer, while the
device is still computing the layers before.

Measured (Gemma 3 270M from Q4_K_M, eight slots, Xeon with 2 threads; before is all layers in one
program): to compile everything 120 s before, 45 s now; to read it back 12 s and 4; resident at the
peak 1,810 MB and 1,400; first token of a fresh process 7.7 s and 4.5, with weights and imports
improved, too. A step of one stream 30 ms and 31, of eight 92 and 83. One program that draws instead
of one for each width: all programs 256 MB in memory instead of 318, and a step of eight 65.5 ms
instead of 63.4 (later, so the numbers before are others).
"""

from collections.abc import Sequence
from dataclasses import replace

from jax import Array

from refimpl.engine.forward import Forward, Parameters
from refimpl.engine.program import Program
from refimpl.engine.state import DecodeState


class Layered:
    """A pass over the state: parameters, state and a packed array to a state and what comes out."""

    def __init__(
        self,
        forward: Forward,
        *,
        enter: Program,
        layers: Sequence[Program],
        leave: Program,
        draw: Program | None = None,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            forward: says how layers follow each other.
            enter: (parameters beside the layers, state, packed) -> state, `Entered`.
            layers: for each layer, (its parameters, what it holds, `LayerCall`) -> what it holds,
                stream.
            leave: (parameters beside the layers, state, stream, packed) -> state, result.
            draw: (nothing, state, the result of `leave`) -> state, result; what is left to do
                without parameters, if anything.
        """
        self._forward, self._layers = forward, layers
        self._enter, self._leave = enter, leave
        self._drawing = draw and draw.of(())
        self._parameters: Parameters | None = None

    def __call__(
        self, parameters: Parameters, state: DecodeState, packed: Array
    ) -> tuple[DecodeState, Array]:
        """The state, which is donated, and the result."""
        if parameters is not self._parameters:
            self._bind(parameters)
        keys, values = state.cache.keys, state.cache.values
        # Keys and values go through the layers alone; the others would carry them along.
        state, entered = self._entering(_with_held(state, (), ()), packed)
        cache = replace(state.cache, keys=keys, values=values)
        cache, x = self._forward.through_layers(self._through, cache, entered)
        state, result = self._leaving(state, x, packed)
        if self._drawing is not None:
            state, result = self._drawing(state, result)
        return _with_held(state, cache.keys, cache.values), result

    def _bind(self, parameters: Parameters) -> None:
        """Take the parameters apart, which all calls share."""
        outer = {name: part for name, part in parameters.items() if name != "layers"}
        self._parameters = parameters
        self._entering, self._leaving = self._enter.of(outer), self._leave.of(outer)
        self._through = [
            program.of(parameters["layers"][index]) for index, program in enumerate(self._layers)
        ]


def _with_held(
    state: DecodeState, keys: tuple[Array, ...], values: tuple[Array, ...]
) -> DecodeState:
    return replace(state, cache=replace(state.cache, keys=keys, values=values))
