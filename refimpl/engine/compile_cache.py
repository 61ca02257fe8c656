"""Compiled programs on disk, so that only the first start pays for compilation."""

import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import jax

# An entry that saves less than this many seconds is not worth its file.
_MIN_SECONDS = 0.2


def enable_compile_cache(folder: Path) -> Path | None:
    """Keep JAX's compiled programs in a folder of this machine's own, and read them from there.

    Programs hold instructions of the processor that they were compiled for, and JAX versions do
    not read each other's. So both are part of the path: a home directory that several machines
    share must not make one of them crash.

    Args:
        folder: for files that may be deleted at any time.

    Returns:
        The folder used; None if nothing can be written there, so that nothing is kept.
    """
    place = folder / "compiled" / f"jax-{jax.__version__}-{processor()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(place, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return place


@cache
def processor() -> str:
    """A short hash of what the processor can do."""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        lines = cpu_info.read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    else:
        features = platform.processor()
    described = f"{platform.machine()} {features}"
    return hashlib.sha256(described.encode()).hexdigest()[:12]
