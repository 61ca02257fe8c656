"""The folder of compiled programs that all processes of a run of the tests share.

Imports nothing of the project: `conftest.py` is read before the types of its arrays are checked.
"""

import os
from pathlib import Path

VARIABLE = "REFIMPL_TEST_COMPILED"


def folder() -> Path:
    """The folder, which `conftest.py` makes when a run begins."""
    return Path(os.environ[VARIABLE])
