"""What loading takes, 1.2 times the file and 600 MB; and memory that is given back."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from refimpl_weights import embedded

from refimpl.engine import state
from tests.engines import tiny_programs

LOAD = """
from pathlib import Path
import refimpl
gemma = refimpl.load()
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def test_peak_memory_of_loading() -> None:
    file_bytes = embedded.assemble().stat().st_size
    ended = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=280, check=True
    )
    # VmHWM, unlike ru_maxrss, begins anew with the program; Linux counts in units of 1024 bytes.
    assert int(ended.stdout) * 1024 < 1.2 * file_bytes + 600e6


RELEASE = """
import jax
import numpy as np
from pathlib import Path
from refimpl.engine.memory import release_zeros

def resident():
    status = Path("/proc/self/status").read_text()
    return int(next(x.split()[1] for x in status.splitlines() if x.startswith("RssAnon"))) * 1024

beside = jax.block_until_ready(jax.numpy.ones(1000))
zeros = jax.block_until_ready(jax.numpy.zeros((1024, 1024, 25), jax.numpy.float32))
before = resident()
release_zeros(zeros)
print(before - resident())
assert not np.asarray(zeros).any() and np.asarray(beside).all()
# Less than a page, and next to other arrays.
small = [jax.block_until_ready(jax.numpy.array(np.full(n, n % 2))) for n in range(1, 3000, 7)]
for number, array in enumerate(small):
    if number % 2:
        release_zeros(array)
for number, array in enumerate(small):
    assert (np.asarray(array) == len(array) % 2).all()
written = jax.jit(lambda x: x.at[5].set(1), donate_argnums=0)(zeros)
assert np.asarray(written).sum() == 1024 * 25 and np.asarray(written[5]).all()
"""


def printed(source: str, **variables: str) -> str:
    """What it prints in a process with these variables, and none of the tests' own for glibc."""
    for_glibc = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if name not in for_glibc}
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
        env={**kept, "JAX_PLATFORMS": "cpu", **variables},
    ).stdout


def test_zeros_take_no_memory_until_they_are_written() -> None:
    # Of 105 MB.
    assert int(printed(RELEASE)) > 100e6


ARENAS = """
import ctypes, threading
from refimpl.engine.memory import share_arenas

share_arenas()
library = ctypes.CDLL("libc.so.6")
every = threading.Barrier(16)

def allocate():
    library.malloc(100)
    every.wait(60)

threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
library.fdopen.restype = ctypes.c_void_p
library.malloc_info(0, ctypes.c_void_p(library.fdopen(1, b"w")))
library.fflush(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
@pytest.mark.parametrize(("variables", "most"), [({}, 2), ({"MALLOC_ARENA_MAX": "5"}, 5)])
def test_threads_of_a_server_share_arenas(variables: dict[str, str], most: int) -> None:
    assert printed(ARENAS, **variables).count("<heap ") == most


def test_what_an_engine_gives_back_is_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys and values, when they are new and again when warming up is over."""
    released = list[int]()

    def spy(array: jax.Array) -> None:
        assert not np.asarray(array).any()
        released.append(array.unsafe_buffer_pointer())

    programs = tiny_programs()  # It starts a worker to compile them.
    monkeypatch.setattr(state, "release_zeros", spy)
    now = programs.new_state()
    num_held = len(now.cache.keys) + len(now.cache.values)
    assert len(set(released)) == len(released) == num_held
    for _, call in programs.warm_up(now):
        now = call()
    last = released[num_held:]
    assert set(last) == {
        held.unsafe_buffer_pointer() for held in (*now.cache.keys, *now.cache.values)
    }
