"""The compiled programs over a model's state: all of them, in one table, each of fixed shapes.

    prefill C    a chunk of at most C tokens of one slot's prompt into the cache
    score C      what the model says of such a chunk's next tokens
    decode W     one or more steps of at most W slots
    admit        what a slot needs to know before it is decoded
    bias         a slot's bias, and which ids its prompt holds
    fork         one slot's prompt into another slot
    save, load   a block of one slot's cache out of the state, and into it
    reset        zeros into one slot's cache

On a CPU, prefill and decode are chains of programs, of which one computes a layer and, in decode,
one draws the tokens row by row, whatever the width (`layered.py`).

Why a request gets the same bits whatever else runs: a prompt is cut by its own length alone
(`chunks_of`) and prefilled by itself. In decode each row's numbers come from kernels that treat a
row alike at any width W and in any place: `linear` as chains, blocked attention over the slot's
own blocks of positions, sums over the vocabulary in an order of their own, all compiled with
`row_stable_options`. A sum that the compiler may contract differently in another program stands
behind a barrier. The tests hold every width, slot and number of steps against each other. A
prompt's last token is not prefilled but decoded, so that all tokens come out of one program.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from refimpl_kernels.compiling import row_stable_options

from refimpl.engine import slots as on_slots
from refimpl.engine.executables import ExecutableStore, store_of_this_machine
from refimpl.engine.layered import Layered
from refimpl.engine.packing import ADMISSION_FLOATS, ADMISSION_INTEGERS, MAX_STOP_IDS
from refimpl.engine.program import Program
from refimpl.engine.state import DecodeState
from refimpl.engine.steps import Steps
from refimpl.model.cache import BLOCK, KVCache
from refimpl.model.gemma import Gemma
from refimpl.model.layer_spec import LayerSpec

# The longest chunk is a block of the prefix cache, so that what is saved was computed in whole
# chunks. A short prompt, or the end of a long one, does not pay for a whole one.
CHUNKS = (32, BLOCK)
WIDTHS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt: its first position, how many tokens, and the length it is padded to."""

    start: int
    count: int
    padded: int


def chunks_of(num_tokens: int, *, start: int = 0) -> list[Chunk]:
    """How a prompt is cut from `start`, a multiple of a block, on.

    The cut depends on the prompt's length alone: from wherever it starts, the chunks after that
    place are the same.

    >>> chunks_of(140)
    [Chunk(start=0, count=128, padded=128), Chunk(start=128, count=12, padded=32)]
    """
    cut = []
    while start < num_tokens:
        left = num_tokens - start
        padded = next((length for length in CHUNKS if length >= left), CHUNKS[-1])
        cut.append(Chunk(start, min(left, padded), padded))
        start += padded
    return cut


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The programs of one model, for one number of slots. Each compiles at its first call.

    All take the parameters first, for the sake of one form, and all but `score` the state next.

    Attributes:
        gemma: the model.
        slots: rows of the state.
        context: positions that a slot can hold.
        max_steps: most steps of one call of decode.
    """

    gemma: Gemma
    slots: int
    context: int
    max_steps: int = 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that decode is compiled for."""
        enough = next((width for width in WIDTHS if width >= self.slots), WIDTHS[-1])
        return tuple(width for width in WIDTHS if width <= enough)

    @property
    def is_layered(self) -> bool:
        """Whether prefill and decode are made of programs for one layer each; see `layered.py`.

        One call of an accelerator does the work of many; and a loop of steps needs them all in it.
        """
        return self.max_steps == 1 and jax.default_backend() == "cpu"

    def read_ahead(self, *names: str) -> None:
        """Begin to read what is kept of these programs, or of those whose names begin so."""
        if self._store is not None:
            self._store.read_ahead(*names)

    def end_reading(self) -> None:
        """Forget what was read and not asked for."""
        if self._store is not None:
            self._store.end_reading()

    def new_state(self) -> DecodeState:
        """A state in which no slot runs."""

        def create() -> DecodeState:
            cache = KVCache.create(
                self.gemma.config,
                batch=self.slots,
                length=self.context,
                chunk=CHUNKS[-1],
                dtype=self.gemma.numerics.dtype,
            )
            v = self.gemma.config.vocab_size
            rows = self.widths[-1] if self.is_layered else 0
            return DecodeState.create(cache, slots=self.slots, num_logits=v, rows=rows)

        # One program: by itself, every array of another shape would be one.
        return jax.jit(create)().release_empty_cache()

    @cached_property
    def prefill(self) -> Callable[..., tuple[DecodeState, Array]]:
        """(parameters, state, [slot, start, count, *tokens]) -> state, stream "t d"."""
        steps = self._steps
        if self.is_layered:
            return self._layered("prefill", steps.prefill_enter, steps.prefill_leave)
        return self._compiled("prefill", steps.prefill)

    @cached_property
    def score(self) -> Callable[..., Array]:
        """(parameters, stream "t d", targets "t") -> rows "t SCORE_FIELDS"."""
        return self._compiled("score", self._steps.score, is_donated=False)

    @cached_property
    def decode(self) -> Callable[..., tuple[DecodeState, Array]]:
        """(parameters, state, [steps, *slots]) -> state, rows "max_steps w STEP_FIELDS".

        On a CPU w is the widest, and rows after those of the slots say nothing.
        """
        steps = self._steps
        if self.is_layered:
            return self._layered(
                "decode", steps.decode_enter, steps.decode_leave, draw=steps.draw_each
            )
        return self._compiled("decode", steps.decode)

    @cached_property
    def admit(self) -> Callable[..., DecodeState]:
        """(parameters, state, packed admission) -> state."""
        return self._compiled("admit", _without_parameters(on_slots.admit))

    @cached_property
    def bias(self) -> Callable[..., DecodeState]:
        """(parameters, state, [slot], bias "v", in_prompt "v") -> state."""
        return self._compiled("bias", _without_parameters(on_slots.set_bias))

    @cached_property
    def fork(self) -> Callable[..., DecodeState]:
        """(parameters, state, [from, to, positions]) -> state."""
        return self._compiled("fork", _without_parameters(on_slots.fork))

    @cached_property
    def save(self) -> Callable[..., on_slots.Block]:
        """(parameters, state, [slot, start]) -> block."""

        def save(state: DecodeState, packed: Array) -> on_slots.Block:
            return on_slots.save(state.cache, packed)

        return self._compiled("save", _without_parameters(save), is_donated=False)

    @cached_property
    def load(self) -> Callable[..., DecodeState]:
        """(parameters, state, [slot, start], block) -> state."""
        return self._compiled("load", _without_parameters(on_slots.load))

    @cached_property
    def reset(self) -> Callable[..., DecodeState]:
        """(parameters, state, [slot]) -> state."""
        return self._compiled("reset", _without_parameters(on_slots.reset))

    def warm_up(self, state: DecodeState) -> Iterator[tuple[str, Callable[[], DecodeState]]]:
        """Each program by name, with a call that changes nothing of use and compiles it.

        The calls must be made in turn; each gives the state for the next. The last leaves a cache
        of zeros and gives their memory back, so none of its slots may be in use.
        """
        parameters, current = self.gemma.parameters, state

        def run(program: Callable[..., Any], *arrays: Any) -> DecodeState:
            nonlocal current
            result = program(parameters, current, *jax.device_put(arrays))
            current = result[0] if isinstance(result, tuple) else result
            return current

        def scored(chunk: int) -> DecodeState:
            stream = np.zeros((chunk, self.gemma.config.width), self.gemma.numerics.dtype)
            self.score(parameters, *jax.device_put((stream, np.zeros(chunk, np.int32))))
            return current

        def saved_and_loaded() -> DecodeState:
            place = np.zeros(2, np.int32)
            return run(self.load, place, self.save(parameters, current, jax.device_put(place)))

        # What takes most memory to compile comes first, while little is held yet.
        for width in self.widths:
            # One step of no slot: a loop of no steps would leave its body's first run to a request.
            nobody = np.array([1, *[-1] * width], np.int32)
            yield f"decode {width}", partial(run, self.decode, nobody)
        for chunk in CHUNKS:
            yield f"prefill {chunk}", partial(run, self.prefill, np.zeros(3 + chunk, np.int32))
        fields = len(ADMISSION_INTEGERS) + len(ADMISSION_FLOATS) + MAX_STOP_IDS
        yield "admit", partial(run, self.admit, np.zeros(fields, np.int32))
        yield "fork", partial(run, self.fork, np.array([0, 0, BLOCK], np.int32))
        slot, v = np.zeros(1, np.int32), self.gemma.config.vocab_size
        yield "bias", partial(run, self.bias, slot, np.zeros(v, np.float32), np.zeros(v, bool))
        yield "save and load", saved_and_loaded
        for chunk in CHUNKS:
            yield f"score {chunk}", partial(scored, chunk)
        # Last, for it clears what the others did.
        yield "reset", lambda: run(self.reset, slot).release_empty_cache()

    @property
    def _steps(self) -> Steps:
        return Steps(self.gemma, self.max_steps)

    def _layered(
        self,
        phase: Literal["prefill", "decode"],
        enter: Callable[..., Any],
        leave: Callable[..., Any],
        *,
        draw: Callable[..., Any] | None = None,
    ) -> Layered:
        forward, specs = self._steps.forward(phase), self.gemma.config.layers
        # One program for all layers of a specification, traced as the first of them.
        layers = {
            spec: self._compiled(
                f"{phase} {spec.kind}",
                partial(forward.layer, specs.index(spec)),
                is_donated=spec.donor is None,
                further=spec,
            )
            for spec in specs
        }
        return Layered(
            forward,
            enter=self._compiled(f"{phase} enter", enter),
            layers=[layers[spec] for spec in specs],
            leave=self._compiled(f"{phase} leave", leave),
            draw=draw and self._compiled(f"{phase} draw", _without_parameters(draw)),
        )

    def _compiled(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        is_donated: bool = True,
        further: LayerSpec | None = None,
    ) -> Program:
        # The state is donated: it comes back as the result, and its memory is written in place.
        return Program(
            name,
            function,
            donated=is_donated,
            options=self._options,
            store=self._store,
            depends_on=repr((is_donated, further)),
        )

    @cached_property
    def _options(self) -> dict[str, str]:
        stable = row_stable_options(jax.default_backend())
        return {**stable, **self.gemma.numerics.compiler_options}

    @cached_property
    def _store(self) -> ExecutableStore | None:
        gemma = self.gemma
        leaves, tree = jax.tree.flatten(dict(gemma.parameters))
        depends_on = (
            gemma.config, gemma.numerics, gemma.vocab_size, gemma.suppressed_ids,
            self.slots, self.context, self.max_steps, self._options,
            str(tree), [(leaf.shape, leaf.dtype.name) for leaf in leaves],
        )  # fmt: skip
        return store_of_this_machine(repr(depends_on))


def _without_parameters(program: Callable[..., Any]) -> Callable[..., Any]:
    def run(parameters: Any, *arrays: Any) -> Any:
        del parameters
        return program(*arrays)

    return run
