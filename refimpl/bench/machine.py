"""The machine that was measured on: what it is, and how fast it copies memory."""

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

# Large against every cache, small against every memory: 256 MiB, and as much to copy to.
_COPY_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What figures of another machine cannot be compared without.

    Attributes:
        processor: its name.
        cores: that this process may run on.
        memory_bytes: of the whole machine.
        load_average: processes that wanted to run in the minute before; 0 is a quiet machine.
        copy_bytes_per_second: see `copy_bandwidth`.
        system: name and release of the operating system.
        python: version.
        jax: version.
    """

    processor: str
    cores: int
    memory_bytes: int
    load_average: float
    copy_bytes_per_second: float
    system: str
    python: str
    jax: str


def describe_machine() -> Machine:
    """This machine. Takes about a second, most of it to measure the memory."""
    load_average = os.getloadavg()[0]
    return Machine(
        processor=_processor_name(),
        cores=num_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=load_average,
        copy_bytes_per_second=copy_bandwidth(threads=num_cores()),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        jax=version("jax"),
    )


def num_cores() -> int:
    """Cores that this process may run on, which a container may have fewer of than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def copy_bandwidth(*, threads: int, nbytes: int = _COPY_BYTES, repeat: int = 5) -> float:
    """Bytes per second that this machine copies from memory to memory, best of several runs.

    Counts every byte twice, once read and once written, and nothing else: what the processor reads
    in order to overwrite it is not counted. Each thread copies a part of its own.

    Args:
        threads: that copy at once.
        nbytes: to copy.
        repeat: number of runs.
    """
    parts = [np.ones(nbytes // threads, np.uint8) for _ in range(threads)]
    targets = [np.zeros_like(part) for part in parts]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeat):
            begin = time.perf_counter()
            list(pool.map(np.copyto, targets, parts))
            best = min(best, time.perf_counter() - begin)
    return 2 * sum(part.nbytes for part in parts) / best


def _processor_name() -> str:
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
