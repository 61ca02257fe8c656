"""In which arrays a weight lies in memory, for each precision that a file may have.

Dense types stay as the file has them. Quantized ones become a `QuantizedMatrix`: integers of one
byte each, whatever the file packs them into, and float32 scales (and minimums, where the type has
them) for each block of inputs. So of the types with 32 weights a scale, those without minimums take
1.125 bytes a weight, from 8-bit to 4-bit ones alike, and those with minimums 1.25.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
from refimpl_weights.ggml_blocks import BLOCK_FORMATS, BlockFormat

from refimpl.errors import InvalidRequestError

_DENSE: Mapping[str, jnp.dtype] = MappingProxyType(
    {name: jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
)
_QUANTIZED: Mapping[str, BlockFormat] = MappingProxyType(
    {kind.name.lower(): form for kind, form in BLOCK_FORMATS.items()}
)
# What llama.cpp's quantizer takes for rows that are no multiple of 256 weights.
_FOR_SHORT_ROWS: Mapping[str, str] = MappingProxyType(
    {
        "q2_k": "iq4_nl",
        "q3_k": "iq4_nl",
        "iq4_xs": "iq4_nl",
        "q4_k": "q5_0",
        "q5_k": "q5_1",
        "q6_k": "q8_0",
    }
)


@dataclass(frozen=True)
class Storage:
    """A precision that all weights of a file have, as far as they can.

    Attributes:
        name: "bfloat16", "float16", "float32", or a type of ggml in small letters, as "q4_k". In a
            quantized file vectors are float32, and so are matrices whose inputs no block divides;
            real files also keep some small matrices wider than the rest.
    """

    name: str

    def __post_init__(self) -> None:
        """Refuse a type that no file of ours has.

        Raises:
            InvalidRequestError: naming the types there are.
        """
        if self.name not in _DENSE and self.name not in _QUANTIZED:
            raise InvalidRequestError(
                f"dtype must be one of {', '.join([*_DENSE, *_QUANTIZED])}; got {self.name!r:.100}",
                parameter="dtype",
            )

    def arrays(self, shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a weight "i o" lies in: one array, or integers, scales and minimums.

        Shapes have the inputs first, though a quantized matrix of a layer lies the other way round.

        Args:
            shape: of a matrix, inputs first, or of a vector.
        """
        form = self._form(shape)
        if form is None:
            dtype = _DENSE.get(self.name, jnp.dtype(jnp.float32))
            return (jax.ShapeDtypeStruct(shape, dtype),)
        inputs, outputs = shape
        factor = jax.ShapeDtypeStruct((inputs // form.group, outputs), jnp.float32)
        factors = (factor, factor) if form.has_minimums else (factor,)
        return jax.ShapeDtypeStruct(shape, jnp.int8), *factors

    def _form(self, shape: tuple[int, ...]) -> BlockFormat | None:
        """How the weight is quantized; None if it is dense."""
        if self.name in _DENSE or len(shape) == 1:
            return None
        for name in (self.name, _FOR_SHORT_ROWS.get(self.name, self.name)):
            if shape[0] % _QUANTIZED[name].columns == 0:
                return _QUANTIZED[name]
        return None
