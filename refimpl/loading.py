"""From a model's name to a model ready to run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refimpl.model.gemma import Gemma

Progress = Callable[[str, int, int], None]


def load(
    name: str | None = None, *, numerics: str = "float32", progress: Progress | None = None
) -> "Gemma":
    """Find a model, fetch it if need be, and load it.

    Programs that are compiled for it later are kept in the user's cache directory.

    Args:
        name: a file or folder, an id or tag that `refimpl models` lists, or a Hub id; None for the
            embedded Gemma 3 270M.
        numerics: "float32", "hf_bfloat16" or "deepmind_bfloat16": where the forward pass rounds.
        progress: called with what is being done, and how much of it is done and to do.

    Raises:
        RefimplError: no such model, or it cannot be loaded; the message says why and what to do.
    """
    # Imported here, because JAX takes seconds and `import refimpl` should not.
    from refimpl_weights.embedded import cache_folder

    from refimpl.engine.compile_cache import enable_compile_cache
    from refimpl.model.gemma import load_checkpoint
    from refimpl.model.numerics import preset
    from refimpl.model.registry import locate

    rounding = preset(numerics)
    enable_compile_cache(cache_folder())
    path = locate(name, progress=_labelled(progress, "assembling the embedded model"))
    return load_checkpoint(
        path,
        numerics=rounding,
        cache_dir=cache_folder(),
        progress=_labelled(progress, "loading weights"),
    )


def _labelled(progress: Progress | None, label: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(label, done, total)
