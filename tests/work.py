"""Counting work where a clock would measure the neighbours on the machine."""

import sys
from collections.abc import Callable
from typing import Any


def work_of(run: Callable[[], Any]) -> int:
    """How many lines of Python and calls of anything it takes."""
    count = 0

    def trace(*_: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return count
