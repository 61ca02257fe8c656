"""What every test runs under: strict promotion, and one compile cache for a run's processes."""

import os
import shutil
import tempfile

import jax
import pytest

from tests import compiled

# An accidental float64 or a silent broadcast of ranks is how a wrong number gets in.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Give all processes of this run a cache of compiled programs, empty at its beginning.

    Files in different processes compile the same tiny models; once is enough.
    """
    del config
    if compiled.VARIABLE not in os.environ:
        os.environ[compiled.VARIABLE] = tempfile.mkdtemp(prefix="refimpl-test-compiled-")
    _use_the_cache()


def pytest_runtest_teardown() -> None:
    """`refimpl.load` names another cache, in which the processes of a run would share nothing."""
    _use_the_cache()


def _use_the_cache() -> None:
    jax.config.update("jax_compilation_cache_dir", str(compiled.folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The first process, which no other one started, takes the cache away."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(compiled.VARIABLE))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device, and the machine says whether there is one."""
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
