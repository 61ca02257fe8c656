"""What every checkpoint format looks like from outside: names, shapes, and one read at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from refimpl_weights.quantized import QuantizedArray


@runtime_checkable
class TensorSource(Protocol):
    """An open checkpoint. Nothing but headers is in memory until `read` is called.

    Names are the file's own. Shapes are row-major, as numpy prints them: a linear weight is
    `(outputs, inputs)` in every format.
    """

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The header's key-value pairs; empty where the format has none."""
        ...

    def names(self) -> tuple[str, ...]:
        """Every tensor in the checkpoint, in the file's order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header alone."""
        ...

    def read(self, name: str) -> np.ndarray | QuantizedArray:
        """One tensor in memory of its own, in the precision of the file (bfloat16 stays so).

        Raises:
            FormatError: the bytes are not all there.
        """
        ...
