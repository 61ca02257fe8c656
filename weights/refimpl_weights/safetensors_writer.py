"""Writing safetensors, the other direction of `safetensors.py`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from refimpl_weights.errors import WeightsError


def write_safetensors(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file, bit for bit; the format keeps names, but no order of theirs.

    Args:
        path: of the file.
        arrays: by name.
        metadata: strings by name, which say something of the file as a whole.

    Raises:
        WeightsError: the file cannot be written, or the format has no such element type.
    """
    # The package writes the memory as it lies, whatever the order of the axes in it.
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        save_file(ordered, path, metadata=None if metadata is None else dict(metadata))
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be written: {error}; is the folder there?") from error
