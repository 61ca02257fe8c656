"""Reference implementation of Google's Gemma language models in pure Python on JAX.

import refimpl

gemma = refimpl.load()                     # the embedded Gemma 3 270M
gemma = refimpl.load("gemma3:4b")          # an id or tag of the registry, a file or a folder

with refimpl.Engine(gemma) as engine:
    print(engine.complete("The capital of France is", refimpl.SamplingParams(temperature=0)))
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from refimpl import sources as sources  # First: it notes when.
from refimpl.errors import RefimplError as RefimplError
from refimpl.loading import load as load

__version__ = _version("refimpl")

if TYPE_CHECKING:
    from refimpl.engine.engine import Engine as Engine
    from refimpl.engine.engine import EngineOptions as EngineOptions
    from refimpl.engine.request import SamplingParams as SamplingParams
else:
    # Imported at first use, because JAX takes seconds and `import refimpl` should not.
    _HOMES = {
        "Engine": "refimpl.engine.engine",
        "EngineOptions": "refimpl.engine.engine",
        "SamplingParams": "refimpl.engine.request",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_import_module(_HOMES[name]), name)

    def __dir__():
        return sorted({*globals(), *_HOMES})
