"""Memory that compiling has used and freed, given back to the system."""

import ctypes
import ctypes.util
import sys
from functools import cache


def release_freed() -> None:
    """Give freed memory back, where the C library can be asked to.

    Reading or compiling a program of a CPU leaves some tens of megabytes of freed memory in the
    arenas of glibc, which keeps it.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    library = None if name is None else ctypes.CDLL(name)
    return library if hasattr(library, "malloc_trim") else None
