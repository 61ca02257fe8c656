"""Memory that the device's programs do not need at the moment, given back to the system.

Only on Linux with glibc, and only on a CPU; elsewhere nothing is done.
"""

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

    The system gives a page of zeros again to whoever writes there, so a cache of long contexts
    takes memory only as far as it is used.

    Args:
        array: all zeros, of any shape, and read or written by nobody meanwhile.
    """
    library = _glibc()
    if library is None or next(iter(array.devices())).platform != "cpu":
        return
    begin = array.unsafe_buffer_pointer()
    end = begin + array.nbytes
    # Whole pages: the neighbours' bytes are not ours.
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        # Refused where memory is locked; then it stays as it is.
        library.madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), cast(int, mmap.MADV_DONTNEED)
        )


@cache
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    library = None if name is None else ctypes.CDLL(name)
    return library if hasattr(library, "malloc_trim") else None
