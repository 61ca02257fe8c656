"""Memory that is not needed at the moment, given back to the system where Linux and glibc run."""

import ctypes
import ctypes.util
import mmap
import sys
from functools import cache
from typing import cast

import jax


def release_freed() -> None:
    """Give freed memory back, where the C library can be asked to.

    Reading or compiling a program of a CPU leaves some tens of megabytes of freed memory in the
    arenas of glibc, which keeps it.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def release_zeros(array: jax.Array) -> None:
    """Give the memory of an array of zeros back: what is read of it then still is zero.

    The system gives a page of zeros again to whoever writes there. Of arrays that are not in a
    CPU's memory nothing is given back.

    Args:
        array: all zeros, ready, on one device, and written by nobody meanwhile. Anything else in it
            would be lost.
    """
    library = _glibc()
    if library is None or next(iter(array.devices())).platform != "cpu":
        return
    begin = array.unsafe_buffer_pointer()
    end = begin + array.nbytes
    # Whole pages: the neighbours' bytes are not ours.
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        # It fails where memory is locked, for one; then all stays as it is, which is zeros, too.
        advice = cast(int, mmap.MADV_DONTNEED)  # Unknown to type checkers on other systems.
        library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


@cache
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    library = None if name is None else ctypes.CDLL(name)
    return library if hasattr(library, "malloc_trim") else None
