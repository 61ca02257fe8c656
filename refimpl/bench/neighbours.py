"""What other programs, and other virtual machines, took of the processors while we measured.

llama.cpp's threads wait for one another by spinning: one of them without a processor for a moment
slows the others down by far more than that moment. So figures mean little if this is not near 0.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STATISTICS = Path("/proc/stat")


@dataclass(frozen=True)
class Usage:
    """Seconds on processors, added up over all of them, until a moment.

    Attributes:
        moment: in seconds, of `time.perf_counter`.
        all_busy: of every program, and what the host of a virtual machine gave to others.
        own: of this process, and of those it started that have ended.
    """

    moment: float
    all_busy: float
    own: float


def usage() -> Usage | None:
    """Usage up to now; None where the system does not tell (any but Linux)."""
    if not _STATISTICS.is_file():
        return None
    return Usage(time.perf_counter(), busy_seconds(_STATISTICS.read_text()), sum(os.times()[:4]))


def busy_seconds(statistics: str) -> float:
    """Processor seconds that were not idle, from the text of /proc/stat (see proc(5)).

    Its first line counts, in ticks: user, nice, system, idle, waiting, two kinds of interrupts,
    stolen by the host, and guests, which user and nice hold already.
    """
    user, nice, system, _, _, hard, soft, stolen, *_ = map(
        int, statistics.split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + hard + soft + stolen) / os.sysconf("SC_CLK_TCK")


def share_of_others(begin: Usage | None, end: Usage | None) -> float | None:
    """How much of all processors others used between two moments: 0 for none of it, 1 for all."""
    if begin is None or end is None:
        return None
    others = (end.all_busy - begin.all_busy) - (end.own - begin.own)
    # Ticks are coarse, so a quiet machine may come out a little below 0.
    return max(0.0, others / ((end.moment - begin.moment) * (os.cpu_count() or 1)))
