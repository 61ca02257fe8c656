"""Loading the real Gemma 3 270M keeps to its budget of memory: 1.2 times the file, and 600 MB."""

import subprocess
import sys

from refimpl_weights import embedded

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
