"""What the programs need beside weights and state while they run: an estimate, and its parts.

Compilers decide in the end. Counted are the few intermediates that grow with the vocabulary, the
widest matrix or the context; all others are small beside them, and the margin is there for those.
For Gemma 3 270M from quantized weights with 8 slots the estimate in float32 is 94 MB, and XLA's own
account of its largest program on a CPU, which draws one row at a time, is 53. In bfloat16 it holds
for devices that multiply bfloat16: a CPU widens whole matrices and the cached keys first, and needs
764 MB for two layers of 32,768 positions where the estimate is 371.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh
from refimpl_kernels.linear import DOT_TILE

from refimpl.engine.programs import CHUNKS, WIDTHS
from refimpl.engine.steps import RANKED_ROWS, SCORE_ROWS
from refimpl.model.config import GemmaConfig
from refimpl.model.numerics import Numerics
from refimpl.model.sharding import parameter_shapes, shares_of

_FLOAT32 = 4
# Arrays over the vocabulary, for each row. Of what is drawn, where all rows are drawn at once:
# logits, what penalties and the temperature make of them, noise, and what XLA keeps on the way. Of
# what is ranked, logits apart.
_ARRAYS_OF_DRAWING = 10
_ARRAYS_OF_RANKING = 4


@dataclass(frozen=True, kw_only=True)
class Working:
    """Bytes of a device, of what is not there between two programs. One program runs at a time.

    Attributes:
        vocabulary: rows of logits in float32, and what drawing or ranking makes of them, undivided.
        widened: as many columns as a product widens to float32 at once, of the matrix where they
            are most; nothing where weights are float32.
        attention: scores and weights in float32, and the keys and values of the rows of a call, of
            the layer where they are most. Blocked attention, which float32 numerics take, holds a
            block of each only.
    """

    vocabulary: int
    widened: int
    attention: int

    @property
    def total(self) -> int:
        return self.vocabulary + self.widened + self.attention


def working_memory(
    config: GemmaConfig,
    *,
    mesh: AbstractMesh,
    is_wide: bool,
    numerics: Numerics,
    slots: int,
    context: int,
) -> Working:
    """An estimate for the largest of the engine's programs.

    Args:
        is_wide: whether weights are stored as float32.
        slots: choices that run together.
        context: positions that each can hold.
    """
    rows = max(
        SCORE_ROWS + _ARRAYS_OF_RANKING * RANKED_ROWS,
        _ARRAYS_OF_DRAWING * _width(slots),
    )
    widths = [
        shape[0] * min(DOT_TILE, shape[1] // shares_of(shape[1], mesh))
        for shape in parameter_shapes(config).values()
        if len(shape) == 2
    ]
    return Working(
        vocabulary=rows * config.vocab_size * _FLOAT32,
        widened=0 if is_wide else max(widths) * _FLOAT32,
        attention=0
        if numerics.activation == "float32"
        else _dense_attention(config, mesh, numerics, slots, context),
    )


def _dense_attention(
    config: GemmaConfig, mesh: AbstractMesh, numerics: Numerics, slots: int, context: int
) -> int:
    """Of the layer and the program, prefill or decode, where it is most."""
    most = 0
    for spec in config.layers:
        places = context if spec.window is None else min(context, spec.window + CHUNKS[-1])
        heads, kv_heads = (
            count // shares_of(count, mesh) for count in (config.num_heads, spec.num_kv_heads)
        )
        held = 2 * kv_heads * spec.head_width * numerics.dtype.itemsize
        for rows, queries in ((1, CHUNKS[-1]), (_width(slots), 1)):
            scored = 2 * heads * queries * _FLOAT32
            most = max(most, rows * places * (scored + held))
    return most


def _width(slots: int) -> int:
    """Rows of the widest program that decodes so many slots."""
    return next((width for width in WIDTHS if width >= slots), WIDTHS[-1])
