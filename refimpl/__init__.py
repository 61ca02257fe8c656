"""Reference implementation of Google's Gemma language models in pure Python on JAX.

import refimpl

gemma = refimpl.load()                     # the embedded Gemma 3 270M
gemma = refimpl.load("gemma3:4b")          # an id or tag of the registry, a file or a folder
"""

from importlib.metadata import version as _version

from refimpl.errors import RefimplError as RefimplError
from refimpl.loading import load as load

__version__ = _version("refimpl")
