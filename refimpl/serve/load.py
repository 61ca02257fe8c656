"""From the server's settings to a running engine."""

import jax

import refimpl
from refimpl.engine.engine import Engine, EngineOptions
from refimpl.model.cache import BLOCK
from refimpl.serve.fingerprint import fingerprint
from refimpl.server.loading import Loaded, Progress
from refimpl.server.settings import ServerSettings


def load(settings: ServerSettings, progress: Progress) -> Loaded:
    """The model and its engine, started.

    Args:
        settings: which model, and how big an engine.
        progress: is called with what is done, how much of it, and how much there is.

    Raises:
        RefimplError: it cannot be loaded.
    """
    compilations = _Compilations()
    gemma = refimpl.load(settings.model, numerics=settings.numerics, progress=progress)
    options = EngineOptions(
        slots=settings.slots,
        context=settings.context,
        steps=settings.steps,
        prefix_bytes=settings.prefix_bytes,
    )
    engine = Engine(gemma, options)
    engine.start(progress)
    return Loaded(
        engine=engine,
        fingerprint=fingerprint(
            gemma.path,
            parameters=gemma.parameters,
            numerics=gemma.numerics,
        ),
        block=BLOCK,
        num_compilations=compilations.count,
    )


class _Compilations:
    """Counts the programs that JAX compiles in this process from now on, cached ones included."""

    def __init__(self) -> None:
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def count(self) -> int:
        """So far."""
        return self._count

    def _listen(self, event: str, duration_secs: float, **_: object) -> None:
        del duration_secs
        self._count += event.endswith("backend_compile_duration")
