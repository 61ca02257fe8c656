"""Counting work where a clock would measure the neighbours on the machine."""

import gc
import sys
from collections.abc import Callable
from typing import Any


def work_of(run: Callable[[], Any]) -> int:
    """How many lines of Python and calls of anything it takes.

    Without the garbage collector, which would run in the midst of whatever it is that is counted,
    and JAX's own lines with it.
    """
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    was_collecting = gc.isenabled()
    gc.disable()
    sys.settrace(trace)
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
        if was_collecting:
            gc.enable()
    return count
